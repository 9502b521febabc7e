"""Every example of the page on monitoring runs, and records."""

import copy
import json
import re
import statistics
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import wnq
from wnq.integrations.naming import STATISTICS
from wnq.plan import make_plan
from wnq.recorder import read_records
from wnq.train import TrainConfig

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "monitoring.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S))


def blocks(section):
    return re.findall(r"^```python\n(.*?)^```", SECTIONS[section], re.M | re.S)


def names():
    torch.manual_seed(0)
    model = wnq.build_model("digits_mlp")
    wnq.quantize_(model, make_plan(model, wnq.get_method("wnq", w_bits=3, a_bits=3)))
    images, labels = torch.randn(64, 1, 8, 8), torch.randint(0, 10, (64,))
    return {
        "torch": torch,
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.05),
        "loader": DataLoader(TensorDataset(images, labels), batch_size=8),
    }


def run(section, known, block=0):
    exec(compile(blocks(section)[block], f"monitoring, {section}", "exec"), known)
    return known


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_block_is_run_here():
    assert {section: len(blocks(section)) for section in SECTIONS if blocks(section)} == {
        "A loop of your own": 2,
        "Lightning": 1,
        "The Trainer of transformers": 1,
        "accelerate": 1,
        "TensorBoard": 1,
    }


def test_a_loop_of_your_own(capsys):
    known = run("A loop of your own", names())
    records = read_records("tails.jsonl")
    assert [r.layer for r in records] == [name for name, _, _ in wnq.quantized_layers(known["model"])]
    run("A loop of your own", {}, 1)
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()] == [["1", r.layer] for r in records]


def test_lightning():
    package = pytest.importorskip("lightning.pytorch")
    known = names()

    class Module(package.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = known["model"]

        def training_step(self, batch, _):
            return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.05)

    run("Lightning", known | {"module": Module()})
    assert {r.step for r in read_records("tails.jsonl")} == {1}


def test_the_trainer_of_transformers():
    pytest.importorskip("transformers")
    known = names()

    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = known["model"]

        def forward(self, images, labels):
            return {"loss": nn.functional.cross_entropy(self.net(images), labels)}

    data = [{"images": image, "labels": label} for image, label in known["loader"].dataset]
    known = run("The Trainer of transformers", known | {"model": Classifier(), "dataset": data})
    records = read_records("run/tails.jsonl")
    assert {r.step for r in records} == {1}
    assert [row["step"] for row in known["trainer"].state.log_history if "crest/median" in row] == [1]


def test_accelerate():
    accelerate = pytest.importorskip("accelerate")
    pytest.importorskip("tensorboard")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    known = run("accelerate", names())
    assert known["step"] == 4 and list(Path("run").rglob("events.out.tfevents.*"))
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def test_tensorboard():
    pytest.importorskip("tensorboard")
    known = run("TensorBoard", names())
    assert known["recorder"].after_backward(1)
    known["writer"].close()
    (path,) = Path("run").glob("events.out.tfevents.*")
    assert b"weights_per_rms" in path.read_bytes()


def test_the_page_describes_every_number_and_setting():
    rows = re.findall(r"^\| (`.+?) \|", SECTIONS["What the numbers mean"], re.M)
    assert sorted(re.findall(r"`(\w+)`", " ".join(rows))) == sorted(STATISTICS)
    assert "record_every" in SECTIONS["`wnq train`"] and TrainConfig(record_every=100).record_every == 100


def test_the_page_shows_results_that_are_there():
    (name,) = re.findall(r'^--8<-- "(.+)"$', PAGE, re.M)
    results = json.loads(
        (Path(__file__).parent.parent / "benchmarks" / "results" / name).with_suffix(".json").read_text()
    )
    rows = {row["net"]: row for row in results["rows"]}
    assert rows["resnet20, batch 128"]["ratio"] < 0.1 and rows["mlp of 50 M weights, batch 8"]["ratio"] < 1
    assert rows["digits_mlp, batch 32"]["ratio"] > 1
    for row in rows.values():
        if row["default"] is not None:
            assert max(row["default"]["cpu_share"], row["default"]["own_share"]) < 0.01


@pytest.mark.slow
def test_the_pull_reads_as_the_page_says():
    pytest.importorskip("sklearn")
    data = wnq.load_data("digits")
    torch.manual_seed(0)
    start = wnq.build_model("digits_cnn")
    wnq.fit(start, data, TrainConfig(epochs=3, batch_size=64, lr=0.05))
    ratios = {}
    for gain in (1.0, 0.0):
        model = copy.deepcopy(start)
        method = wnq.get_method("wnq", w_bits=2, a_bits=2, max_gain=gain)
        wnq.quantize_(model, make_plan(model, method))
        wnq.fit(model, data, TrainConfig(epochs=1, batch_size=64, lr=0.05, record_every=1), out=f"run{gain}")
        records = [r for r in read_records(f"run{gain}/tails.jsonl") if r.bits == 2]
        ratios[gain] = [r.pull / r.gradient_rms for r in records]
    assert len(ratios[1.0]) == len(ratios[0.0]) == 2 * 22
    # Tens of times the rms and above zero against about 1 of either sign; the bounds lie far from both.
    assert statistics.median(ratios[1.0]) > 10 and sum(value > 0 for value in ratios[1.0]) >= 0.9 * 44
    assert (
        statistics.median(map(abs, ratios[0.0])) < 3 and 0.1 * 44 < sum(value > 0 for value in ratios[0.0]) < 0.9 * 44
    )
