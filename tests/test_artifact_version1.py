"""A file of format version 1, written when that was the format, still loads to what it said then."""

import json
import math
from pathlib import Path

import numpy as np
import torch
from torch import nn

from wnq.artifact import inspect_file, load, save, unpack_file

FILE = Path(__file__).parent / "fixtures" / "version1.safetensors"

# The logits that the saved model gave.
LOGITS = [
    [0.03818793594837189, -0.2177136093378067, -0.08145243674516678, 0.05656057596206665, 0.05395540967583656],
    [-0.2000114917755127, -0.12465513497591019, -0.29315564036369324, 0.1720234751701355, 0.12449377030134201],
]


def build() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.ConvTranspose2d(4, 3, 2, bias=False),
        nn.Flatten(),
        nn.Linear(75, 5),
    )


def reference() -> dict[str, np.ndarray]:
    """Decode the weights by the format's first definition: one dense stream a layer, in the weight's own order."""
    data = FILE.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    table = json.loads(data[8:start])
    document = json.loads(table.pop("__metadata__")["wnq"])
    assert document["format_version"] == 1
    pieces = {name: data[start + e["data_offsets"][0] : start + e["data_offsets"][1]] for name, e in table.items()}
    small, used = {}, {}
    for module, number in document["small"]["modules"]:
        for name, (dtype, shape) in sorted(document["small"]["kinds"][number].items()):
            begin, used[dtype] = used.get(dtype, 0), used.get(dtype, 0) + math.prod(shape)
            values = np.frombuffer(pieces[f"small.{dtype}"], dtype)
            small[f"{module}.{name}"] = values[begin : used[dtype]].reshape(shape)
    weights = {}
    for layer, number in document["plan"]["layers"]:
        kind = document["plan"]["kinds"][number]
        bits, shape, axis = kind["bits"], kind["shape"], kind["axis"]
        stream = int.from_bytes(pieces[f"{layer}.weight_packed"], "little")
        codes = np.array([(stream >> (j * bits)) & ((1 << bits) - 1) for j in range(math.prod(shape))]).reshape(shape)
        if f"{layer}.weight_grid" in small:
            first, distance, _ = small[f"{layer}.weight_grid"].astype(int)
            values = (first + distance * codes).astype(np.float32)
        else:
            rows = small[f"{layer}.weight_levels"]
            values = np.stack([row[code] for row, code in zip(rows, np.moveaxis(codes, axis, 0), strict=True)])
        scale = small[f"{layer}.weight_scale"]
        weights[layer] = values * (
            scale.reshape([-1 if d == axis else 1 for d in range(len(shape))]) if scale.ndim else scale
        )
    return weights


def test_it_has_the_weights_that_its_own_definition_gives() -> None:
    state, expected = unpack_file(FILE), reference()
    assert expected.keys() == {"0", "3", "5"}  # per tensor and channel, a transposed convolution, a free codebook
    for layer, values in expected.items():
        assert np.array_equal(state[f"{layer}.weight"].numpy(), values)


def test_it_gives_the_logits_that_its_model_gave() -> None:
    logits = load(FILE, build())(torch.linspace(-2, 2, 144).reshape(2, 2, 6, 6))
    # Another build of torch may add in another order.
    assert torch.allclose(logits, torch.tensor(LOGITS), rtol=0, atol=1e-6)


def test_it_can_be_inspected_and_becomes_a_file_of_today(tmp_path: Path) -> None:
    report = inspect_file(FILE)
    assert (report.file_bytes, report.packed_bytes, report.coder) == (2790, 72 + 18 + 94, "none")
    assert {layer.method for layer in report.layers} == {"bits"}
    for coder in ("none", "zstd", "ans"):
        save(load(FILE, build()), tmp_path / "new.safetensors", coder=coder)
        new = unpack_file(tmp_path / "new.safetensors")
        old = unpack_file(FILE)
        assert new.keys() == old.keys()
        assert all(torch.equal(new[key], old[key]) for key in old)
