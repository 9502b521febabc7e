"""Codes of 1 to 8 bits as a dense byte stream, and back.

The layout is a little-endian bit stream: code ``j`` occupies bits ``[j * bits, (j + 1) * bits)``, least significant bit
first, where bit ``i`` is bit ``i % 8`` of byte ``i // 8``; the unused bits of the last byte are zero. Three-bit codes
5, 2 and 7::

    stream   101 010 111      (each code low bit first)
    bytes    0b11010101 0b00000001

Eight codes fill exactly ``bits`` bytes, so the work is done on 64-bit words that hold eight codes, one per byte.
Packing closes the gaps between neighbours in three steps (lanes of 16, 32, then 64 bits), unpacking opens them in the
mirror order; every step is a few whole-array operations on a block that stays in cache, in numpy and on one thread.

Rows of codes, each padded to whole 32-bit words, are the layout of compressed-tensors' ``pack-quantized`` files.
"""

import functools
import math
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from wnq.quantizer import check_bits

_Bytes = npt.NDArray[np.uint8]
_Words = npt.NDArray[np.uint64]

# Explicitly little-endian, so that byte j of a word is code j on every host.
_WORD = np.dtype("<u8")
# Words per block: two arrays of 128 KiB stay in a second-level cache, and each call is long beside its overhead.
_BLOCK = 16384


def packed_size(n: int, bits: int) -> int:
    """Return the number of bytes that ``n`` codes of ``bits`` bits take: ``ceil(n * bits / 8)``.

    Raises:
        ValueError: ``n`` is negative, or ``bits`` is not an integer from 1 to 8.
    """
    check_bits(bits, where="packed_size: bits")
    if n < 0:
        raise ValueError(f"packed_size: n must be 0 or more, got {n}.")
    return (n * bits + 7) // 8


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack codes densely, in row-major order.

    Args:
        codes: uint8 of any shape (0-dimensional, empty and non-contiguous included), values in ``[0, 2**bits)``.
        bits: width of a code, 1 to 8.

    Returns:
        uint8 ``(packed_size(codes.numel(), bits),)`` on the device of ``codes``; never shares memory with it.

    Raises:
        ValueError: ``codes`` is not uint8 or holds a code of ``2**bits`` or more, or ``bits`` is not from 1 to 8.
    """
    check_bits(bits, where="pack_codes: bits")
    _check_uint8(codes, where="pack_codes: codes")
    flat: _Bytes = codes.detach().cpu().contiguous().reshape(-1).numpy()
    if bits == 8:
        return torch.from_numpy(flat.copy()).to(codes.device)
    n_words = (flat.size + 7) // 8
    packed = np.empty(n_words * bits, np.uint8)
    words, scratch = np.empty(_BLOCK, _WORD), np.empty(_BLOCK, _WORD)
    for start, count in _blocks(n_words):
        block = flat[start * 8 : (start + count) * 8]
        if (largest := int(block.max())) >= 2**bits:
            raise ValueError(
                f"pack_codes: codes of {bits} bits must be below {2**bits}, got {largest}; "
                f"pack with {largest.bit_length()} bits or more."
            )
        in_bytes = words.view(np.uint8)
        in_bytes[: block.size] = block
        in_bytes[block.size : count * 8] = 0
        _close_gaps(words[:count], scratch[:count], bits)
        # The low bytes of each word as one opaque item of that size: one strided copy instead of a loop over rows.
        low = np.ndarray((count,), f"V{bits}", words, strides=(8,))
        np.ndarray((count,), f"V{bits}", packed, offset=start * bits)[...] = low
    return torch.from_numpy(packed[: packed_size(flat.size, bits)]).to(codes.device)


def unpack_codes(packed: Tensor, bits: int, shape: Sequence[int]) -> Tensor:
    """Undo :func:`pack_codes`.

    Args:
        packed: uint8 ``(packed_size(prod(shape), bits),)``.
        bits: width of a code, 1 to 8.
        shape: shape of the codes.

    Returns:
        uint8 of that shape, values in ``[0, 2**bits)``, on the device of ``packed``; never shares memory with it.

    Raises:
        ValueError: ``packed`` is not a one-dimensional uint8 tensor of the length that ``shape`` needs, a bit after the
            last code is set, ``shape`` has a negative dimension, or ``bits`` is not from 1 to 8.
    """
    check_bits(bits, where="unpack_codes: bits")
    _check_uint8(packed, where="unpack_codes: packed")
    shape = tuple(shape)
    if any(d < 0 for d in shape):
        raise ValueError(f"unpack_codes: the dimensions of shape must be 0 or more, got {shape}.")
    n = math.prod(shape)
    expected = packed_size(n, bits)
    if packed.ndim != 1 or packed.numel() != expected:
        raise ValueError(
            f"unpack_codes: {n} codes of shape {shape} at {bits} bits take packed bytes of shape ({expected},), "
            f"got {tuple(packed.shape)}; give the shape and bits that the codes were packed with."
        )
    stream: _Bytes = packed.detach().cpu().contiguous().numpy()
    used = n * bits % 8
    if used and stream[-1] >> used:
        raise ValueError(
            f"unpack_codes: the last {8 - used} bits of the stream must be zero, got a last byte of {int(stream[-1])}; "
            "the bytes are damaged or were not written by pack_codes."
        )
    if bits == 8:
        return torch.from_numpy(stream.copy()).reshape(shape).to(packed.device)
    n_words = (n + 7) // 8
    codes = np.empty(n_words * 8, np.uint8)
    words, scratch = codes.view(_WORD), np.empty(_BLOCK, _WORD)
    for start, count in _blocks(n_words):
        # Eight bytes are read at every step of `bits` bytes: the last words read past the end of the stream.
        size = (count - 1) * bits + 8
        piece = stream[start * bits : start * bits + size]
        if piece.size < size:
            piece = np.concatenate([piece, np.zeros(size - piece.size, np.uint8)])
        block = words[start : start + count]
        block[...] = np.ndarray((count,), _WORD, piece, strides=(bits,))
        _open_gaps(block, scratch[:count], bits)
    return torch.from_numpy(codes[:n]).reshape(shape).to(packed.device)


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """Pack each row of a matrix by itself, in the ``pack-quantized`` layout of the package compressed-tensors.

    A row is the stream of :func:`pack_codes`, filled up with zero bits to whole words. compressed-tensors' own
    ``unpack_from_int32`` returns ``codes - 2**(bits - 1)``.

    Args:
        codes: uint8 ``(rows, columns)``, values in ``[0, 2**bits)``.
        bits: width of a code, 1 to 8.

    Returns:
        int32 ``(rows, row_words(columns, bits))`` on the device of ``codes``; little-endian when written to a file.

    Raises:
        ValueError: ``codes`` is no matrix, or as for :func:`pack_codes`.
    """
    if codes.ndim != 2:
        raise ValueError(f"pack_rows: codes must have 2 dimensions, got shape {tuple(codes.shape)}.")
    rows, columns = codes.shape
    words = row_words(columns, bits)
    # 32 codes fill exactly `bits` words.
    packed = pack_codes(torch.nn.functional.pad(codes, (0, -columns % 32)), bits)
    whole: npt.NDArray[np.int32] = packed.cpu().numpy().view("<i4").astype(np.int32)
    whole = whole.reshape(rows, (columns + 31) // 32 * bits)
    return torch.from_numpy(whole[:, :words].copy()).to(codes.device)


def unpack_rows(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Undo :func:`pack_rows`.

    Args:
        packed: int32 ``(rows, row_words(columns, bits))``.
        bits: width of a code, 1 to 8.
        columns: number of codes in a row.

    Returns:
        uint8 ``(rows, columns)``, values in ``[0, 2**bits)``, on the device of ``packed``.

    Raises:
        ValueError: ``packed`` is not an int32 matrix of the width that ``columns`` needs, or a bit after the last code of a
            row is set.
    """
    words = row_words(columns, bits)
    if packed.dtype != torch.int32 or packed.ndim != 2 or packed.shape[1] != words:
        raise ValueError(
            f"unpack_rows: rows of {columns} codes at {bits} bits take int32 of shape (rows, {words}), "
            f"got {packed.dtype} of shape {tuple(packed.shape)}."
        )
    rows, groups = packed.shape[0], (columns + 31) // 32
    whole = torch.nn.functional.pad(packed.detach().cpu(), (0, groups * bits - words))
    stream = torch.from_numpy(whole.numpy().astype("<i4").reshape(-1).view(np.uint8))
    codes = unpack_codes(stream, bits, (rows, groups * 32))
    if bool(codes[:, columns:].any()):
        raise ValueError(
            "unpack_rows: the bits after the last code of a row must be zero; "
            "the words are damaged or were not written by pack_rows."
        )
    return codes[:, :columns].contiguous().to(packed.device)


