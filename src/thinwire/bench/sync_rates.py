"""The rate of links that a method needs for so much of the throughput without any exchange, as measured and as predicted.

Rows as in table 4 of Streaming DiLoCo (Douillard et al. 2025), which is simulated. Measured: between two links of the sweep by a
straight line over log rate; a level that the slowest link already reaches, or the fastest does not, is not known. Predicted: by
bisection on the cost model.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from math import exp, log
from statistics import median
from typing import Any

from thinwire.bench.registry import Rows
from thinwire.units import show

LEVELS = (0.5, 0.8, 0.9, 0.95, 0.99)
SLOWEST_BPS, FASTEST_BPS, HALVINGS = 1e3, 1e12, 60


def rate_needed(points: Sequence[tuple[float, float]], level: float) -> float | None:
    """points: (link_bps, utilisation). See the top of the file."""
    ordered = sorted(points)
    for (slow, low), (fast, high) in pairwise(ordered):
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
    found: Rows = []
    for method in dict.fromkeys(row["method"] for row in rows):
        by_link: dict[float, list[float]] = {}
        for row in rows:
            if row["method"] == method and row["link_bps"]:
                by_link.setdefault(row["link_bps"], []).append(row["utilisation"])
        points = [(link, median(values)) for link, values in by_link.items()]
        found.append({"case": "link rate for utilisation", "method": method, "by": "measured"} | _cells(rate_needed, points))
        if method in predicted:
            told = _cells(rate_predicted, predicted[method])
            found.append({"case": "link rate for utilisation", "method": method, "by": "predicted"} | told)
    return found


def _cells(needed: Callable[[Any, float], float | None], known: Any) -> dict[str, Any]:
    values = {level: needed(known, level) for level in LEVELS}
    return {f"{level:.0%}": show(value, "bit/s") if value else None for level, value in values.items()}
