"""The experiment that settles what normalization does: equal arms, right numbers, a verdict that can fall either way."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from safetensors.torch import load_file

import wnq
from wnq import cli
from wnq.recipe import DataSection, ModelSection, QuantizeSection, Recipe, recipe_from
from wnq.recorder import read_records
from wnq.settle import ARMS, CLAIMS, LayerMeasure, RunMeasure, experiment, hold, judge, settle
from wnq.settle.claims import CONTRADICTED, MISSING, SUPPORTED, UNDECIDED, combined
from wnq.train import TrainConfig

RECIPE = Recipe(
    model=ModelSection(name="digits_cnn"),
    data=DataSection(name="digits", limit=192),
    train=TrainConfig(epochs=1, batch_size=32, lr=0.05),
)


# The arms


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_the_first_forward_pass_of_all_arms_is_the_same_bit_for_bit(bits: int, granularity: str):
    section = QuantizeSection(method="wnq", options={"granularity": granularity})
    asked = experiment(Recipe(quantize=section), gains=[0.3])
    weight = torch.from_numpy(np.random.default_rng(bits).standard_t(4, size=(6, 5, 3, 3))).float()
    values = [
        wnq.get_method(arm.method, w_bits=bits, **arm.options).weight(weight, 0)(weight) for arm in asked.contenders
    ]
    assert [arm.label for arm in asked.contenders] == ["attached", "gain-0.3", "detached", "none"]
    assert all(torch.equal(value, values[0]) for value in values)


def test_arms_differ_in_the_gradient_and_the_range_only():
    asked = experiment(Recipe(quantize=QuantizeSection(method="wnq", options={"grid": "symmetric"})), controls=())
    assert {arm.label: (arm.method, dict(arm.options)) for arm in asked.contenders} == {
        "attached": ("wnq", {"grid": "symmetric"}),
        "detached": ("wnq", {"grid": "symmetric", "max_gain": 0.0}),
        "none": ("fixed", {"grid": "symmetric"}),
    }
    assert asked.widths == ((2, 2), (3, 3), (4, 4))
    assert not asked.recommended  # settings of papers would differ between arms


@pytest.mark.parametrize(
    ("recipe", "options", "message"),
    [
        (Recipe(quantize=QuantizeSection(method="lsq")), {}, "about wnq.*'lsq'"),
        (
            Recipe(quantize=QuantizeSection(method="wnq", options={"max_gain": 0.5})),
            {},
            "max_gain would not be the same",
        ),
        (Recipe(), {"seeds": (0,)}, "two at least"),
        (Recipe(), {"every": 0}, "at least 1 step"),
        (Recipe(), {"gains": (1.0,)}, "not 1"),
        (Recipe(), {"gains": (math.nan,)}, "positive, finite"),
    ],
)
def test_what_would_make_the_arms_unequal_is_refused(recipe: Recipe, options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        experiment(recipe, **options)


# The claims


def layer(**values: float) -> LayerMeasure:
    plain = {name: 1.0 for name in LayerMeasure.__dataclass_fields__ if name not in ("layer", "records")}
    return LayerMeasure(**{"layer": "conv", "records": 1000, **plain, **values})


def made(arm: str, seed: int, accuracy: float, **values: float) -> RunMeasure:
    return RunMeasure(arm, (3, 3), seed, accuracy, (layer(**values),), ())


def runs(arm: str, accuracies: list[float], columns: dict[str, list[float]]) -> dict[int, RunMeasure]:
    return {
        seed: made(arm, seed, accuracy, **{name: column[seed] for name, column in columns.items()})
        for seed, accuracy in enumerate(accuracies)
    }


ATTACHED = runs("attached", [91.0, 92.0, 91.4], {"toward": [0.9, 0.95, 0.85], "crest_end": [0.5, 0.45, 0.52],
                "peak_end": [0.6, 0.62, 0.58], "error_end": [0.3, 0.2, 0.28]})  # fmt: skip
DETACHED = runs("detached", [90.0, 90.2, 90.1], {"toward": [0.5, 0.52, 0.47], "crest_end": [1.0, 1.1, 0.95],
                "peak_end": [1.0, 1.05, 0.99], "error_end": [1.1, 1.2, 1.0]})  # fmt: skip
NONE = runs("none", [89.0, 89.5, 89.1], {"toward": [0.5, 0.49, 0.52], "crest_end": [1.0, 1.02, 0.97],
            "peak_end": [1.0, 1.1, 0.9], "error_end": [1.0, 1.1, 1.0]})  # fmt: skip


def values_of(arm: dict[int, RunMeasure], column: str) -> np.ndarray:
    return np.array([getattr(run.layers[0], column) for run in arm.values()])


def test_estimates_and_intervals_are_scipys():
    claims = {claim.letter: claim for claim in hold({"attached": ATTACHED, "detached": DETACHED, "none": NONE}, 0.1)}
    toward, peak = claims["a"].tests
    expected = scipy.stats.ttest_1samp(values_of(ATTACHED, "toward"), 0.5).confidence_interval(0.95)
    assert (toward.low, toward.high) == pytest.approx(tuple(expected), rel=1e-9)
    assert toward.estimate == pytest.approx(0.9)
    # A factor is judged on its logarithm.
    expected = scipy.stats.ttest_1samp(np.log(values_of(ATTACHED, "peak_end")), 0).confidence_interval(0.95)
    assert (peak.low, peak.high) == pytest.approx(tuple(np.exp(expected)), rel=1e-9)
    assert peak.estimate == pytest.approx(float(scipy.stats.gmean(values_of(ATTACHED, "peak_end"))))
    accuracy = claims["e"].tests[-1]
    paired = scipy.stats.ttest_rel([91.0, 92.0, 91.4], [90.0, 90.2, 90.1]).confidence_interval(0.95)
    assert (accuracy.low, accuracy.high) == pytest.approx(tuple(paired), rel=1e-9)
    assert accuracy.values == pytest.approx((1.0, 1.8, 1.3))
    error = claims["c"].tests[1]
    paired = scipy.stats.ttest_rel(np.log(values_of(ATTACHED, "error_end")), np.log(values_of(NONE, "error_end")))
    assert (error.low, error.high) == pytest.approx(tuple(np.exp(paired.confidence_interval(0.95))), rel=1e-9)
    assert error.unit == "factor" and error.chance == 1.0


def test_every_claim_can_fall_either_way():
    for_it = hold({"attached": ATTACHED, "detached": DETACHED, "none": NONE}, 0.1)
    assert {claim.letter: claim.verdict for claim in for_it} == dict.fromkeys("abcde", SUPPORTED)
    # The same arms with their names exchanged, and the start's numbers upside down.
    worse = {
        "toward": [0.1, 0.12, 0.09],
        "crest_end": [2.0, 2.1, 1.9],
        "peak_end": [1.5, 1.6, 1.55],
        "error_end": [3.0, 3.3, 2.9],
    }
    against = hold({"attached": runs("attached", [80.0, 80.3, 80.1], worse), "detached": DETACHED, "none": NONE}, 0.1)
    assert {claim.letter: claim.verdict for claim in against} == dict.fromkeys("abcde", CONTRADICTED)


def test_seeds_that_disagree_decide_nothing_and_equal_seeds_prove_nothing():
    torn = runs("attached", [80.0, 95.0, 89.0], {"toward": [0.3, 0.9, 0.4], "crest_end": [0.5, 2.0, 1.1]})
    claims = {claim.letter: claim for claim in hold({"attached": torn, "detached": DETACHED, "none": NONE}, 0.1)}
    assert [claims[letter].verdict for letter in "abd"] == [UNDECIDED] * 3
    same = runs("attached", [89.3] * 3, {})
    other = runs("none", [89.2] * 3, {})
    (test,) = hold({"attached": same, "none": other}, 0.1)[3].tests
    assert test.verdict == UNDECIDED  # one image more for each seed is within the resolution of an image
    assert test.low is not None and test.low < 0 < test.high


def test_a_lost_arm_or_seed_is_not_measured_rather_than_guessed():
    claims = {claim.letter: claim for claim in hold({"attached": ATTACHED}, 0.1)}
    assert claims["b"].verdict == SUPPORTED
    assert claims["d"].verdict == MISSING and claims["d"].tests[0].estimate is None
    one = {seed: run for seed, run in DETACHED.items() if seed == 1}
    claims = {claim.letter: claim for claim in hold({"attached": ATTACHED, "detached": one}, 0.1)}
    assert {test.verdict for test in claims["e"].tests} == {MISSING}


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        ([], MISSING),
        ([SUPPORTED, SUPPORTED], SUPPORTED),
        ([SUPPORTED, UNDECIDED], UNDECIDED),
        ([SUPPORTED, MISSING], MISSING),
        ([CONTRADICTED, MISSING], CONTRADICTED),
        ([SUPPORTED, CONTRADICTED, UNDECIDED], CONTRADICTED),
    ],
)
def test_verdicts_combine(verdicts: list[str], expected: str):
    assert combined(verdicts) == expected


# A real, small experiment


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], Any]:
    folder = tmp_path_factory.mktemp("settle") / "runs"
    asked = experiment(RECIPE, bits=((3, 3),), controls=((8, 8),), seeds=(0, 1), every=2)
    return folder, settle(asked, folder, controls=((8, 8),)), asked


def start_and_end(folder: Path, run: dict[str, Any], name: str) -> tuple[np.ndarray, np.ndarray]:
    start = load_file(folder / f"float-s{run['seed']}" / "model.safetensors")[f"{name}.weight"]
    end = load_file(folder / f"{run['label']}-w3a3-s{run['seed']}" / "model.safetensors")
    return start.double().numpy(), end[f"{name}.parametrizations.weight.original"].double().numpy()


def full_grid_error(w: np.ndarray, peak: float, bits: int) -> float:
    top = 2**bits - 1
    q = peak * (2 * np.rint(top * (np.clip(w / peak, -1, 1) + 1) / 2) / top - 1)
    return float(((w - q) ** 2).sum() / (w**2).sum())


def test_layers_start_and_end_as_numpy_says(real: tuple[Path, dict[str, Any], Any]):
    folder, verdict, _ = real
    (width,) = [w for w in verdict["widths"] if not w["control"]]
    assert {run["label"] for run in width["runs"]} == set(ARMS) and len(width["runs"]) == 6
    for run in width["runs"]:
        names = [measured["layer"] for measured in run["layers"]]
        assert names and "classifier" not in names  # first and last have widths of their own
        for measured in run["layers"]:
            start, end = start_and_end(folder, run, measured["layer"])
            for when, w in (("start", start), ("end", end)):
                peak, rms = np.abs(w).max(), math.sqrt((w**2).mean())
                assert measured[f"peak_{when}"] == pytest.approx(peak, rel=1e-6)
                assert measured[f"crest_{when}"] == pytest.approx(peak / rms, rel=1e-6)
                assert measured[f"kurtosis_{when}"] == pytest.approx(
                    scipy.stats.kurtosis(w.ravel(), fisher=False), rel=1e-6
                )
                assert measured[f"tail_mass_{when}"] == (np.abs(w) > 3 * rms).mean()
                reach = np.abs(start).max() if run["label"] == "none" else peak
                # Float32 arithmetic may put a weight that lies on a threshold on its other side.
                assert measured[f"error_{when}"] == pytest.approx(full_grid_error(w, reach, 3), rel=1e-3)
                assert measured[f"law_{when}"] == pytest.approx((2 * reach / 7) ** 2 / 12 / rms**2, rel=1e-5)


def test_arms_begin_alike_and_only_the_gradient_through_the_maximum_differs(real: tuple[Path, dict[str, Any], Any]):
    folder, _, _ = real
    first = {
        arm: [row for row in read_records(folder / f"{arm}-w3a3-s0" / "tails.jsonl") if row.step == 1] for arm in ARMS
    }
    pulls: dict[str, list[float]] = {}
    for arm, rows in first.items():
        for row, other in zip(rows, first["attached"], strict=True):
            assert (row.layer, row.crest, row.kurtosis, row.relative_error, row.law_error) == (
                other.layer, other.crest, other.kurtosis, other.relative_error, other.law_error)  # fmt: skip
        pulls[arm] = [row.pull for row in rows]
    # Division by m and multiplication by m round the gradient of the one and not of the other.
    assert pulls["detached"] == pytest.approx(pulls["none"], rel=1e-5)
    assert all(abs(a - d) > 1e-3 * abs(d) for a, d in zip(pulls["attached"], pulls["detached"], strict=True))


def test_shares_count_the_records(real: tuple[Path, dict[str, Any], Any]):
    folder, verdict, _ = real
    (width,) = [w for w in verdict["widths"] if not w["control"]]
    for run in width["runs"]:
        rows = read_records(folder / f"{run['label']}-w3a3-s{run['seed']}" / "tails.jsonl")
        assert sorted({row.step for row in rows}) == [1, 2, 4, 6]  # 192 images, batches of 32
        for measured in run["layers"]:
            pulls = [row.pull for row in rows if row.layer == measured["layer"]]
            assert measured["records"] == len(pulls) == 4
            assert measured["toward"] == sum(pull > 0 for pull in pulls) / 4
        for point in run["track"]:
            now = [
                row for row in rows if row.step == point["step"] and row.layer in {m["layer"] for m in run["layers"]}
            ]
            assert point["crest"] == float(np.median([row.crest for row in now]))


def test_the_folder_tells_machines_and_people_and_is_not_run_again(real: tuple[Path, dict[str, Any], Any]):
    folder, verdict, asked = real
    stored = json.loads((folder / "verdict.json").read_text(encoding="utf-8"))
    assert stored == verdict
    assert (
        (folder / "verdict.md")
        .read_text(encoding="utf-8")
        .startswith("# What normalization does: digits_cnn on digits")
    )
    assert "<svg" in (folder / "verdict.html").read_text(encoding="utf-8")
    assert [row["letter"] for row in verdict["overall"]] == list(CLAIMS)
    assert all(set(row["by_width"]) == {"W3A3"} for row in verdict["overall"])  # W8A8 is a control
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/result.json")}
    assert len(before) == 2 + 3 * 2 * 2
    again = settle(asked, folder, controls=((8, 8),))
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*/result.json")} == before
    assert {**again, "written": ""} == {**verdict, "written": ""}


def test_a_foreign_record_is_refused(real: tuple[Path, dict[str, Any], Any], tmp_path: Path):
    import shutil

    folder, _, asked = real
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "attached-w3a3-s0" / "tails.jsonl").write_text("")
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    with pytest.raises(
        ValueError, match=r"tails\.jsonl does not belong to the run beside it\. Remove .*attached-w3a3-s0"
    ):
        judge(asked, copy, results)


# The command


def command(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.main(["settle", *map(str, words)])
    out, err = capsys.readouterr()
    return int(stop.value.code or 0), out, err


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "r.toml"
    path.write_text(
        '[model]\nname = "digits_mlp"\n[data]\nname = "digits"\nlimit = 100\n'
        "[train]\nepochs = 1\nbatch_size = 50\nlr = 0.05\n"
    )
    return path


def test_the_command_states_each_claim_and_its_numbers(capsys, recipe_file: Path, tmp_path: Path):
    words = (recipe_file, "--bits", "2", "--controls", "none", "--seeds", 2, "--every", 1, "--out", tmp_path / "out")
    code, out, _ = command(capsys, *words)
    assert code == 0
    for letter, text in CLAIMS.items():
        assert f"({letter}) {text}: " in out
    assert "verdict.html" in out and (tmp_path / "out" / "verdict.html").exists()
    code, out, _ = command(capsys, *words, "--json")
    assert code == 0
    assert json.loads(out)["overall"] == json.loads((tmp_path / "out" / "verdict.json").read_text())["overall"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--bits", "9"), "9"),
        (("--bits", "natural"), "natural is no width here"),
        (("--gains", "much"), "--gains must be numbers"),
        (("--seeds", "1"), "seeds"),
        (("--set", "train.epoch=3"), "epochs"),
        (("--set", "quantize.method=lsq"), "the experiment is about wnq"),
    ],
)
def test_mistakes_are_told_in_words(capsys, recipe_file: Path, tmp_path: Path, words: tuple[str, ...], message: str):
    code, _, err = command(capsys, recipe_file, *words, "--out", tmp_path / "out")
    assert code == 2
    assert message in err and "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_a_missing_recipe_is_a_failure(capsys, tmp_path: Path):
    code, _, err = command(capsys, tmp_path / "none.toml")
    assert code == 1 and "does not exist" in err


@pytest.mark.parametrize("name", ["digits-settle", "cifar100-resnet20-settle"])
def test_the_recipes_that_ship_ask_what_the_command_takes(name: str):
    import tomllib

    path = Path(__file__).parents[1] / "recipes" / f"{name}.toml"
    recipe = recipe_from(tomllib.loads(path.read_text(encoding="utf-8")), where=str(path))
    assert len(experiment(recipe).contenders) == 3
