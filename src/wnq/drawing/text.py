"""Numbers and names as a reader wants them."""

import math
import statistics
from collections.abc import Iterable

COUNTS = ("none", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def number(value: float | None) -> str:
    """Return three significant digits, without exponent where that reads well; a dash for None and NaN."""
    if value is None or not math.isfinite(value):
        return "–"
    if isinstance(value, int) or not value or abs(value) >= 999.5:
        text = f"{value:,.0f}"
    elif abs(value) < 1e-4:
        text = f"{value:.2g}"
    else:
        text = f"{value:#.3g}".rstrip(".")
    return text.replace("-", "−")


def percent(value: float | None) -> str:
    """Return a share as ``12.4 %``, three significant digits; a dash for None and NaN."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{number(100 * float(value))}\N{NO-BREAK SPACE}%"


def counted(count: int, what: str) -> str:
    """Return ``one layer`` or ``12 layers``; numbers up to ten as words."""
    return f"{COUNTS[count] if 0 <= count < len(COUNTS) else f'{count:,}'} {what}{'' if count == 1 else 's'}"


def listed(words: Iterable[str]) -> str:
    """Return ``a, b and c``."""
    *first, last = list(words) or [""]
    return f"{', '.join(first)} and {last}" if first else last


def median(values: Iterable[float | None]) -> float | None:
    """Return the median of the finite values, None if there is none."""
    finite = [value for value in values if value is not None and math.isfinite(value)]
    return statistics.median(finite) if finite else None


def short_name(name: str, length: int = 22) -> str:
    """Return the end of a long layer name, where the difference lies, from a dot on if possible."""
    if len(name) <= length:
        return name
    end = name[-length + 1 :]
    return "…" + (end[end.index(".") + 1 :] if "." in end[:-1] else end)
