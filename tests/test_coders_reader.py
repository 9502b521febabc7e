"""The format page's reader, run as it stands there, reads what the library writes."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import wnq
from helpers_artifact import CODERS, net

PAGE = Path(__file__).resolve().parent.parent / "docs" / "format.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)


def reader(blocks: list[str]) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(compile("\n".join(blocks), str(PAGE), "exec"), names)
    return names


def test_the_reader_is_short_and_needs_no_library_of_ours() -> None:
    assert [len([line for line in block.splitlines() if line.strip()]) <= 42 for block in BLOCKS] == [True, True]
    assert not re.search(r"import (wnq|torch|safetensors|constriction)", "".join(BLOCKS))


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("coder", CODERS)
def test_it_reads_every_width(coder: str, bits: int, tmp_path: Path) -> None:
    torch.manual_seed(bits)
    model = wnq.build_model("digits_cnn")
    wnq.quantize_(model, wnq.make_plan(model, wnq.get_method("wnq", w_bits=bits, a_bits=32)))
    check(model, tmp_path / "m.safetensors", coder)


@pytest.mark.parametrize("coder", CODERS)
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("wnq", {"granularity": "channel", "grid": "symmetric"}),  # shifted codes, a transposed convolution
        ("wnq", {"granularity": "channel", "scale": "learned"}),
        ("lqnets", {"w_bits": 2}),  # free levels, a row a channel
        ("apot", {"w_bits": 4}),
        ("twn", {}),
    ],
)
def test_it_reads_every_kind_of_codebook(method: str, options: dict[str, Any], coder: str, tmp_path: Path) -> None:
    check(net(method, **options), tmp_path / "m.safetensors", coder)


def check(model: nn.Module, path: Path, coder: str) -> None:
    wnq.save(model, path, coder=coder)
    weights, others = reader(BLOCKS[: 1 if coder == "none" else 2])["read"](path)
    expected = wnq.unpack_file(path)
    assert weights.keys() == {name for name, _, _ in wnq.quantized_layers(model)}
    for layer, values in weights.items():
        assert values.dtype == np.float32
        assert np.array_equal(values, expected[f"{layer}.weight"].numpy())
    rest = {key for key in expected if key.removesuffix(".weight") not in weights and key != "second.weight"}
    assert rest and all(np.array_equal(others[key], expected[key].numpy()) for key in rest)
