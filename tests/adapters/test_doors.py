"""The table of docs/frameworks.md has what tests are marked with, and nothing else."""

from doors import marked, shown


def test_the_table_in_the_docs_is_what_tests_are_marked_with() -> None:
    """But for rows of frameworks that are not installed here."""
    marks, missing = marked()
    doors = {door for door, _ in marks}
    own = {cell: value for cell, value in shown().items() if cell[0] in doors}
    assert own == marks and len(doors) > 3, "python tools/doors_table.py makes it anew"
    assert missing or own == shown()
