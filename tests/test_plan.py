"""The plan: who gets what, as data, as a table, as JSON."""

import json

import pytest
import torch
from torch import nn

import wnq
from wnq.plan import FloatLayer, Plan
from wnq.plan_table import plan_rows


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.layer1 = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 1))
        self.attention = nn.MultiheadAttention(8, 2)
        self.rnn = nn.LSTM(8, 8)
        self.scale = nn.PReLU()
        self.fc = nn.Linear(8, 10)


METHOD = wnq.get_method("wnq", w_bits=3, a_bits=2, max_gain=0.5)


def method_of(plan, name):
    return plan[name].options["w_bits"], plan[name].options["a_bits"], plan[name].options["grid"]


def test_first_and_last_get_eight_bits_and_unsupported_layers_are_listed_with_a_reason():
    plan = wnq.make_plan(Net(), METHOD)
    assert [layer.name for layer in plan.layers] == ["stem", "layer1.0", "layer1.1", "fc"]
    assert method_of(plan, "stem") == method_of(plan, "fc") == (8, 8, "symmetric")
    assert plan["stem"].options["max_gain"] == 0.5  # the arm keeps its gain on every layer
    assert method_of(plan, "layer1.0") == (3, 2, "full")
    reasons = {left.name: left.reason for left in plan.floats}
    assert set(reasons) == {"norm", "attention", "rnn", "scale"}
    assert "not supported yet" in reasons["attention"] and "not supported yet" in reasons["rnn"]
    assert reasons["norm"] == "normalization"
    listed = sum(layer.parameters for layer in plan.layers) + sum(left.parameters for left in plan.floats)
    biases = sum(m.bias.numel() for m in Net().modules() if isinstance(m, (nn.Conv2d, nn.Linear)) and m is not None)
    biases -= Net().attention.out_proj.bias.numel()
    assert listed + biases == sum(p.numel() for p in Net().parameters())


def test_rivals_get_the_same_plain_boundary_layers():
    for name in ("lsq", "dorefa", "minmax", "bwn"):
        stem = wnq.make_plan(Net(), wnq.get_method(name, a_bits=3))["stem"]
        assert (stem.name, stem.w_bits, stem.a_bits, stem.options["max_gain"]) == ("wnq", 8, 8, 0.0)
    weights_only = wnq.make_plan(Net(), wnq.get_method("wnq", w_bits=2, a_bits=32))["stem"]
    assert (weights_only.w_bits, weights_only.a_bits) == (8, 32)


def test_first_last_bits_can_be_changed_switched_off_or_float():
    assert method_of(wnq.make_plan(Net(), METHOD, first_last_bits=4), "fc") == (4, 4, "symmetric")
    assert method_of(wnq.make_plan(Net(), METHOD, first_last_bits=None), "fc") == (3, 2, "full")
    left = wnq.make_plan(Net(), METHOD, first_last_bits=32).floats
    assert {f.name: f.reason for f in left}["stem"] == "32 bits as asked"
    with pytest.raises(ValueError, match=r"first_last_bits .* from 1 to 8, got 16"):
        wnq.make_plan(Net(), METHOD, first_last_bits=16)


def test_wildcards_mixed_widths_and_precedence():
    four = METHOD.with_options(w_bits=4)
    two = METHOD.with_options(w_bits=2)
    plan = wnq.make_plan(Net(), METHOD, keep_float=["f?"], override={"layer1.*": four, "layer1.1": two, "stem": two})
    assert (plan["layer1.0"].w_bits, plan["layer1.1"].w_bits, plan["stem"].w_bits) == (4, 2, 2)
    assert FloatLayer("fc", "Linear", 90, "kept float as asked") in plan.floats
    model = Net()
    wnq.quantize_(model, plan)
    assert model.layer1[1].weight.unique().numel() <= 4


def test_the_table_has_a_line_for_every_layer_and_the_totals():
    plan = wnq.make_plan(Net(), METHOD)
    text = wnq.format_plan(plan)
    lines = text.splitlines()
    assert len(lines) == 1 + len(plan.layers) + len(plan.floats) + 1
    assert lines[0].split() == ["layer", "shape", "method", "W/A", "input", "parameters", "KiB", "note"]
    assert "8x8x3x3" in lines[2] and "3/2" in lines[2] and "576" in lines[2] and "0.21" in lines[2]
    assert lines[-1].startswith("936 weights in 4 layers")
    assert [row["layer"] for row in plan_rows(plan)][:4] == ["stem", "layer1.0", "layer1.1", "fc"]


def test_json_round_trip(tmp_path):
    plan = wnq.make_plan(Net(), METHOD, override={"layer1.0": wnq.get_method("twn", threshold=0.75)})
    plan.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json")
    assert again == plan
    data = json.loads((tmp_path / "plan.json").read_text())
    data["layers"][1]["options"]["threshold"] = 0.8  # a person edits the file
    assert Plan.from_json(data)["layer1.0"].options["threshold"] == 0.8


@pytest.mark.parametrize(("edit", "message"), [
    (lambda d: d.pop("layers"), "not a plan"),
    (lambda d: d["layers"][0].pop("method"), "not a plan"),
    (lambda d: d["layers"][0].update(method="wqn"), "unknown method 'wqn'. Did you mean 'wnq'"),
    (lambda d: d["layers"][0]["options"].update(w_bits=11), "from 1 to 8 \\(or 32 for float weights\\), got 11"),
    (lambda d: d["layers"][0]["options"].update(wbits=3), "no option 'wbits'"),
    (lambda d: d["layers"][0].update(shape=5), "not a plan"),
])  # fmt: skip
def test_bad_plan_files_are_explained(tmp_path, edit, message):
    data = wnq.make_plan(Net(), METHOD).to_json()
    edit(data)
    with pytest.raises(ValueError, match=message):
        Plan.from_json(data)
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ValueError, match=r"cannot read the plan .*bad.json"):
        Plan.load(tmp_path / "bad.json")
    with pytest.raises(ValueError, match=r"cannot read the plan .*none.json"):
        Plan.load(tmp_path / "none.json")


def test_patterns_that_match_nothing_name_the_closest_layer():
    with pytest.raises(
        ValueError, match=r"override pattern 'layer1.\*.covn' matches no quantizable layer. .*4 layers: stem"
    ):
        wnq.make_plan(Net(), METHOD, override={"layer1.*.covn": METHOD})
    with pytest.raises(ValueError, match=r"keep_float pattern 'stm' matches no quantizable layer. Did you mean 'stem'"):
        wnq.make_plan(Net(), METHOD, keep_float=["stm"])
    with pytest.raises(ValueError, match="matches no quantizable layer"):
        wnq.make_plan(Net(), METHOD, keep_float=["norm"])


def test_a_model_with_nothing_to_quantize_is_refused():
    with pytest.raises(ValueError, match="BatchNorm2d has nothing to quantize"):
        wnq.make_plan(nn.BatchNorm2d(3), METHOD)
    with pytest.raises(ValueError, match="Net has nothing to quantize"):
        wnq.make_plan(Net(), METHOD, keep_float=["*"])


def test_weight_norm_is_named():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)))
    with pytest.raises(ValueError, match="layer '0' is parametrized already"):
        wnq.make_plan(model, METHOD)


def test_a_single_layer_model():
    layer = nn.Linear(4, 3)
    plan = wnq.make_plan(layer, METHOD)
    assert plan.layers[0].name == "" and plan.layers[0].method.w_bits == 8
    wnq.quantize_(layer, plan)
    assert torch.isfinite(layer(torch.randn(2, 4))).all()
    assert "(model)" in wnq.format_plan(plan)
