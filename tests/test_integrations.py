"""The training-time view in real hosts: what a plain loop records on the same steps, bit for bit, and training as without it."""

import csv
import math
import pickle
import statistics
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import wnq
from wnq.integrations import lightning_callback, scalars, to_tensorboard, to_trackers, transformers_callback
from wnq.plan import make_plan
from wnq.prepared import float_weight
from wnq.recorder import TailRecorder, read_records
from wnq.tails import tensor_stats

STEPS, ACCUMULATED, BATCH = 6, 2, 4
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(STEPS * ACCUMULATED * BATCH, 6, generator=GENERATOR)
Y = torch.randint(3, (len(X),), generator=GENERATOR)


def make_net():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    return wnq.quantize_(net, make_plan(net, wnq.get_method("wnq", w_bits=3, a_bits=3), first_last_bits=None))


def make_optimizer(model):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


class Loss(nn.Module):
    """The model in a host's clothes; it remembers the batches it was trained on."""

    def __init__(self):
        super().__init__()
        self.net = make_net()
        self.seen = []

    def forward(self, x, labels):
        self.seen.append((x, labels))
        return {"loss": nn.functional.cross_entropy(self.net(x), labels)}


def plain_loop(batches, **options):
    """Train on the batches, several a step; return the model and its records under the names a host's module gives."""
    model, records = Loss(), []
    optimizer = make_optimizer(model)
    recorder = TailRecorder(model, sinks=[lambda step, rows: records.extend(rows)], **options)
    for number, (x, labels) in enumerate(batches, 1):
        (model(x, labels)["loss"] / ACCUMULATED).backward()
        if number % ACCUMULATED == 0:
            recorder.after_backward(number // ACCUMULATED)
            optimizer.step()
            optimizer.zero_grad()
    return model, records


def loader():
    return DataLoader(TensorDataset(X, Y), batch_size=BATCH)


def steps_of(records):
    return list(dict.fromkeys(record.step for record in records))


def assert_equal_weights(one, two):
    for (name, value), other in zip(one.state_dict().items(), two.state_dict().values(), strict=True):
        assert torch.equal(value, other), name


def events(folder):
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    (path,) = folder.rglob("events.out.tfevents.*")
    return accumulators.EventAccumulator(str(path), size_guidance={"scalars": 0, "histograms": 0}).Reload()


# Lightning


def lightning_module(package):
    class Module(package.LightningModule):
        def __init__(self):
            super().__init__()
            self.loss = Loss()

        def training_step(self, batch, _):
            return self.loss(*batch)["loss"]

        def configure_optimizers(self):
            return make_optimizer(self)

    return Module()


def lightning_fit(package, folder, *callbacks, module=None, ckpt_path=None, **options):
    module = module or lightning_module(package)
    options = {"logger": False, "max_epochs": 1, "enable_checkpointing": False} | options
    trainer = package.Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        accumulate_grad_batches=ACCUMULATED,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **options,
    )
    trainer.fit(module, loader(), ckpt_path=ckpt_path)
    return module


def bare(records, prefix):
    """Return the records with the layers' names inside the host's module."""
    return [type(r)(**{**vars(r), "layer": r.layer.removeprefix(prefix)}) for r in records]


@pytest.mark.parametrize("name", ["lightning.pytorch", "pytorch_lightning"])
def test_lightning_records_what_a_plain_loop_records_and_trains_as_without(name, tmp_path):
    package = pytest.importorskip(name)
    callback = lightning_callback(every=2, path=tmp_path / "tails.jsonl")
    assert isinstance(callback, package.Callback)
    module = lightning_fit(package, tmp_path, callback)
    model, expected = plain_loop(module.loss.seen, every=2)
    records = read_records(tmp_path / "tails.jsonl")
    assert bare(records, "loss.") == expected
    assert steps_of(records) == [1, 2, 4, 6]
    assert all(math.isfinite(r.pull) and r.gradient_rms > 0 for r in records)
    assert_equal_weights(module.loss, model)
    assert_equal_weights(module, lightning_fit(package, tmp_path))


