"""The record of tails during training: right numbers, no influence on the training, nothing lost or doubled by a resumption."""

import dataclasses
import json
import math
import time

import numpy as np
import pytest
import torch
from torch import nn

import wnq
from helpers_recorder import backward, record_in_a_process, small
from wnq.data import load_data
from wnq.models import build_model
from wnq.plan import make_plan
from wnq.recorder import TailRecorder, read_records, record_layers
from wnq.tails import predicted_error
from wnq.train import TAILS, Interrupted, TrainConfig, fit

CONFIG = TrainConfig(epochs=2, batch_size=512, lr=0.05, record_every=2, checkpoint_steps=1)


def digits(bits=3):
    torch.manual_seed(0)
    model = build_model("digits_cnn")
    return wnq.quantize_(model, make_plan(model, wnq.get_method("wnq", w_bits=bits, a_bits=bits)))


@pytest.fixture(scope="module")
def data():
    pytest.importorskip("sklearn")
    return load_data("digits")


def test_numbers_equal_numpy():
    model = small()
    backward(model)
    records = record_layers(model, 7)
    assert [r.layer for r in records] == ["0", "2", "4"]
    for record in records:
        original = model.get_submodule(record.layer).parametrizations.weight.original
        w, g = original.detach().double().numpy().ravel(), original.grad.double().numpy().ravel()
        values = model.get_submodule(record.layer).weight.detach().double().numpy().ravel()
        top = np.argmax(np.abs(w))
        rms = np.sqrt((w**2).mean())
        assert (record.step, record.bits, record.nonfinite) == (7, 3, 0)
        assert record.peak == pytest.approx(np.abs(w).max(), rel=1e-12)
        assert record.crest == pytest.approx(np.abs(w).max() / rms, rel=1e-6)
        assert record.relative_error == pytest.approx(((w - values) ** 2).sum() / (w**2).sum(), rel=1e-6)
        fitted = (w @ values) / (values @ values) * values
        assert record.rescaled_error == pytest.approx(((w - fitted) ** 2).sum() / (w**2).sum(), rel=1e-6)
        assert record.law_error == pytest.approx(predicted_error(3, record.crest), rel=1e-6)
        assert record.pull == pytest.approx(np.sign(w[top]) * g[top], rel=1e-6)
        assert record.gradient_rms == pytest.approx(np.sqrt((g**2).mean()), rel=1e-6)


def test_the_pull_predicts_where_descent_moves_the_largest_weight():
    for seed in range(10):
        model = small(seed)
        backward(model, seed)
        before = record_layers(model, 1)
        places = {r.layer: model.get_submodule(r.layer).parametrizations.weight.original.abs().argmax() for r in before}
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 1e-5 * parameter.grad
        for record in before:
            now = model.get_submodule(record.layer).parametrizations.weight.original.flatten()[places[record.layer]]
            assert (record.pull > 0) == (now.abs().item() < record.peak)


