"""What a file says of how its codes are stored: layer by layer, and of the coder of all."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from wnq.artifact.bundle import MAX_LENGTH
from wnq.artifact.coders import CODERS


@dataclass(frozen=True)
class Stored:
    """How one weight is stored.

    Attributes:
        bits: width of a code.
        axis: dimension of the weight that channels run along.
        shift: what was added to the codes, see :func:`wnq.artifact.layout.shift_of`.
    """

    bits: int
    axis: int
    shift: int = 0


class Stream(NamedTuple):
    """One layer's part of a coded file's bytes.

    Its bytes have a checksum with the rest of the file, which is compared before anything is decoded. The checksum here, 64 bits of
    SHA-256, is of the decoded codes: the packages that decode them are other people's, and other versions of them will exist.
    """

    method: str
    length: int
    sha256: str


@dataclass(frozen=True)
class Coding:
    """What a file says of its coder.

    Attributes:
        name: a key of :data:`wnq.artifact.coders.CODERS`.
        versions: package -> its version when the file was written.
        streams: one a layer, in the plan's order; none for ``none``.
    """

    name: str = "none"
    versions: Mapping[str, str] | None = None
    streams: tuple[Stream, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return JSON types."""
        return {
            "name": self.name,
            "versions": dict(self.versions or {}),
            "streams": [list(stream) for stream in self.streams],
        }


def read_coding(document: Any) -> Coding:
    """Check and rebuild what a file says of its coder.

    Raises:
        ValueError: it is malformed, or names a coder or method that does not exist.
    """
    match document:
        case {"name": str(name), "versions": dict(used), "streams": list(rows)} if (
            len(document) == 3 and name in CODERS
        ):
            pass
        case _:
            raise ValueError(f"the metadata's 'coder' must have a name of {', '.join(CODERS)}, versions and streams")
    if not all(isinstance(text, str) for text in used.values()):
        raise ValueError("the versions of the coder's packages must be text")
    streams: list[Stream] = []
    for row in rows:
        match row:
            case [str(method), int(length), str(digest)] if (
                method in CODERS[name] and type(length) is int and 0 <= length < MAX_LENGTH
            ):
                streams.append(Stream(method, length, digest))
            case _:
                raise ValueError(
                    f"a stream must be [method of {', '.join(CODERS[name]) or 'none'}, bytes, digest], got {row!r:.80}"
                )
    return Coding(name, used, tuple(streams))