def test_lightning_logs_to_the_trainers_loggers(tmp_path):
    package = pytest.importorskip("lightning.pytorch")
    loggers = pytest.importorskip("lightning.pytorch.loggers")
    for log, seen in (("layers", "crest/loss.net.2"), ("medians", "crest/median")):
        logger = loggers.CSVLogger(tmp_path / log, flush_logs_every_n_steps=1)
        path = tmp_path / f"{log}.jsonl"
        lightning_fit(package, tmp_path, lightning_callback(every=3, path=path, log=log), logger=logger)
        rows = list(csv.DictReader((tmp_path / log / "lightning_logs" / "version_0" / "metrics.csv").open()))
        records = read_records(path)
        expected = {step: scalars([r for r in records if r.step == step], log) for step in (1, 3, 6)}
        assert seen in expected[1]
        assert {int(row["step"]): {k: float(v) for k, v in row.items() if k in expected[1]} for row in rows} == expected


def test_lightning_gradients_are_unscaled_under_mixed_precision(tmp_path):
    package = pytest.importorskip("lightning.pytorch")
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    plugin = package.plugins.MixedPrecision("16-mixed", "cpu", scaler=scaler)
    lightning_fit(package, tmp_path, lightning_callback(every=1, path=tmp_path / "half.jsonl"), plugins=[plugin])
    module = lightning_fit(package, tmp_path, lightning_callback(every=1, path=tmp_path / "single.jsonl"))
    half, single = (read_records(tmp_path / f"{name}.jsonl") for name in ("half", "single"))
    assert len(half) == len(single) == STEPS * 3 and len(module.loss.seen) == STEPS * ACCUMULATED
    for one, two in zip(half[:3], single[:3], strict=True):
        # Products of float16 numbers, 11 bits each, summed over a few inputs; a scaled gradient would be 1024 times as large.
        assert one.gradient_rms == pytest.approx(two.gradient_rms, rel=0.01)


def test_a_resumed_lightning_run_leaves_the_record_of_an_unbroken_one(tmp_path):
    package = pytest.importorskip("lightning.pytorch")
    lightning_fit(package, tmp_path, lightning_callback(every=2, path=tmp_path / "whole.jsonl"), max_epochs=2)

    class Crash(package.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == STEPS + 3:
                raise KeyError("a crash")

    path = tmp_path / "broken.jsonl"
    checkpoint = package.callbacks.ModelCheckpoint(tmp_path, filename="last", every_n_epochs=1)
    with pytest.raises(KeyError, match="a crash"):
        parts = lightning_callback(every=2, path=path), Crash(), checkpoint
        lightning_fit(package, tmp_path, *parts, max_epochs=2, enable_checkpointing=True)
    assert steps_of(read_records(path)) == [1, 2, 4, 6, 8]
    callback = lightning_callback(every=2, path=path)
    lightning_fit(package, tmp_path, callback, max_epochs=2, ckpt_path=tmp_path / "last.ckpt")
    records = read_records(path)
    assert records == read_records(tmp_path / "whole.jsonl") and steps_of(records) == [1, 2, 4, 6, 8, 10, 12]


def test_a_lightning_callback_can_be_sent_to_other_processes(tmp_path):
    package = pytest.importorskip("lightning.pytorch")
    callback = pickle.loads(pickle.dumps(lightning_callback(every=5, path=tmp_path / "tails.jsonl", log="medians")))
    assert isinstance(callback, package.Callback)
    lightning_fit(package, tmp_path, callback)
    assert steps_of(read_records(tmp_path / "tails.jsonl")) == [1, 5]


def test_lightning_refuses_a_float_model(tmp_path):
    package = pytest.importorskip("lightning.pytorch")
    module = lightning_module(package)
    module.loss.net = nn.Linear(6, 3)
    with pytest.raises(ValueError, match="Module has no quantized layer to record"):
        lightning_fit(package, tmp_path, lightning_callback(), module=module)


# The Trainer of transformers


def make_trainer(folder, **options):
    transformers = pytest.importorskip("transformers")
    model = Loss()
    optimizer = make_optimizer(model)
    settings = {
        "max_steps": STEPS,
        "report_to": "none",
        "save_strategy": "no",
        "max_grad_norm": 0.0,
        "logging_steps": 4,
    } | options
    arguments = transformers.TrainingArguments(
        str(folder),
        use_cpu=True,
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=ACCUMULATED,
        disable_tqdm=True,
        **settings,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    data = [{"x": x, "labels": y} for x, y in zip(X, Y, strict=True)]
    return transformers.Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, schedule))


