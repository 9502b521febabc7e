"""An extension of griffe: the reference shows docstrings, written in reStructuredText, as Markdown."""

from typing import Any

import griffe
from markup import to_markdown


class Docstrings(griffe.Extension):
    """Turns every docstring into Markdown as it is collected."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called by griffe for each module, class, function and attribute."""
        if obj.docstring:
            obj.docstring.value = to_markdown(obj.docstring.value)
