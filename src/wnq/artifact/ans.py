"""Codes near their entropy: asymmetric numeral systems with a table of integer counts a layer.

A stream is one byte ``w``, ``2**bits`` counts of ``w`` bits each, and 32-bit little-endian words. From the counts ``q``, integer
arithmetic alone gives each code its share of ``2**24``: with ``e[i] = 2**24 * (q[0] + … + q[i-1]) // sum(q)`` and ``m = 2**bits``,
code ``i`` owns ``[left[i], left[i+1])``, where ``left[i] = (e[i] * (2**24 - m) >> 24) + i``. The words are those of the package
constriction's ``AnsCoder``, whose floating-point model comes to the same integers: it is given dyadic fractions, whose products and
sums fit the 53 bits of a double, so that nothing is ever rounded. Decoding therefore needs no particular floats, nor constriction:
docs/format.md decodes with integers only.

References:
    J. Duda, *Asymmetric numeral systems*, 2013, arXiv:1311.2540; R. Bamler, *Understanding Entropy Coding With Asymmetric
    Numeral Systems (ANS)*, 2022, arXiv:2201.01741 (constriction).
"""

from typing import Any

import numpy as np
import numpy.typing as npt

Codes = npt.NDArray[np.uint8]
_Integers = npt.NDArray[np.int64]

_TOTAL = 1 << 24
_WIDTHS = range(1, 17)


def encode_ans(codes: Codes, bits: int) -> bytes:
    """Code a non-empty one-dimensional array of codes below ``2**bits``; the table has the width that costs least in all."""
    counts = np.bincount(codes, minlength=2**bits)
    width, table = min(((w, _rounded(counts, w)) for w in _WIDTHS), key=lambda pair: _cost(counts, *pair))
    coder = _stack().AnsCoder()
    coder.encode_reverse(codes.astype(np.int32), _model(table))
    stream = sum(int(count) << (i * width) for i, count in enumerate(table))
    words: npt.NDArray[np.uint32] = coder.get_compressed()
    return bytes([width]) + stream.to_bytes(_table_bytes(bits, width), "little") + words.astype("<u4").tobytes()


def decode_ans(stream: bytes, bits: int, count: int) -> Codes:
    """Undo :func:`encode_ans` for ``count`` codes, at least one. The stream is not trusted.

    Raises:
        ValueError: it is malformed, or does not end where the codes end.
    """
    width = stream[0] if stream else 0
    start = 1 + _table_bytes(bits, width)
    if width not in _WIDTHS or len(stream) < start or (len(stream) - start) % 4:
        raise ValueError("its table of counts is malformed")
    packed = int.from_bytes(stream[1:start], "little")
    table = np.array([packed >> (i * width) & ((1 << width) - 1) for i in range(2**bits)], np.int64)
    words = np.frombuffer(stream, "<u4", offset=start).astype(np.uint32)
    # constriction has no leading zero word, and would drop ours.
    if packed >> (2**bits * width) or not table.any() or (words.size and words[-1] == 0):
        raise ValueError("its table of counts is malformed")
    coder = _stack().AnsCoder(words)
    codes: npt.NDArray[np.int32] = coder.decode(_model(table), count)
    if not coder.is_empty():
        raise ValueError("its words do not end where the codes end")
    return codes.astype(np.uint8)


def _rounded(counts: _Integers, width: int) -> _Integers:
    """Scale counts to ``width`` bits, so that what occurs is not rounded to nothing."""
    largest = int(counts.max())
    most = min(largest, 2**width - 1)
    return np.where(counts > 0, np.maximum(1, (counts * most + largest // 2) // largest), 0)


def _edges(table: _Integers) -> _Integers:
    sums = np.concatenate([np.zeros(1, np.int64), np.cumsum(table)])
    return _TOTAL * sums // sums[-1]


def _cost(counts: _Integers, width: int, table: _Integers) -> float:
    """Return the length of a stream in bits."""
    m = counts.size
    lefts = (_edges(table) * (_TOTAL - m) >> 24) + np.arange(m + 1)
    return m * width + float(counts @ (24 - np.log2(np.diff(lefts))))


def _table_bytes(bits: int, width: int) -> int:
    return (2**bits * width + 7) // 8


def _model(table: _Integers) -> Any:
    """Return constriction's model; ``perfect=False`` is the rounding that the module's docstring gives."""
    return _constriction().stream.model.Categorical(np.diff(_edges(table)) / _TOTAL, perfect=False)


def _stack() -> Any:
    return _constriction().stream.stack


def _constriction() -> Any:
    import constriction  # pyright: ignore[reportMissingTypeStubs]

    return constriction
