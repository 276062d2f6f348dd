"""Make the table of docs/frameworks.md, what is supported through which door, of the tests that are marked with it.

    python tools/doors_table.py [FILE OF TESTS ...]

Runs them all (some ten minutes), or those of some files; a cell is filled only by tests that have passed. What is marked
and has not run stays as it was, and so do rows of frameworks that are not installed.
"""

import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[1] / "tests" / "adapters"
sys.path.insert(0, str(FOLDER))

import doors  # noqa: E402


class Passed:
    """Hears of each test that has run."""

    def __init__(self) -> None:
        self.cells: doors.Cells = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
        """Keep what it shows, if it has passed."""
        report = yield
        if report.when == "call" and report.passed:
            name = item.callspec.params.get("name") if hasattr(item, "callspec") else None
            self.cells |= doors.cells_of(item.iter_markers(), name)
        return report


def main() -> int:
    """See the top of the file. Changes nothing if a test has failed."""
    passed = Passed()
    code = pytest.main([*(sys.argv[1:] or [str(FOLDER)]), "-m", "door"], plugins=[passed])
    if code:
        return int(code)
    marks, _ = doors.marked()
    known = {door for door, _ in marks}
    doors.write({cell: value for cell, value in doors.shown().items() if cell in marks or cell[0] not in known} | passed.cells)
    return 0


if __name__ == "__main__":
    sys.exit(main())
