"""Colours by name: those of the light and the dark page, and placeholders that become the page's own."""

from collections.abc import Mapping

Palette = Mapping[str, str]
"""Name -> colour, for one of the names of :data:`LIGHT`."""

LIGHT: Palette = {
    "page": "#f6f6f3",
    "card": "#ffffff",
    "ink": "#1b1d21",
    "muted": "#5b616b",
    "line": "#d8dbe0",
    "wash": "#eeefec",
    "start": "#767c86",
    "arm0": "#0072b2",
    "arm1": "#c44f00",
    "arm2": "#00805d",
    "arm3": "#a8458a",
    "arm4": "#846700",
    "arm5": "#4b4fb8",
    "good": "#006b4a",
    "bad": "#b3261e",
    "open": "#775900",
}

DARK: Palette = {
    "page": "#111316",
    "card": "#1a1d21",
    "ink": "#e9ebee",
    "muted": "#a4abb5",
    "line": "#363c45",
    "wash": "#23272d",
    "start": "#a0a7b1",
    "arm0": "#56b4e9",
    "arm1": "#ff8a4c",
    "arm2": "#34c795",
    "arm3": "#e58ac8",
    "arm4": "#f0c44c",
    "arm5": "#a3a6ff",
    "good": "#4cd3a0",
    "bad": "#ff8f85",
    "open": "#f0c44c",
}

CSS: Palette = {name: f"#0101{place:02x}" for place, name in enumerate(LIGHT, start=1)}
"""Placeholders, which :func:`wnq.drawing.to_svg` turns into the page's variables: one drawing serves light and dark."""

ARMS = 6
"""Number of colours for what is compared; further ones start over."""

MARKERS = "osD^vP"
SIGNS = "●■◆▲▼✚"
"""What a legend in text shows for each marker."""


def arm_name(index: int) -> str:
    """Return the name of an arm's colour."""
    return f"arm{index % ARMS}"


def arm_color(index: int) -> str:
    """Return the placeholder of an arm's colour."""
    return CSS[arm_name(index)]


def variables(palette: Palette) -> str:
    """Return a palette as the declarations of a style sheet."""
    return " ".join(f"--{name}: {color};" for name, color in palette.items())
