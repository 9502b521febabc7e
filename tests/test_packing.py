"""Packing: agreement with a slow independent reference, exact round trips, and every error."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wnq.packing import pack_codes, packed_size, unpack_codes

WIDTHS = range(1, 9)


def reference_pack(codes: list[int], bits: int) -> list[int]:
    """The definition, on one Python integer: code j at bit j * bits."""
    stream = sum(code << (j * bits) for j, code in enumerate(codes))
    return list(stream.to_bytes(math.ceil(len(codes) * bits / 8), "little"))


def reference_unpack(packed: np.ndarray, bits: int, n: int) -> np.ndarray:
    """The definition, one bit per element."""
    stream = np.unpackbits(packed, bitorder="little")[: n * bits].reshape(n, bits)
    return (stream.astype(np.int64) << np.arange(bits)).sum(axis=1)


def random_codes(shape: tuple[int, ...], bits: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 2**bits, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@st.composite
def widths_and_codes(draw: st.DrawFn) -> tuple[int, torch.Tensor]:
    bits = draw(st.sampled_from(WIDTHS))
    shape = tuple(draw(st.lists(st.integers(0, 7), max_size=4)))
    n = math.prod(shape)
    codes = draw(st.lists(st.integers(0, 2**bits - 1), min_size=n, max_size=n))
    return bits, torch.tensor(codes, dtype=torch.uint8).reshape(shape)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(widths_and_codes())
def test_round_trip_and_reference_agree_for_any_shape(case: tuple[int, torch.Tensor]) -> None:
    bits, codes = case
    packed = pack_codes(codes, bits)
    assert packed.tolist() == reference_pack(codes.flatten().tolist(), bits)
    assert packed.shape == (packed_size(codes.numel(), bits),)
    back = unpack_codes(packed, bits, codes.shape)
    assert back.dtype == torch.uint8
    assert back.shape == codes.shape
    assert torch.equal(back, codes)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.sampled_from(WIDTHS), st.integers(0, 200), st.data())
def test_any_stream_unpacks_as_the_reference_says_and_packs_back(bits: int, n: int, data: st.DataObject) -> None:
    size = packed_size(n, bits)
    stream = np.frombuffer(data.draw(st.binary(min_size=size, max_size=size)), np.uint8).copy()
    if n * bits % 8:
        stream[-1] &= (1 << (n * bits % 8)) - 1
    codes = unpack_codes(torch.from_numpy(stream), bits, (n,))
    assert codes.tolist() == reference_unpack(stream, bits, n).tolist()
    assert pack_codes(codes, bits).tolist() == stream.tolist()


# 131,072 codes are one internal block: just below, exactly, just above and several of them.
@pytest.mark.parametrize("n", [131_071, 131_072, 131_073, 131_079, 300_001])
@pytest.mark.parametrize("bits", WIDTHS)
def test_sizes_around_the_internal_block(bits: int, n: int) -> None:
    codes = random_codes((n,), bits, seed=n)
    packed = pack_codes(codes, bits)
    assert np.array_equal(reference_unpack(packed.numpy(), bits, n), codes.numpy())
    assert torch.equal(unpack_codes(packed, bits, (n,)), codes)


def test_the_layout_is_the_documented_example() -> None:
    assert pack_codes(torch.tensor([5, 2, 7], dtype=torch.uint8), 3).tolist() == [0b11010101, 0b00000001]


@pytest.mark.parametrize("bits", WIDTHS)
def test_zero_dimensional_and_empty(bits: int) -> None:
    scalar = torch.tensor(2**bits - 1, dtype=torch.uint8)
    assert torch.equal(unpack_codes(pack_codes(scalar, bits), bits, ()), scalar)
    assert pack_codes(torch.empty(0, dtype=torch.uint8), bits).shape == (0,)
    assert unpack_codes(torch.empty(0, dtype=torch.uint8), bits, (3, 0, 2)).shape == (3, 0, 2)


@pytest.mark.parametrize("bits", WIDTHS)
def test_non_contiguous_codes_are_packed_in_row_major_order(bits: int) -> None:
    codes = random_codes((6, 5, 7), bits)
    for view in (codes.permute(2, 0, 1), codes[::2, 1:, ::3], codes[0, 0, 3:].expand(4, 4)):
        assert torch.equal(pack_codes(view, bits), pack_codes(view.clone(memory_format=torch.contiguous_format), bits))
        assert torch.equal(unpack_codes(pack_codes(view, bits), bits, view.shape), view)
    stride_two = torch.stack([pack_codes(codes, bits)] * 2, dim=1)[:, 0]
    assert torch.equal(unpack_codes(stride_two, bits, codes.shape), codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_results_are_independent_of_their_input(bits: int) -> None:
    codes = random_codes((40,), bits)
    kept = codes.clone()
    packed = pack_codes(codes, bits)
    back = unpack_codes(packed, bits, (40,))
    codes.zero_()
    packed.zero_()
    assert torch.equal(back, kept)


def test_packed_size_rounds_up() -> None:
    assert [packed_size(n, 3) for n in (0, 1, 2, 3, 8, 9)] == [0, 1, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="n must be 0 or more, got -1"):
        packed_size(-1, 3)


@pytest.mark.parametrize("bits", [0, 9, -1, True, 2.0, "3"])
def test_widths_outside_1_to_8_are_refused(bits: int) -> None:
    empty = torch.empty(0, dtype=torch.uint8)
    for call in (
        lambda: pack_codes(empty, bits),
        lambda: unpack_codes(empty, bits, (0,)),
        lambda: packed_size(0, bits),
    ):
        with pytest.raises(ValueError, match="bits must be an integer from 1 to 8, got"):
            call()


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.float32, torch.bool])
def test_only_uint8_is_accepted(dtype: torch.dtype) -> None:
    x = torch.zeros(8, dtype=dtype)
    with pytest.raises(ValueError, match=rf"pack_codes: codes must be a uint8 tensor, got {dtype}"):
        pack_codes(x, 3)
    with pytest.raises(ValueError, match=rf"unpack_codes: packed must be a uint8 tensor, got {dtype}"):
        unpack_codes(x, 8, (8,))


@pytest.mark.parametrize("position", [0, 131_080, 140_002])
@pytest.mark.parametrize("bits", range(1, 8))
def test_a_code_too_large_for_the_width_is_refused_wherever_it_is(bits: int, position: int) -> None:
    codes = random_codes((140_003,), bits)
    codes[position] = 2**bits
    message = f"codes of {bits} bits must be below {2**bits}, got {2**bits}; pack with {bits + 1} bits or more"
    with pytest.raises(ValueError, match=message):
        pack_codes(codes, bits)


def test_a_stream_that_does_not_fit_the_shape_is_refused() -> None:
    packed = pack_codes(random_codes((5, 3), 3), 3)
    with pytest.raises(
        ValueError, match=r"16 codes of shape \(16,\) at 4 bits take packed bytes of shape \(8,\), got \(6,\)"
    ):
        unpack_codes(packed, 4, (16,))
    with pytest.raises(ValueError, match=r"got \(1, 6\)"):
        unpack_codes(packed[None], 3, (5, 3))
    with pytest.raises(ValueError, match=r"dimensions of shape must be 0 or more, got \(-5, -3\)"):
        unpack_codes(packed, 3, (-5, -3))


@pytest.mark.parametrize("bits", range(1, 8))
def test_padding_bits_must_be_zero(bits: int) -> None:
    n = 9
    packed = pack_codes(random_codes((n,), bits), bits)
    for bit in range(n * bits % 8, 8):
        damaged = packed.clone()
        damaged[-1] |= 1 << bit
        with pytest.raises(ValueError, match=rf"the last {8 - n * bits % 8} bits of the stream must be zero"):
            unpack_codes(damaged, bits, (n,))
