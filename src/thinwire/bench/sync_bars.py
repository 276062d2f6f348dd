"""What `thinwire bench sync` demands of its rows: one method's mean over the seeds against another's, at most so much.

A bar is looked at where both of its methods are among the rows, and at the links that it speaks of.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from thinwire.bench.registry import Rows
from thinwire.units import show


@dataclass(frozen=True, slots=True)
class Bar:
    """`column` of `method` / that of the first of `against` that was measured <= `most`. link_bps: None for each link."""

    method: str
    against: tuple[str, ...]
    column: str
    most: float
    link_bps: float | None = None


UNCOMPRESSED = ("ddp", "none")
BARS = (
    Bar("int4", UNCOMPRESSED, "wire_bytes_per_step", 0.155),
    Bar("int4-all", UNCOMPRESSED, "wire_bytes_per_step", 0.131),
    Bar("int4", UNCOMPRESSED, "heldout_loss", 1.005),
    Bar("int4", ("ddp",), "step_s", 0.25, link_bps=100e6),
    Bar("powersgd4", ("ddp-powersgd4",), "step_s", 1.0),
)


def bar_rows(rows: Sequence[Mapping[str, Any]], bars: Sequence[Bar] = BARS) -> Rows:
    """A row for each bar (and link, where times are compared): case, method, link_bps, ratio, bar, held."""
    links = list(dict.fromkeys(row["link_bps"] for row in rows))
    found: Rows = []
    for bar in bars:
        timed = bar.column == "step_s"
        for link_bps in links if timed else links[:1]:
            if timed and bar.link_bps is not None and link_bps != bar.link_bps:
                continue
            means = _means(rows, bar.column, link_bps)
            other = next((name for name in bar.against if name in means), None)
            if bar.method not in means or other is None:
                continue
            ratio = means[bar.method] / means[other]
            where = f" at {show(link_bps, 'bit/s')}" if timed and link_bps else ""
            found.append(
                {
                    "case": f"{bar.column}: {bar.method} / {other}{where}",
                    "ratio": ratio,
                    "bar": bar.most,
                    "held": ratio <= bar.most,
                }
            )
    return found


def _means(rows: Sequence[Mapping[str, Any]], column: str, link_bps: float | None) -> dict[str, float]:
    values: dict[str, list[float]] = {}
    for row in rows:
        if row["link_bps"] == link_bps and row[column] is not None:
            values.setdefault(row["method"], []).append(row[column])
    return {method: mean(of) for method, of in values.items()}
