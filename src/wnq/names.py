"""Names that a user may write wrongly: which ones are known, and the hint at the end of an error message."""

import difflib
from collections.abc import Collection, Iterable


def did_you_mean(name: str, known: Iterable[str], *, most: int = 1) -> str:
    """Return ``" Did you mean 'lsq' or 'lsqplus'?"`` with at most ``most`` close names, or nothing if none is close."""
    close = difflib.get_close_matches(name, list(known), n=most, cutoff=0.5)
    return f" Did you mean {' or '.join(map(repr, close))}?" if close else ""


def check_choice(name: str, known: Collection[str], *, where: str) -> str:
    """Return ``name`` if it is one of the few known ones.

    Raises:
        ValueError: with the name of the setting, the known ones and what came.
    """
    if name not in known:
        raise ValueError(f"{where} must be one of {', '.join(map(repr, known))}, got {name!r}.")
    return name
