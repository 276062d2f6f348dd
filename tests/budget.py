"""What each floor's tests may take of `make test`, in seconds of its processes, and what they took: printed after each run."""

from collections import Counter
from pathlib import Path

import pytest

BUDGET_S = {
    "adapters": 25,
    "bench": 10,
    "cli": 25,
    "collectives": 60,
    "compress": 50,
    "lab": 60,
    "measure": 10,
    "parallel": 30,
    "report": 15,
    "sync": 70,
    "tasks": 10,
    "train": 100,
    "others": 50,
}
"""Together what three processes do in about 150 s."""


class Spent:
    """A plugin that adds up what tests took, set-up and end included, and prints the sums beside the budgets."""

    def __init__(self) -> None:
        self._spent_s: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        folder = Path(report.nodeid.partition("::")[0]).parts[1:2]
        floor = folder[0] if folder and folder[0] in BUDGET_S else "others"
        self._spent_s[floor] += report.duration

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        terminalreporter.section("seconds by floor, of a budget for `make test`")
        for floor, budget_s in BUDGET_S.items():
            over = "  over" if self._spent_s[floor] > budget_s else ""
            terminalreporter.write_line(f"{floor:12} {self._spent_s[floor]:6.1f} of {budget_s:3}{over}")
