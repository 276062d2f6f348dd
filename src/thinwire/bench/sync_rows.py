"""What `thinwire bench sync` derives from its rows: whether bars are held, which link a method needs, the time to a target loss.

Bars: one method's mean over the seeds against another's, at most so much, where both are among the rows and at the links named.

Rates: of links that a method needs for so much of the throughput without any exchange, as in table 4 of Streaming DiLoCo
(Douillard et al. 2025), which is simulated. Measured: between two links of the sweep by a straight line over log rate; a level
that the slowest link already reaches, or the fastest does not, is not known. Predicted: by bisection on the cost model.

Target: the held-out loss that fp32 data parallelism has after a part of its tokens (usually 0.8), on the same seed. The time to
it is the steps to get there, from the curve of a seed, times the measured seconds of a step on a link. `time_ratio` is against
what data parallelism needs for it where the links are not shaped. Of ours the fastest on each link is held to `TARGET_BARS`, and
set beside every other method that was measured there.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from math import exp, log
from statistics import mean, median
from typing import Any

import numpy

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
TARGET_BARS: Mapping[float, float] = {100e6: 1.08, 10e6: 1.15, 1e6: 1.6}
"""The most that `time_ratio` may be, by the rate of the links in bit/s."""
LEVELS = (0.5, 0.8, 0.9, 0.95, 0.99)
SLOWEST_BPS, FASTEST_BPS, HALVINGS = 1e3, 1e12, 60
Curve = Sequence[tuple[int, float]]
"""(steps done, held-out loss), steps going up."""


def bar_rows(rows: Sequence[Mapping[str, Any]], bars: Sequence[Bar] = BARS) -> Rows:
    """A row for each bar (and link, where times are compared): case, ratio, bar, held."""
    links = list(dict.fromkeys(row["link_bps"] for row in rows))
    found: Rows = []
    for bar in bars:
        timed = bar.column == "step_s"
        for link_bps in links if timed else links[:1]:
            if timed and bar.link_bps not in (None, link_bps):
                continue
            means = _means(rows, bar.column, link_bps)
            other = next((name for name in bar.against if name in means), None)
            if bar.method in means and other is not None:
                ratio = means[bar.method] / means[other]
                where = f" at {show(link_bps, 'bit/s')}" if timed and link_bps else ""
                case = f"{bar.column}: {bar.method} / {other}{where}"
                found.append({"case": case, "ratio": ratio, "bar": bar.most, "held": ratio <= bar.most})
    return found


def _by_method(rows: Sequence[Mapping[str, Any]], column: str, link_bps: float | None) -> dict[str, list[Any]]:
    """The values of a column on a link, None where not known."""
    values: dict[str, list[Any]] = {}
    for row in rows:
        if row["link_bps"] == link_bps:
            values.setdefault(row["method"], []).append(row.get(column))
    return values


def _means(rows: Sequence[Mapping[str, Any]], column: str, link_bps: float | None) -> dict[str, float]:
    """Of the methods for which all values of the column are known."""
    return {name: mean(values) for name, values in _by_method(rows, column, link_bps).items() if None not in values}


def rate_needed(points: Sequence[tuple[float, float]], level: float) -> float | None:
    """points: (link_bps, utilisation). See the top of the file."""
    for (slow, low), (fast, high) in pairwise(sorted(points)):
        if low < level <= high:
            return exp(log(slow) + (level - low) / (high - low) * (log(fast) - log(slow)))
    return None


def rate_predicted(utilisation: Callable[[float], float], level: float) -> float | None:
    """utilisation: predicted, of a rate in bit/s."""
    low, high = log(SLOWEST_BPS), log(FASTEST_BPS)
    if utilisation(exp(high)) < level:
        return None
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if utilisation(exp(middle)) >= level else (middle, high)
    return exp(high)


def rate_rows(rows: Sequence[Mapping[str, Any]], predicted: Mapping[str, Callable[[float], float]]) -> Rows:
    """Two rows a method: what was measured on the links of `rows`, and what is predicted."""
    links = {row["link_bps"] for row in rows if row["link_bps"]}
    found: Rows = []

    def add(method: str, by: str, needed: Callable[[float], float | None]) -> None:
        rates = {f"{level:.0%}": needed(level) for level in LEVELS}
        shown = {level: show(rate, "bit/s") if rate else None for level, rate in rates.items()}
        found.append({"case": "link rate for utilisation", "method": method, "by": by, **shown})

    for method in dict.fromkeys(row["method"] for row in rows):
        points = [(link, median(_by_method(rows, "utilisation", link)[method])) for link in links]
        add(method, "measured", partial(rate_needed, points))
        if method in predicted:
            add(method, "predicted", partial(rate_predicted, predicted[method]))
    return found


def loss_at(curve: Curve, step: float) -> float:
    """Between two points of the curve by a straight line."""
    steps, losses = zip(*curve, strict=True)
    return float(numpy.interp(step, steps, losses))


def steps_to(curve: Curve, target: float) -> float | None:
    """Steps until the loss is `target` for the first time; None if it never is."""
    if curve and curve[0][1] <= target:
        return float(curve[0][0])
    for (before, high), (after, low) in pairwise(curve):
        if low <= target:
            return before + (after - before) * (high - target) / (high - low)
    return None


def add_targets(rows: Rows, learned: Sequence[Mapping[str, Any]], part: float, reference: str, unshaped_s: float | None) -> None:
    """Puts target_loss, steps_to_target, time_to_target_s and time_ratio into the rows that were measured.

    part: of the reference's steps; unshaped_s: its step on unshaped links, None if that was not measured.
    """
    curves: dict[tuple[str, int], Curve] = {(one["method"], one["seed"]): one["curve"] for one in learned}
    for row in rows:
        base = curves.get((reference, row["seed"]))
        if not base:
            continue
        target = loss_at(base, part * base[-1][0])
        steps, best = steps_to(curves[row["method"], row["seed"]], target), steps_to(base, target)
        row |= {"target_loss": target, "steps_to_target": steps, "time_to_target_s": steps * row["step_s"] if steps else None}
        if steps and best and unshaped_s:
            row["time_ratio"] = steps * row["step_s"] / (best * unshaped_s)


def target_rows(rows: Sequence[Mapping[str, Any]], others: Collection[str]) -> Rows:
    """For each link where a method of ours reaches the target with every seed: the fastest, its bar, and its lead over `others`.

    `ahead`: their time over ours, means over the seeds; None for one that does not reach the target with every seed.
    """
    found: Rows = []
    for link_bps in dict.fromkeys(row["link_bps"] for row in rows):
        means = _means(rows, "time_ratio", link_bps)
        ours = min((name for name in means if name not in others), key=means.__getitem__, default=None)
        if ours is None:
            continue
        bar = TARGET_BARS.get(link_bps) if link_bps else None
        row = {"case": "time to target", "link_bps": link_bps, "method": ours}
        if bar:
            found.append({**row, "time_ratio": means[ours], "bar": bar, "held": means[ours] <= bar})
        for name in dict.fromkeys(row["method"] for row in rows if row["link_bps"] == link_bps):
            if name in others:
                ahead = means[name] / means[ours] if name in means else None
                found.append({**row, "peer": name, "ahead": ahead, "held": ahead is None or ahead >= 1})
    return found
