"""The arm without normalization: the start's grid, whatever the weights do."""

import numpy as np
import pytest
import torch

import wnq
from wnq.testing import LAWS

WEIGHT = torch.from_numpy(np.random.default_rng(0).standard_t(4, size=(6, 5, 3)))


@pytest.mark.parametrize("grid", ["full", "symmetric"])
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_the_first_step_is_that_of_wnq(bits, grid):
    fixed = wnq.get_method("fixed", w_bits=bits, grid=grid).weight(WEIGHT, 0)
    plain = wnq.get_method("wnq", w_bits=bits, grid=grid).weight(WEIGHT, 0)
    assert torch.equal(fixed(WEIGHT), plain(WEIGHT))


def test_the_range_stays_and_its_ends_hold_what_grows_beyond():
    start = torch.tensor([[-0.5, 0.1], [0.25, 1.0]], dtype=torch.float64)
    quantizer = wnq.get_method("fixed", w_bits=2).weight(start, 0)
    later = torch.tensor([[-3.0, 0.1], [0.25, 0.2]], dtype=torch.float64, requires_grad=True)
    values = quantizer(later)
    # Levels of the start's grid: -1, -1/3, 1/3, 1.
    assert np.abs(values.detach().numpy() - [[-1, 1 / 3], [1 / 3, 1 / 3]]).max() < 1e-15
    values.sum().backward()
    assert (later.grad == 1).all()
    quantizer.reset_(later)
    assert quantizer(later.detach()).abs().max() == 3


def test_one_range_a_channel():
    quantizer = wnq.get_method("fixed", w_bits=3, granularity="channel").weight(WEIGHT, 0)
    peaks = WEIGHT.abs().amax((1, 2))
    assert torch.equal(quantizer.peak, peaks)
    assert torch.allclose(quantizer(WEIGHT).abs().amax((1, 2)), peaks, rtol=1e-15, atol=0)


@pytest.mark.parametrize("law", [law for law in LAWS if law.__name__ != "compiles"], ids=lambda law: law.__name__)
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_laws(law, granularity):
    law(lambda weight: wnq.get_method("fixed", w_bits=3, granularity=granularity).weight(weight, 0))


def test_it_refuses_a_normalizer_and_a_bad_grid():
    with pytest.raises(ValueError, match="without one"):
        wnq.get_method("fixed", normalize="max_abs")
    with pytest.raises(ValueError, match="grid must be one of"):
        wnq.get_method("fixed", grid="half")
