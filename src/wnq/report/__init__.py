"""The evidence as one self-contained HTML page: ``page`` arranges it, ``plots`` draws it."""

from wnq.report.page import write_report

__all__ = ["write_report"]
