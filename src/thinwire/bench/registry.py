"""The benchmarks by name, and their rows as tables for the terminal.

Each is a function run(cluster, options) -> flat rows with units in the keys.

A row has at least `case`; where they apply `native_s`, `ours_s`, `bound_s`, `ratio`, and `bar` with `held`.
"""

import importlib
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.table import Table

from thinwire.errors import UserError
from thinwire.tomlfile import read_value
from thinwire.units import show

Rows = list[dict[str, Any]]
Benchmark = Callable[[str | None, Mapping[str, Any]], Rows]

BENCHMARKS = (
    "applications",
    "collectives",
    "collective_steps",
    "compress",
    "ddp",
    "equality",
    "fsdp",
    "front",
    "gpu",
    "lab",
    "large_batch",
    "layouts",
    "ledger",
    "plan",
    "probe",
    "published",
    "queue",
    "regret",
    "sequence",
    "sync",
    "uneven",
    "why",
)
"""Each a module of this folder, with `run(cluster, options)` and the values of its options in DEFAULTS."""
RESUMED = ("applications", "equality", "large_batch", "regret")
"""Keep what they have found in the file that rows are to go to, or beside it, and go on with it."""
_UNITS = {"_s": "s", "_bps": "bit/s", "bytes": "B"}


def find(name: str) -> Benchmark:
    """A benchmark, which gets options that need not be all. UserError for an unknown name or option."""
    if name not in BENCHMARKS:
        raise UserError(f"there is no benchmark {name!r}; there are: {', '.join(BENCHMARKS)}")
    module = importlib.import_module(f"thinwire.bench.{name}")

    def run(cluster_name: str | None, options: Mapping[str, Any]) -> Rows:
        unknown = sorted(set(options) - set(module.DEFAULTS))
        if unknown:
            raise UserError(f"option {unknown[0]}: this benchmark has the options {', '.join(module.DEFAULTS)}")
        rows: Rows = module.run(cluster_name, {**module.DEFAULTS, **options})
        return rows

    return run


def describe() -> dict[str, str]:
    """The first line of each benchmark's file."""
    return {name: (importlib.import_module(f"thinwire.bench.{name}").__doc__ or "").splitlines()[0] for name in BENCHMARKS}


def parse_options(changes: Sequence[str]) -> dict[str, Any]:
    """["rounds=3", "cases=[1, 2]"] -> values as TOML reads them; what TOML cannot read is text."""
    options: dict[str, Any] = {}
    for change in changes:
        key, separator, text = change.partition("=")
        if not separator:
            raise UserError(f"--set {change!r}: write KEY=VALUE")
        options[key] = read_value(text)
    return options


def machine() -> dict[str, Any]:
    """Where the numbers come from."""
    return {
        "system": platform.platform(),
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }


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
