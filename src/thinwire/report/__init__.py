"""The report: a run folder in, a page and a table out. All it knows of a run is in the folder."""

from thinwire.report.facts import Facts
from thinwire.report.page import page, write_report
from thinwire.report.table import as_json, table

__all__ = ["Facts", "as_json", "page", "table", "write_report"]
