"""Rows of a benchmark as a table for the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from thinwire.units import show

_UNITS = {"_s": "s", "_bps": "bit/s", "bytes": "B"}


def tables(name: str, rows: Sequence[Mapping[str, Any]]) -> list[Table]:
    """A table for each set of keys that rows have, so that none is mostly empty."""
    alike: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        alike.setdefault(tuple(row), []).append(row)
    return [table(name, part) for part in alike.values()]


def table(name: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """All keys of the rows as columns, in the order in which they first appear."""
    result = Table(title=f"bench {name}", title_justify="left")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    for column in columns:
        numbers = all(isinstance(row.get(column), int | float | None) for row in rows)
        result.add_column(column, justify="right" if numbers else "left")
    for row in rows:
        result.add_row(*(_cell(column, row.get(column)) for column in columns))
    return result


def _cell(column: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "[green]yes[/]" if value else "[red]no[/]"
    if isinstance(value, int | float):
        unit = next((unit for ending, unit in _UNITS.items() if column.endswith(ending) and not column.endswith("_per_s")), None)
        return show(value, unit) if unit else f"{value:.4g}"
    return str(value)
