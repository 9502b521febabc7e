"""The latency benchmark: its intervals, its turns, what it runs and what it leaves out."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats

import wnq
from wnq.cli import main
from wnq.speed import in_turn, measure_speed, median_ratio

pytest.importorskip("onnxruntime")


@pytest.mark.parametrize("n", [6, 7, 25, 26, 999, 1000, 1500])
def test_the_interval_is_that_of_the_sign_test(n: int) -> None:
    """From the distribution of the number of ratios below the median: no more than 2.5 % on either side."""
    slow = [float(i) for i in range(1, n + 1)]
    ratio = median_ratio(slow, [1.0] * n)
    assert ratio.median == (n + 1) / 2
    exact = int(stats.binom.ppf(0.025, n, 0.5))
    if stats.binom.cdf(exact, n, 0.5) > 0.025:
        exact -= 1
    rank = int(ratio.low)  # the k-th smallest ratio is k
    assert ratio.high == n + 1 - rank
    assert rank == exact + 1 if n < 1000 else exact - 2 <= rank <= exact + 1


def test_few_rounds_have_no_interval() -> None:
    ratio = median_ratio([2.0, 4.0, 6.0], [1.0, 1.0, 1.0])
    assert ratio.median == 4
    assert math.isnan(ratio.low)
    assert math.isnan(ratio.high)


def test_all_run_once_a_round_in_changing_order() -> None:
    log: list[str] = []
    taken = in_turn({name: lambda name=name: log.append(name) for name in "abc"}, seconds=0.0, least=40)
    assert {name: len(times) for name, times in taken.items()} == {"a": 40, "b": 40, "c": 40}
    rounds = ["".join(log[at : at + 3]) for at in range(6, len(log), 3)]  # each ran twice before
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert len(set(rounds)) == 6


def test_untimed_runs_come_right_before_the_timed_one() -> None:
    log: list[str] = []
    taken = in_turn({name: lambda name=name: log.append(name) for name in "ab"}, seconds=0.0, least=9, untimed=2)
    assert {len(times) for times in taken.values()} == {9}
    assert {"".join(log[at : at + 3]) for at in range(4, len(log), 3)} == {"aaa", "bbb"} and len(log) == 4 + 2 * 9 * 3


def test_times_are_those_of_the_run() -> None:
    taken = in_turn({"slow": lambda: sum(range(200_000)), "fast": lambda: None}, seconds=0.05)
    assert min(taken["slow"]) > 10 * max(1e-7, sorted(taken["fast"])[len(taken["fast"]) // 2])
    assert sum(taken["slow"]) + sum(taken["fast"]) >= 0.04


def quantized() -> tuple[torch.nn.Module, torch.nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    network = wnq.build_model("digits_cnn").eval()
    model = wnq.build_model("digits_cnn").eval()
    wnq.quantize_(model, wnq.make_plan(model, wnq.get_method("wnq", w_bits=3, a_bits=3)))
    x = torch.rand(8, 1, 8, 8)
    wnq.calibrate_(model, x)
    return model, network, x


def test_float_and_integer_beside_each_other() -> None:
    model, network, x = quantized()
    threads = torch.get_num_threads()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = measure_speed(model, (x,), batches=(1, 20), float_model=network, engines=["eager", "onnx"], seconds=0.05)
    assert torch.get_num_threads() == threads
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    rows = found["rows"]
    assert [(row["batch"], row["arm"], row["integer"]) for row in rows] == [
        (batch, arm, arm.endswith("integer"))
        for batch in (1, 20)
        for arm in ("torch eager float", "onnxruntime float", "onnxruntime integer")
    ]
    assert found["base"] == "onnxruntime float"
    for row in rows:
        assert 0 < row["p5_ms"] <= row["median_ms"] <= row["p95_ms"]
        assert row["rounds"] >= 7
        if row["arm"] == found["base"]:
            assert (row["times_faster"], row["times_faster_low"], row["times_faster_high"]) == (1, 1, 1)
    assert not found["left_out"]


def test_what_does_not_work_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, x = quantized()
    monkeypatch.setitem(__import__("sys").modules, "openvino", None)  # as if it were not installed
    found = measure_speed(model, (x,), batches=(1,), engines=["eager", "onnx", "openvino"], seconds=0.02)
    left = {entry["name"]: entry["why"] for entry in found["left_out"]}
    assert left["torch eager float"] == "the float network is not known"
    assert left["openvino"] == 'openvino is not installed: pip install "wnq[openvino]".'
    assert {row["arm"] for row in found["rows"]} == {"onnxruntime float", "onnxruntime integer"}
    with pytest.raises(ValueError, match=r"nothing can be measured: .*is not installed"):
        measure_speed(model, (x,), engines=["openvino"])
    with pytest.raises(ValueError, match=r"base must be one of 'onnxruntime float', 'onnxruntime integer', got 'tvm'"):
        measure_speed(model, (x,), engines=["onnx"], base="tvm")


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as end:
        main(["bench", "infer", *arguments])
    code: Any = end.value.code
    return int(code)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "speed.json"
    options = ("--engines", "onnx", "--batches", "1,3", "--seconds", "0.1", "--out", str(out))
    assert run("digits_cnn", "--bits", "2/3", *options, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads(out.read_text())
    assert found["input"] == [1, 8, 8]
    assert {row["batch"] for row in found["rows"]} == {1, 3}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("digits_cnn", "--batches", "1,x"), "--batches must be positive integers separated by ',', got '1,x'."),
        (("digits_cnn", "--batches", "0"), "--batches must be positive integers separated by ',', got '0'."),
        (("digits_cnn", "--bits", "4"), "--bits must be W/A, such as 4/4, got '4'."),
        (("digits_cnn", "--size", "8x8"), "--size must be channels x height x width, such as 3x224x224, got '8x8'."),
        (("digits_cnn", "--engines", "tvm"), "--engines must be one of 'eager', 'compiled', 'onnx'"),
        (("digit_cnn",), "unknown model 'digit_cnn'. Did you mean 'digits_cnn'"),
    ],
)
def test_mistakes(arguments: tuple[str, ...], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1
