"""The ways in which a layer's codes become bytes, and the choice among them.

===========  ============================================================================================================
``bits``     the stream of :func:`wnq.packing.pack_codes`: no package needed, and what the others must beat
``zstd``     one Zstandard frame of such a stream, at the width rounded up to 1, 2, 4 or 8 bits, so that no code straddles
             bytes; finds repetitions, such as channels that died in training
``ans``      :mod:`wnq.artifact.ans`: near the entropy of the codes' histogram at every width
===========  ============================================================================================================
"""

from collections.abc import Mapping
from typing import Any

import torch

from wnq.artifact.ans import Codes, decode_ans, encode_ans
from wnq.packing import pack_codes, packed_size, unpack_codes

CODERS: Mapping[str, tuple[str, ...]] = {"none": (), "zstd": ("bits", "zstd"), "ans": ("bits", "zstd", "ans")}
"""What a file may be written with -> the methods that compete for each of its layers; none: rows that are not coded."""

PACKAGES: Mapping[str, str] = {"zstd": "zstandard", "ans": "constriction"}
"""Method -> the package that it needs."""

# Level 1 comes near the entropy of codes without structure, at a hundred times the speed of level 19, which finds structure.
# It compresses more than the first 64 KiB only where it saves a tenth of them, and promises to beat the entropy coder.
_FAST, _THOROUGH = 1, 19
_PROBE, _WORTH = 1 << 16, 0.9


def versions(coder: str) -> dict[str, str]:
    """Return the versions of the packages that a coder uses.

    Raises:
        ModuleNotFoundError: one is not installed; the message says how to get it.
    """
    from importlib import import_module
    from importlib.metadata import version

    found: dict[str, str] = {}
    for method in CODERS[coder]:
        if method in PACKAGES:
            try:
                import_module(PACKAGES[method])
            except ModuleNotFoundError:
                raise missing(f"coder {coder!r}", method) from None
            found[PACKAGES[method]] = version(PACKAGES[method])
    return found


def missing(what: str, method: str) -> ModuleNotFoundError:
    """Return the error for a method whose package is not installed."""
    return ModuleNotFoundError(f'{what} needs {PACKAGES[method]}: pip install "wnq[pack]"', name=PACKAGES[method])


def encode(codes: Codes, bits: int, coder: str) -> tuple[str, bytes]:
    """Return the method that codes a one-dimensional array in the fewest bytes, and those bytes.

    Args:
        codes: values below ``2**bits``.
        bits: width of a code, 1 to 8.
        coder: ``zstd`` or ``ans``; see :data:`CODERS`.
    """
    streams = {"bits": _dense(codes, bits)}
    if codes.size:
        if "ans" in CODERS[coder]:
            streams["ans"] = encode_ans(codes, bits)
        streams["zstd"] = _zstd(_dense(codes, _aligned(bits)), beat=min(map(len, streams.values())))
    method = min(streams, key=lambda name: len(streams[name]))
    return method, streams[method]


def plain(codes: Codes, bits: int) -> tuple[str, bytes]:
    """Return codes by the method that needs no package."""
    return "bits", _dense(codes, bits)


def decode(method: str, stream: bytes, bits: int, count: int) -> Codes:
    """Return ``count`` codes. The stream is not trusted: no more is decoded than ``count`` codes take.

    Raises:
        ValueError: the stream is malformed; the message goes on where "a stream is damaged:" ends.
        ModuleNotFoundError: the method's package is not installed.
    """
    if method == "bits":
        return _undense(stream, bits, count)
    try:
        if method == "zstd":
            width = _aligned(bits)
            return _undense(_unzstd(stream, packed_size(count, width)), width, count)
        return decode_ans(stream, bits, count)
    except ModuleNotFoundError:
        raise missing(f"method {method!r}", method) from None


def _aligned(bits: int) -> int:
    """Return the smallest of 1, 2, 4 and 8 that holds ``bits``."""
    return 1 << (bits - 1).bit_length()


def _dense(codes: Codes, bits: int) -> bytes:
    return pack_codes(torch.from_numpy(codes), bits).numpy().tobytes()


def _undense(stream: bytes, bits: int, count: int) -> Codes:
    packed = torch.frombuffer(bytearray(stream), dtype=torch.uint8) if stream else torch.empty(0, dtype=torch.uint8)
    return unpack_codes(packed, bits, (count,)).numpy()


def _zstd(data: bytes, *, beat: int) -> bytes:
    """Compress by the fast level, or by the thorough one where that is worth its time; ``beat`` bytes are the aim."""
    import zstandard

    start = data[:_PROBE]
    fast, thorough = (zstandard.ZstdCompressor(level=level) for level in (_FAST, _THOROUGH))
    tried = fast.compress(start), thorough.compress(start)
    if len(start) == len(data):
        return min(tried, key=len)
    promised = len(tried[1]) / len(start) * len(data)
    return (thorough if len(tried[1]) < _WORTH * len(tried[0]) and promised < beat else fast).compress(data)


def _unzstd(frame: bytes, size: int) -> bytes:
    import zstandard

    try:
        about: Any = zstandard.get_frame_parameters(frame)
        if about.content_size != size or about.dict_id:
            raise ValueError(f"its frame announces {about.content_size:,} bytes of {size:,}")
        return zstandard.ZstdDecompressor().decompress(frame, max_output_size=size, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ValueError(f"zstd: {error}") from None
