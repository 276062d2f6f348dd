"""Time to a target loss: steps to get there, from the curve of a seed, times the measured seconds of a step on a link.

The target is the held-out loss that fp32 data parallelism has after a part of its tokens (usually 0.8), on the same seed.
`time_ratio` is against what data parallelism needs for it where the links are not shaped.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from thinwire.bench.registry import Rows

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