def row_words(columns: int, bits: int) -> int:
    """Return the number of 32-bit words that a row of ``columns`` codes takes: ``ceil(columns * bits / 32)``."""
    return (packed_size(columns, bits) + 3) // 4


def _blocks(n_words: int) -> Iterator[tuple[int, int]]:
    """Yield (first word, number of words) of each block."""
    for start in range(0, n_words, _BLOCK):
        yield start, min(_BLOCK, n_words - start)


@functools.cache
def _steps(bits: int) -> list[tuple[np.uint64, np.uint64, np.uint64, np.uint64]]:
    """Return (shift, masks of the lower half, the upper half closed, the upper half open) for lanes of 16, 32, 64."""

    def mask(width: int, ones: int, offset: int) -> np.uint64:
        return np.uint64(sum(((1 << ones) - 1) << (lane + offset) for lane in range(0, 64, width)))

    held = {width: bits * width // 16 for width in (16, 32, 64)}
    return [(np.uint64(w // 2 - h), mask(w, h, 0), mask(w, h, h), mask(w, h, w // 2)) for w, h in held.items()]


def _close_gaps(words: _Words, scratch: _Words, bits: int) -> None:
    """Move eight codes, one per byte, to the low ``8 * bits`` bits of their word, in place."""
    for shift, low, closed, _ in _steps(bits):
        np.right_shift(words, shift, out=scratch)
        np.bitwise_and(scratch, closed, out=scratch)
        np.bitwise_and(words, low, out=words)
        np.bitwise_or(words, scratch, out=words)


def _open_gaps(words: _Words, scratch: _Words, bits: int) -> None:
    """Undo :func:`_close_gaps`, in place; bits above the low ``8 * bits`` are ignored."""
    for shift, low, _, opened in reversed(_steps(bits)):
        np.left_shift(words, shift, out=scratch)
        np.bitwise_and(scratch, opened, out=scratch)
        np.bitwise_and(words, low, out=words)
        np.bitwise_or(words, scratch, out=words)


def _check_uint8(x: Tensor, *, where: str) -> None:
    if x.dtype != torch.uint8:
        raise ValueError(f"{where} must be a uint8 tensor, got {x.dtype}; convert integer codes with .to(torch.uint8).")
