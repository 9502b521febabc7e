"""The hint at the end of an error message about an unknown name."""

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, known: Iterable[str], *, most: int = 1) -> str:
    """Return ``" Did you mean 'lsq' or 'lsqplus'?"`` with at most ``most`` close names, or nothing if none is close."""
    close = difflib.get_close_matches(name, list(known), n=most, cutoff=0.5)
    return f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