def test_tied_maxima_share_one_pull():
    layer = nn.Sequential(nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        layer[0].weight.copy_(torch.tensor([[1.0, -1.0], [0.5, 0.1]]))
    model = wnq.quantize_(layer, make_plan(layer, wnq.get_method("wnq", w_bits=2, a_bits=32), first_last_bits=None))
    weight = model[0].parametrizations.weight.original
    weight.grad = torch.tensor([[0.2, 0.6], [5.0, 5.0]])
    (record,) = record_layers(model, 1)
    assert record.pull == pytest.approx((0.2 - 0.6) / 2)


def test_without_gradient_or_with_nan_the_numbers_are_undefined_not_wrong(tmp_path):
    model = small()
    with torch.no_grad():
        model[2].parametrizations.weight.original[0, 0] = math.nan
    recorder = TailRecorder(model, every=1, path=tmp_path / TAILS)
    records = recorder.after_backward(1)
    assert all(math.isnan(r.pull) and math.isnan(r.gradient_rms) for r in records)
    assert [r.nonfinite for r in records] == [0, 1, 0]
    assert math.isnan(records[1].relative_error) and math.isfinite(records[1].crest)
    rows = [json.loads(line) for line in (tmp_path / TAILS).read_text().splitlines()]
    assert rows[1]["relative_error"] is None and rows[0]["pull"] is None
    again = read_records(tmp_path / TAILS)
    assert math.isnan(again[1].relative_error) and again[0].crest == records[0].crest


def test_due_steps_and_sinks():
    model, seen = small(), []
    recorder = TailRecorder(model, every=3, sinks=[lambda step, records: seen.append((step, len(records)))])
    for step in range(1, 10):
        recorder.after_backward(step)
    assert seen == [(1, 3), (3, 3), (6, 3), (9, 3)]


def test_mistakes_say_what_to_do():
    with pytest.raises(ValueError, match="every must be at least 1"):
        TailRecorder(small(), every=0)
    with pytest.raises(ValueError, match="no quantized layer to record"):
        TailRecorder(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="record_every must not be negative"):
        TrainConfig(record_every=-1)


def test_a_damaged_file_is_refused_but_for_a_last_line_cut_short(tmp_path):
    path = tmp_path / TAILS
    model = small()
    recorder = TailRecorder(model, every=1, path=path)
    recorder.after_backward(1)
    recorder.after_backward(2)
    whole = path.read_text()
    path.write_text(whole[:-20])
    assert len(read_records(path)) == 5
    recorder.resume_after(1)
    assert [r.step for r in read_records(path)] == [1, 1, 1]
    path.write_text("{}\n" + whole)
    with pytest.raises(ValueError, match="line 1: not a record"):
        read_records(path)
    with pytest.raises(ValueError, match="cannot read the records"):
        read_records(tmp_path / "none")


@pytest.mark.slow
def test_training_is_the_same_with_and_without_a_record(data, tmp_path):
    recorded, plain = digits(), digits()
    fit(recorded, data, CONFIG, out=tmp_path / "run")
    fit(plain, data, dataclasses.replace(CONFIG, record_every=0))
    for (name, one), two in zip(recorded.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.equal(one, two), name
    steps = sorted({r.step for r in read_records(tmp_path / "run" / TAILS)})
    assert steps == [1, 2, 4]  # two epochs of two steps


@pytest.mark.slow
def test_a_resumed_run_leaves_the_record_of_an_unbroken_one(data, tmp_path):
    fit(digits(), data, CONFIG, out=tmp_path / "whole")

    class Enough(Exception):
        pass

    def stop(progress):
        if (progress.epoch, progress.step) == (2, 1):
            raise Enough

    with pytest.raises((Enough, Interrupted)):
        fit(digits(), data, CONFIG, out=tmp_path / "broken", on_step=stop)
    fit(digits(), data, CONFIG, out=tmp_path / "broken", resume=True)
    one, two = (read_records(tmp_path / name / TAILS) for name in ("whole", "broken"))
    assert one == two and len(one) > 0


@pytest.mark.slow
def test_a_fresh_run_does_not_keep_the_record_of_another(data, tmp_path):
    (tmp_path / TAILS).write_text('{"an": "old file"}\n')
    fit(digits(), data, dataclasses.replace(CONFIG, epochs=1), out=tmp_path)
    assert sorted({r.step for r in read_records(tmp_path / TAILS)}) == [1, 2]


def test_a_recorder_begins_its_file_anew_unless_it_resumes(tmp_path):
    path, model = tmp_path / "runs" / TAILS, small()
    for _ in range(2):
        recorder = TailRecorder(model, every=1, path=path)
        assert recorder.after_backward(1) and not recorder.after_backward(
            1
        )  # a second call of one step: an optimizer's closure
        recorder.after_backward(2)
        assert [r.step for r in read_records(path)] == [1, 1, 1, 2, 2, 2]
    resumed = TailRecorder(model, every=1, path=path)
    resumed.resume_after(1)
    resumed.after_backward(2)
    assert [r.step for r in read_records(path)] == [1, 1, 1, 2, 2, 2]
    resumed.resume_after(0)
    assert path.read_text() == ""


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    recorder = TailRecorder(small(), path=tmp_path / "file" / TAILS)
    with pytest.raises(OSError, match=f"cannot write .*{TAILS}: .*choose another folder"):
        recorder.after_backward(1)


@pytest.mark.parametrize(("cost", "steps"), [(0.7, [1, *range(100, 1301, 100)]), (2.5, [1, 100, 700, 1000, 1300])])
def test_by_default_recording_takes_one_percent_of_the_time_at_most(monkeypatch, cost, steps):
    # A clock on which a step takes 1 second and a record ``cost``. After the first two a record at a multiple of 100 is passed
    # over where it would bring all but the first to more than 0.8 %: with 2.5 s, two are 5 / 601.5 at step 600, 5 / 701.5 at 700.
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def takes_time(step, records):
        now[0] += cost

    recorder, seen = TailRecorder(small(), sinks=[takes_time]), []
    assert math.isnan(recorder.share)
    for step in range(1, 1301):
        if recorder.after_backward(step):
            seen.append(step)
            assert recorder.share <= 0.008 or step in (1, 100)
        now[0] += 1
    assert seen == steps
    assert recorder.share == pytest.approx((len(seen) - 1) * cost / (now[0] - cost), rel=1e-12)
    explicit = TailRecorder(small(), every=100, sinks=[takes_time])
    assert [step for step in range(1, 501) if explicit.after_backward(step)] == [1, 100, 200, 300, 400, 500]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_pull_of_large_weights_equals_numpys(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(700, 500, bias=False, dtype=dtype))  # several pieces
    model = wnq.quantize_(model, make_plan(model, wnq.get_method("wnq", w_bits=3, a_bits=32), first_last_bits=None))
    original = model[0].parametrizations.weight.original
    with torch.no_grad():
        original[-1, -1], original[0, 0] = 2.0, -2.0
    original.grad = torch.randn(500, 700).to(dtype).t().contiguous().t()[:, :]
    (record,) = record_layers(model, 1)
    g = original.grad.double().numpy()
    assert record.pull == pytest.approx((g[-1, -1] - g[0, 0]) / 2, rel=1e-12)
    assert record.gradient_rms == pytest.approx(np.sqrt((g**2).mean()), rel=1e-12)
    original.grad[3, 3] = math.nan
    (record,) = record_layers(model, 1)
    assert math.isfinite(record.pull) and math.isnan(record.gradient_rms)


@pytest.mark.parametrize("name", [info.name for info in wnq.list_methods()])
def test_recording_changes_nothing(name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    wnq.quantize_(model, make_plan(model, wnq.get_method(name), first_last_bits=None))
    backward(model.train())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    generator = torch.get_rng_state()
    assert len(record_layers(model, 1)) == len(list(wnq.quantized_layers(model)))
    assert torch.equal(generator, torch.get_rng_state())
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    after = [p.grad for p in model.parameters()]
    assert all((a is None and b is None) or torch.equal(a, b) for a, b in zip(gradients, after, strict=True))


def test_a_compiled_model_is_recorded_under_the_names_of_its_layers():
    model = small()
    backward(model)
    assert TailRecorder(torch.compile(model)).after_backward(1) == record_layers(model, 1)


@pytest.mark.slow
def test_of_two_processes_the_first_records_the_mean_gradient_and_sharded_weights_are_refused(tmp_path):
    torch.multiprocessing.spawn(record_in_a_process, args=(tmp_path,), nprocs=2)
    (first, refusal), (second, same) = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    assert [vars(r) for r in read_records(tmp_path / TAILS)] == first and second == []
    model = small()
    backward(model)  # both shares at once
    for one, alone in zip(first, record_layers(model, 1), strict=True):
        assert (one["layer"], one["crest"]) == (alone.layer, alone.crest)
        # The mean of two means of 8 instead of one of 16, in float32.
        assert one["pull"] == pytest.approx(alone.pull, rel=1e-4, abs=1e-7)
        assert one["gradient_rms"] == pytest.approx(alone.gradient_rms, rel=1e-5)
    expected = "the weight of 0 is sharded over processes: record it from a gathered copy of the model."
    assert refusal == same == expected
