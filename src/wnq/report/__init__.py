"""The evidence as one self-contained HTML page, as plots, as CSV and as JSON.

``subject`` says what a report is about, ``charts`` and ``layers`` draw it, ``wording`` says what it means, ``tables`` holds the
numbers, ``page`` is the whole.
"""

from wnq.report.page import save_plots, write_report
from wnq.report.subject import matching, subject_of
from wnq.report.tables import as_json, csv_text, write_csv

__all__ = ["as_json", "csv_text", "matching", "save_plots", "subject_of", "write_csv", "write_report"]
