"""The planner's model of a step against published measurements, table by table, beside a model that knows one rate only."""

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from thinwire.bench.registry import Rows
from thinwire.errors import UserError
from thinwire.plan.measurements.score import INTERVAL, Known, Prepared, score
from thinwire.plan.measurements.table import read_folder, shipped_tables

DEFAULTS: dict[str, Any] = {"measurements": "", "worst": 3}
"""measurements: a folder of tables in the form of docs/plan.md, "" for those that come along; worst: rows named of each."""


def run(cluster: str | None, options: Mapping[str, Any]) -> Rows:
    """A row a table; what was left out or assumed, and the rows that are predicted worst, are printed."""
    if cluster is not None:
        raise UserError("bench plan reads tables, no cluster; leave --cluster out")
    shipped = read_folder(shipped_tables())
    tables = read_folder(Path(options["measurements"])) if options["measurements"] else shipped
    known, rows = Known(shipped), []
    for table in tables:
        for kind, reasons in (("left out", table.left_out), ("assumed", table.assumed)):
            for reason, count in sorted(reasons.items()):
                print(f"{table.name}: {kind} in {count} rows: {reason}" if count else f"left out: {reason}")
        if not table.timed:
            print(f"{table.name}: no row has a time that can be predicted")
            continue
        result, predicted = score(Prepared(table), known)
        beside = sorted(zip(table.timed, predicted, strict=True), key=lambda one: -abs(one[1] / (one[0].seconds or 1) - 1))
        for row, seconds in beside[: options["worst"]]:
            print(f"{table.name}: row {row.number} ({row.group}): measured {row.seconds:.4g} s, predicted {seconds:.4g} s")
        rows.append({**result, "left_out": sum(table.left_out.values())})
    if not rows:
        raise UserError(f"none of the {len(tables)} tables has a row that can be predicted")
    for key, when in (("coverage", "uncalibrated"), ("coverage_5rows", "after five rows")):
        held = [row[key] for row in rows if row[key] is not None]
        if held:
            print(f"intervals of {INTERVAL:.0%}, {when}, held {fmean(held):.0%} of steps, each of {len(held)} tables for as much")
    return rows
