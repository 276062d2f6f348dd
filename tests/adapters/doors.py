"""The table of docs/frameworks.md: what is supported through which door. Tests say it by markers, and `tools/doors_table.py` runs
them.

    @pytest.mark.door("codes in every step", "transformers", "lightning")   the test shows it for these doors; for one alone
                                                                            where that is its parameter `name`
    @pytest.mark.door("FSDP2", "transformers", refused=True)                that it is refused in one line
"""

import importlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

WHAT = (
    "plain averaging",
    "codes in every step",
    "DiLoCo and its kin",
    "FSDP2",
    "resumed to the bit",
    "bytes as predicted",
)
BEGIN, END = "<!-- table of doors -->", "<!-- end -->"
PAGE = Path(__file__).parents[2] / "docs" / "frameworks.md"
Cells = dict[tuple[str, str], str]
"""By door and what: "yes" or "refused"."""


def cells_of(marks: Iterable[pytest.Mark], name: str | None = None) -> Cells:
    """What a test with these markers shows. name: its parameter of that name."""
    found: Cells = {}
    for mark in marks:
        if mark.name == "door":
            what, *doors = mark.args
            assert what in WHAT and doors, f"{mark}: the table has the columns {', '.join(WHAT)}; name one, and the doors"
            value = "refused" if mark.kwargs.get("refused") else "yes"
            found |= {(door, what): value for door in ([name] if name in doors else doors)}
    return found


def marked() -> tuple[Cells, list[str]]:
    """All that tests of this folder are marked with, and the files that cannot be loaded without what is not installed."""
    found, missing = Cells(), []
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        try:
            module = importlib.import_module(path.stem)
        except pytest.skip.Exception:
            missing.append(path.name)
            continue
        for test in vars(module).values():
            found |= cells_of(getattr(test, "pytestmark", ()) if callable(test) else ())
    return found, missing


def shown() -> Cells:
    """What the table says now."""
    rows = PAGE.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0].strip().splitlines()
    head, _, *body = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    return {(door, what): value for door, *values in body for what, value in zip(head[1:], values, strict=True) if value}


def write(cells: Mapping[tuple[str, str], str]) -> None:
    """The table, a row for each door."""
    rows = ["| | " + " | ".join(WHAT) + " |", "|---" * (len(WHAT) + 1) + "|"]
    for door in dict.fromkeys(door for door, _ in cells):
        rows.append("| " + " | ".join([door, *(cells.get((door, what), "") for what in WHAT)]) + " |")
    before, _, after = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    text = "\n".join([before + BEGIN, *rows, END + after.partition(END)[2]])
    PAGE.write_text(text, encoding="utf-8")
