"""What the pages share: colours for light and dark, figures as inline SVG or as files, the page's frame, numbers as text.

A page is one HTML file that loads nothing, works from disk, and is the same bytes for the same input.
"""

from wnq.drawing.chart import Chart, Key, draw_key
from wnq.drawing.frame import render_page, require_page
from wnq.drawing.palette import ARMS, CSS, DARK, LIGHT, MARKERS, SIGNS, Palette, arm_color, arm_name
from wnq.drawing.svg import WIDTH, chart_style, few_ticks, log_ticks, new_figure, round_values, to_svg
from wnq.drawing.text import counted, listed, median, number, percent, short_name

__all__ = [
    "ARMS",
    "CSS",
    "DARK",
    "LIGHT",
    "MARKERS",
    "SIGNS",
    "WIDTH",
    "Chart",
    "Key",
    "Palette",
    "arm_color",
    "arm_name",
    "chart_style",
    "counted",
    "draw_key",
    "few_ticks",
    "listed",
    "log_ticks",
    "median",
    "new_figure",
    "number",
    "percent",
    "render_page",
    "require_page",
    "round_values",
    "short_name",
    "to_svg",
]
