"""Sizes of packed files, against the goals and against what can be counted without them."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import entropy as scipy_entropy

import wnq
from helpers_artifact import CODERS, Net, content_of, net, trained
from wnq.artifact import inspect_file, save
from wnq.models import registered_model


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_size_of_a_resnet20_is_within_its_bounds(bits: int, path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 32, 32)
    model = trained(registered_model("resnet20"), wnq.get_method("wnq", w_bits=bits, a_bits=bits), x)
    for coder in CODERS:
        report = save(model, path, coder=coder)
        rest = report.float_bytes - 4 * report.weights
        assert report.file_bytes <= 1.02 * (report.ideal_bytes + rest) + 16 * 1024
        assert report.file_bytes <= 1.15 * bits / 32 * 4 * report.weights + 30_000
        if coder == "ans":
            assert report.packed_bytes <= 1.01 * report.entropy_bytes + 4096


@pytest.mark.parametrize("coder", CODERS)
def test_the_report_adds_up(coder: str, path: Path) -> None:
    model = net(w_bits=3, granularity="channel")
    report = save(model, path, coder=coder)
    assert report == inspect_file(path)
    assert report.file_bytes == path.stat().st_size
    assert report.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert report.file_bytes == (
        report.packed_bytes + report.scale_bytes + report.codebook_bytes + report.rest_bytes + report.header_bytes
    )
    assert report.packed_bytes == sum(row.packed_bytes for row in report.layers)
    rows = {row.name: row for row in report.layers}
    assert list(rows) == ["stem", "up", "first", "head"]  # "second" is tied to "first"
    content = content_of(path)
    assert report.scale_bytes == sum(4 * quantized.scale.numel() for quantized in content.quantized.values())
    assert (rows["stem"].bits, rows["up"].bits, rows["head"].bits) == (8, 3, 8)
    assert rows["up"].shape == (8, 8, 2, 2)
    if coder == "none":
        assert {row.method for row in report.layers} == {"rows"}
        assert rows["up"].packed_bytes == 8 * 4 * (8 * 2 * 2 * 3 // 32)  # eight rows of three words
        assert rows["stem"].packed_bytes == 8 * 4 * 7  # 27 bytes a row, filled up to seven words
    assert rows["up"].bits_per_weight == 8 * rows["up"].packed_bytes / 256
    assert rows["up"].float_bytes == 256 * 4
    counts = np.bincount(content.quantized["up"].codes.flatten())
    assert rows["up"].entropy == pytest.approx(scipy_entropy(counts, base=2), abs=1e-12)  # another order of summation
    assert report.ideal_bytes == sum(row.weights * row.bits for row in report.layers) / 8
    assert report.entropy_bytes == pytest.approx(sum(row.weights * row.entropy for row in report.layers) / 8, abs=1e-9)
    unique = {id(t): t for t in Net().state_dict(keep_vars=True).values()}
    assert report.float_bytes == sum(t.nbytes for t in unique.values())
    assert report.ratio == report.float_bytes / report.file_bytes