def test_the_trainer_records_what_a_plain_loop_records_and_trains_as_without(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.add_callback(transformers_callback(trainer, every=2, path=tmp_path / "tails.jsonl"))
    trainer.train()
    model, expected = plain_loop(trainer.model.seen, every=2)
    records = read_records(tmp_path / "tails.jsonl")
    assert records == expected and steps_of(records) == [1, 2, 4, 6]
    assert_equal_weights(trainer.model, model)
    without = make_trainer(tmp_path)
    without.train()
    assert_equal_weights(trainer.model, without.model)
    # Its own numbers are the same, and ours stand beside them under the steps they belong to.
    ours = [row for row in trainer.state.log_history if "crest/median" in row]
    assert [(row["step"], row["crest/median"]) for row in ours] == [
        (step, statistics.median(r.crest for r in records if r.step == step)) for step in (1, 2, 4, 6)
    ]
    losses = ([row["loss"] for row in run.state.log_history if "loss" in row] for run in (trainer, without))
    assert next(losses) == next(losses)


def test_the_trainer_clips_before_it_is_recorded(tmp_path):
    records = {}
    for limit in (0.0, 1e-3):
        trainer = make_trainer(tmp_path, max_grad_norm=limit, max_steps=1, logging_steps=1)
        trainer.add_callback(transformers_callback(trainer, path=tmp_path / "tails.jsonl", log="none"))
        trainer.train()
        assert not any("crest/median" in row for row in trainer.state.log_history)
        records[limit] = read_records(tmp_path / "tails.jsonl")
        norm = next(row["grad_norm"] for row in trainer.state.log_history if "grad_norm" in row)
    for whole, clipped in zip(*records.values(), strict=True):
        # One factor for all gradients, in float32; the clipping adds 1e-6 to the norm.
        assert clipped.gradient_rms == pytest.approx(whole.gradient_rms * 1e-3 / (norm + 1e-6), rel=1e-5)
        assert clipped.pull == pytest.approx(whole.pull * 1e-3 / (norm + 1e-6), rel=1e-5)


def test_the_trainer_reports_to_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    trainer = make_trainer(tmp_path, report_to="tensorboard")
    trainer.add_callback(transformers_callback(trainer, every=2, path=tmp_path / "tails.jsonl", log="layers"))
    trainer.train()
    records = [r for r in read_records(tmp_path / "tails.jsonl") if r.layer == "net.2"]
    found = events(tmp_path).Scalars("train/pull/net.2")
    assert [(point.step, point.value) for point in found] == [(r.step, np.float32(r.pull)) for r in records]


def test_a_resumed_trainer_leaves_the_record_of_an_unbroken_one(tmp_path):
    transformers = pytest.importorskip("transformers")

    class Crash(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == 5:
                raise KeyError("a crash")

    def run(name, *callbacks, resume=None):
        trainer = make_trainer(tmp_path / name, save_strategy="steps", save_steps=3)
        trainer.add_callback(transformers_callback(trainer, every=1, path=tmp_path / f"{name}.jsonl"))
        for callback in callbacks:
            trainer.add_callback(callback)
        trainer.train(resume_from_checkpoint=resume)
        return trainer.model

    whole = run("whole")
    with pytest.raises(KeyError, match="a crash"):
        run("broken", Crash())
    assert steps_of(read_records(tmp_path / "broken.jsonl")) == [1, 2, 3, 4, 5]
    resumed = run("broken", resume=str(tmp_path / "broken" / "checkpoint-3"))
    records = read_records(tmp_path / "broken.jsonl")
    assert records == read_records(tmp_path / "whole.jsonl") and steps_of(records) == [1, 2, 3, 4, 5, 6]
    assert_equal_weights(resumed, whole)


# accelerate


def test_accelerates_trackers_get_the_scalars(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    tracking = pytest.importorskip("accelerate.tracking")

    class Kept(tracking.GeneralTracker):
        name, requires_logging_directory = "kept", False

        def __init__(self):
            super().__init__()
            self.rows = []

        @property
        def tracker(self):
            return self.rows

        def store_init_configuration(self, values):
            pass

        def log(self, values, step=None, **_):
            self.rows.append((step, values))

    kept = Kept()
    accelerator = accelerate.Accelerator(cpu=True, log_with=kept, gradient_accumulation_steps=ACCUMULATED)
    accelerator.init_trackers("test")
    model = Loss()
    recorder = TailRecorder(model, every=2, path=tmp_path / "tails.jsonl", sinks=[to_trackers(accelerator)])
    network, optimizer, batches = accelerator.prepare(model, make_optimizer(model), loader())
    step = 0
    for x, labels in batches:
        with accelerator.accumulate(network):
            accelerator.backward(network(x, labels)["loss"])
            if accelerator.sync_gradients:
                step += 1
                recorder.after_backward(step)
            optimizer.step()
            optimizer.zero_grad()
    other, expected = plain_loop(model.seen, every=2)
    records = read_records(tmp_path / "tails.jsonl")
    assert records == expected
    assert_equal_weights(model, other)
    assert kept.rows == [(s, scalars([r for r in records if r.step == s])) for s in (1, 2, 4, 6)]


# TensorBoard


def test_tensorboard_gets_scalars_and_histograms(tmp_path):
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    writer = tensorboard.SummaryWriter(tmp_path)
    model = make_net()
    weights, records, number = {}, [], 12
    sink = to_tensorboard(writer, model, histogram_every=5)
    recorder = TailRecorder(model, every=2, sinks=[sink, lambda step, rows: records.extend(rows)])
    for step in range(1, number + 1):
        nn.functional.cross_entropy(model(X[:8]), Y[:8]).backward()
        weights[step] = {n: float_weight(layer).detach().clone() for n, layer, _ in wnq.quantized_layers(model)}
        recorder.after_backward(step)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
        model.zero_grad()
    writer.close()
    found = events(tmp_path)
    assert set(found.Tags()["scalars"]) == set(scalars(records))
    for layer in ("0", "2", "4"):
        for statistic in ("crest", "relative_error", "pull", "nonfinite"):
            points = [(p.step, p.value) for p in found.Scalars(f"{statistic}/{layer}")]
            assert points == [(r.step, np.float32(getattr(r, statistic))) for r in records if r.layer == layer]
        histograms = found.Histograms(f"weights_per_rms/{layer}")
        assert [event.step for event in histograms] == [1, 6, 12]
        for event in histograms:
            w = weights[event.step][layer].double().numpy().ravel()
            u, made = w / np.sqrt((w**2).mean()), event.histogram_value
            assert (made.num, sum(made.bucket)) == (w.size, w.size)
            assert (made.min, made.max) == (pytest.approx(u.min(), rel=1e-12), pytest.approx(u.max(), rel=1e-12))
            # Two ways to round sums of 18 to 64 float64 numbers near 1; the sum may cancel to near zero.
            assert made.sum == pytest.approx(u.sum(), abs=1e-12 * w.size)
            assert made.sum_squares == pytest.approx((u**2).sum(), rel=1e-12)
            limits = np.array(made.bucket_limit)
            edges = np.concatenate([[2 * limits[0] - limits[1]], limits])
            assert (np.histogram(u, edges)[0] == made.bucket).all()


def test_tensorboard_histograms_of_odd_weights(tmp_path):
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    model = make_net()
    with torch.no_grad():
        float_weight(model[0]).fill_(0.0)
        float_weight(model[2])[0, 0], float_weight(model[2])[1, 1] = math.nan, math.inf
        float_weight(model[4]).fill_(math.nan)
    writer = tensorboard.SummaryWriter(tmp_path)
    TailRecorder(model, sinks=[to_tensorboard(writer, model)]).after_backward(1)
    writer.close()
    found = events(tmp_path)
    zeros, some = (found.Histograms(f"weights_per_rms/{layer}")[0].histogram_value for layer in ("0", "2"))
    assert (zeros.num, zeros.min, zeros.max, zeros.sum, zeros.sum_squares) == (48, 0, 0, 0, 0)
    assert (some.num, sum(some.bucket)) == (62, 62) and some.sum_squares == pytest.approx(62, rel=1e-12)
    assert [found.Scalars(f"nonfinite/{layer}")[0].value for layer in ("0", "2", "4")] == [0, 2, 24]
    assert found.Tags()["histograms"] == ["weights_per_rms/0", "weights_per_rms/2"]
    assert "relative_error/2" not in found.Tags()["scalars"]


@pytest.mark.slow
def test_wnq_train_records_into_its_trackers(tmp_path):
    pytest.importorskip("tensorboard")
    pytest.importorskip("sklearn")
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, log_with="tensorboard", project_dir=tmp_path)
    accelerator.init_trackers("logs")
    data = wnq.load_data("digits")
    torch.manual_seed(0)
    model = wnq.build_model("digits_cnn")
    wnq.quantize_(model, make_plan(model, wnq.get_method("wnq", w_bits=3, a_bits=3)))
    config = wnq.TrainConfig(epochs=2, batch_size=512, lr=0.05, record_every=2)
    start = {n: tensor_stats(float_weight(layer)) for n, layer, _ in wnq.quantized_layers(model)}
    wnq.fit(model, data, config, out=tmp_path / "run", accelerator=accelerator)
    accelerator.end_training()
    records = read_records(tmp_path / "run" / "tails.jsonl")
    found = events(tmp_path / "logs")
    for layer, stats in start.items():
        own = [r for r in records if r.layer == layer]
        assert [r.step for r in own] == [1, 2, 4] and own[0].crest == stats.crest
        assert [(p.step, p.value) for p in found.Scalars(f"crest/{layer}")] == [
            (r.step, np.float32(r.crest)) for r in own
        ]
        (histogram,) = found.Histograms(f"weights_per_rms/{layer}")
        assert (histogram.step, histogram.histogram_value.num) == (1, stats.parameters)
    assert [p.step for p in found.Scalars("val_accuracy")] == [1, 2]


# Names and mistakes


def test_scalars_by_layer_and_as_medians():
    model = make_net()
    records = TailRecorder(model).after_backward(1)
    layers = scalars(records)
    assert {name.split("/")[0] for name in layers} == {
        *("nonfinite", "peak", "rms", "crest", "kurtosis", "tail_mass"),
        *("relative_error", "law_error", "rescaled_error"),
    }  # without a gradient there is no pull
    assert layers["crest/2"] == records[1].crest and len(layers) == 9 * 3
    medians = scalars(records, "medians")
    assert medians["crest/median"] == sorted(r.crest for r in records)[1]
    assert medians["nonfinite/sum"] == 0 and len(medians) == 9
    assert scalars(records, "none") == {}


def test_mistakes_say_what_to_do(monkeypatch):
    expected = "log must be one of 'layers', 'medians', 'none', got 'all'"
    for make in (
        lambda: scalars([], "all"),
        lambda: lightning_callback(log="all"),
        lambda: transformers_callback(None, log="all"),
        lambda: to_trackers(None, log="all"),
    ):
        with pytest.raises(ValueError, match=expected):
            make()
    with pytest.raises(ValueError, match="histogram_every must be at least 1 step, got 0"):
        to_tensorboard(None, histogram_every=0)
    for name in ("lightning.pytorch", "pytorch_lightning", "transformers"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModuleNotFoundError, match="pip install lightning"):
        lightning_callback()
    with pytest.raises(ModuleNotFoundError, match="pip install -U transformers"):
        transformers_callback(None)
