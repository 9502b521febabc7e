"""Tables of thresholds and values, against the quantizers that they stand for."""

import pytest
import torch
from torch import nn

from wnq.activations import input_builder, list_inputs
from wnq.integer import input_grid
from wnq.integer.tables import InputTable, input_table
from wnq.quantizer import CodebookQuantizer, Quantizer


def started(name, bits):
    quantizer = input_builder(name, bits)()
    g = torch.Generator().manual_seed(bits)
    quantizer.train()
    quantizer.observe_(torch.randn(4, 64, generator=g).abs())
    return quantizer.eval()


CASES = [(info.name, bits) for info in list_inputs() for bits in info.widths if bits in (1, 2, 4)]


@pytest.mark.parametrize(("name", "bits"), CASES, ids=[f"{n}{b}" for n, b in CASES])
def test_a_table_gives_what_its_quantizer_gives(name, bits):
    quantizer = started(name, bits)
    table = input_table(quantizer)
    g = torch.Generator().manual_seed(1)
    x = torch.cat([torch.randn(20_000, generator=g) * 10.0**p for p in (-3, -1, 0, 1)])
    expected = quantizer(x)
    if table is None:
        assert input_grid(quantizer)[0] is not None  # no step function of one element to float32's last bit
    else:
        assert torch.equal(table(x), expected)
        assert torch.equal(table.values, table.values.sort().values)
        assert len(table.values) <= 2**bits


@pytest.mark.parametrize("name", ["sign", "lqnets", "abcnet", "tbn"])
def test_inputs_without_a_grid_have_a_table(name):
    bits = next(info for info in list_inputs() if info.name == name).widths[0]
    quantizer = started(name, bits)
    if input_grid(quantizer)[0] is None:
        assert isinstance(input_table(quantizer), InputTable)


def test_thresholds_are_exact_to_the_last_bit():
    levels = torch.tensor([-1.0, 0.25, 0.5, 2.0])
    table = input_table(CodebookQuantizer(levels, torch.tensor(1.0), 2))
    middles = (levels[1:] + levels[:-1]) / 2
    below = torch.nextafter(table.thresholds, torch.tensor(-torch.inf))
    assert torch.equal(table.values, levels)
    # A tie may go either way, so a threshold is the middle or the next number above it.
    assert torch.all((table.thresholds == middles) | (below == middles))


def test_positive_is_asked_as_above_zero():
    """A smallest number of 1.4e-45 is zero to engines that flush denormals."""
    table = input_table(started("sign", 1))
    assert table(torch.tensor([-1.0, 0.0, 1e-30])).tolist() == [-1, -1, 1]
    exported = torch.export.export(table, (torch.zeros(3),)).graph_module.code
    assert "gt" in exported
    assert ".ge" not in exported


class Company(Quantizer):
    """Its step depends on all of the values."""

    bits = 2

    def encode(self, x):
        raise NotImplementedError

    def quantize(self, x):
        return CodebookQuantizer(torch.tensor([-1.0, 0.0, 1.0]), x.abs().amax().clamp(min=1e-3), 2).quantize(x)

    def forward(self, x):
        return self.quantize(x).dequantize()


class Down(Company):
    """Falls where its input rises."""

    def quantize(self, x):
        return CodebookQuantizer(torch.tensor([-1.0, 0.0, 1.0]), torch.tensor(1.0), 2).quantize(-x)


@pytest.mark.parametrize("kind", [Company, Down])
def test_what_is_no_ascending_step_function_has_no_table(kind):
    quantizer = kind()
    assert isinstance(quantizer, nn.Module)
    assert input_table(quantizer) is None
