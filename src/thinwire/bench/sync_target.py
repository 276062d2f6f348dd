"""Time to a target loss: steps to get there, from the curve of a seed, times the measured seconds of a step on a link.

The target is the held-out loss that fp32 data parallelism has after a part of its tokens (usually 0.8), on the same seed.
`time_ratio` is against what data parallelism needs for it where the links are not shaped.

Of ours the fastest on each link is held to the bars below, and set beside every other way that was measured there.
"""

from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from statistics import mean
from typing import Any

from thinwire.bench.registry import Rows

BARS: Mapping[float, float] = {100e6: 1.08, 10e6: 1.15, 1e6: 1.6}
"""The most that `time_ratio` may be, by the rate of the links in bit/s."""

Curve = Sequence[tuple[int, float]]
"""(steps done, held-out loss), steps going up."""


def loss_at(curve: Curve, step: float) -> float:
    """Between two points of the curve by a straight line."""
    for (before, high), (after, low) in pairwise(curve):
        if before <= step <= after:
            return high + (low - high) * (step - before) / (after - before)
    return curve[0][1] if step < curve[0][0] else curve[-1][1]


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
        steps = steps_to(curves[row["method"], row["seed"]], target)
        best = steps_to(base, target)
        row |= {"target_loss": target, "steps_to_target": steps, "time_to_target_s": steps * row["step_s"] if steps else None}
        if steps and best and unshaped_s:
            row["time_ratio"] = steps * row["step_s"] / (best * unshaped_s)


def target_rows(rows: Sequence[Mapping[str, Any]], others: Collection[str]) -> Rows:
    """For each link where some way of ours reaches the target with every seed: the fastest, its bar, and its lead over `others`.

    `ahead`: their time over ours, means over the seeds; None for one that does not reach the target with every seed.
    """
    found: Rows = []
    for link_bps in dict.fromkeys(row["link_bps"] for row in rows):
        there: dict[str, list[float | None]] = {}
        for row in rows:
            if row["link_bps"] == link_bps:
                there.setdefault(row["method"], []).append(row.get("time_ratio"))
        means: dict[str, float] = {}
        for name, values in there.items():
            reached = [value for value in values if value is not None]
            if len(reached) == len(values):
                means[name] = mean(reached)
        ours = min((name for name in means if name not in others), key=means.__getitem__, default=None)
        if ours is None:
            continue
        bar = BARS.get(link_bps) if link_bps else None
        said = {"case": "time to target", "link_bps": link_bps, "method": ours}
        if bar:
            found.append({**said, "time_ratio": means[ours], "bar": bar, "held": means[ours] <= bar})
        for name in there:
            if name in others:
                ahead = means[name] / means[ours] if name in means else None
                found.append({**said, "peer": name, "ahead": ahead, "held": ahead is None or ahead >= 1})
    return found
