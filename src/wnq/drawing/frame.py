"""The frame of a page: head, colours, type, tables, the button between light and dark."""

from importlib import resources
from typing import Any

from wnq.drawing.palette import DARK, LIGHT, variables

SHARED = ("frame.html.j2", "parts.html.j2")
"""What the templates of all pages extend, and the macros that they import."""


def render_page(package: str, template: str, **content: Any) -> str:
    """Return a page: a template of a package, which extends ``frame.html.j2`` and is filled with ``content``.

    Text is escaped, but for what is marked as :class:`markupsafe.Markup`.

    Raises:
        ImportError: matplotlib or jinja2 is missing, with the name of the extra.
    """
    require_page()
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    def source(name: str) -> str:
        home = "wnq.drawing" if name in SHARED else package
        return resources.files(home).joinpath(name).read_text(encoding="utf-8")

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, loader=FunctionLoader(source)
    )
    colours = {"light": variables(LIGHT), "dark": variables(DARK)}
    return environment.get_template(template).render(colours=colours, **content)


def require_page() -> None:
    """Raise ``ImportError`` with the name of the extra if what draws pages is not installed."""
    try:
        import jinja2 as _  # pyright: ignore[reportUnusedImport]
        import matplotlib as _  # noqa: F401, F811  # pyright: ignore[reportUnusedImport]
    except ImportError as error:
        raise ImportError(f'pages and plots need {error.name}: pip install "wnq[report]"') from error
