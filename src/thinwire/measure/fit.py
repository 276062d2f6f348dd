"""From noisy timings to rates and latencies. No torch, no sockets.

A stream delivers bytes B(t). After the first moments (slow start; a token bucket that lets its first bytes pass at once)
B grows along a line, so its rate is the slope of seconds over bytes. Theil 1950 and Sen 1968: the median of the slopes
between all pairs of points withstands up to 29 % of outliers. Where flows share a link one of them may pause while the
others go on; there the mean over a window that all have in common is what adds up to the link's rate.

No clocks are compared: a rate is timed where the bytes arrive, a latency is half a round trip.
"""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import comb

import numpy
from scipy.optimize import nnls
from scipy.stats import theilslopes

from thinwire.measure.rounds import Flow

CONFIDENCE = 0.9
MAX_POINTS = 48
NEAR_TOP = 0.85
"""A flow within 15 % of the best that its card has shown is taken to be limited by that card."""
RIDGE = 1e-3

Arrivals = Sequence[tuple[float, int]]
"""(seconds, bytes received until then) at one receiver."""
Rates = Sequence[tuple[Flow, float]]
"""Of flows, in any unit."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A median with an interval that holds the true median with about 90 % (of few samples: their whole range)."""

    value: float
    low: float
    high: float


def estimate(samples: Sequence[float]) -> Estimate:
    """Median and its distribution-free interval: the k-th smallest and largest, k from the binomial law of the sign test."""
    ordered = sorted(samples)
    count, outside, k = len(ordered), 0.0, 0
    while k < (count - 1) // 2:
        outside += 2 * comb(count, k) / 2**count
        if outside > 1 - CONFIDENCE:
            break
        k += 1
    k = max(0, k - 1)
    return Estimate(float(numpy.median(ordered)), ordered[k], ordered[-1 - k])


def steady_bps(arrivals: Arrivals, begin_s: float, end_s: float) -> float | None:
    """Payload bits per second of a stream between two times, by Theil-Sen; None if hardly anything arrived."""
    inside = [point for point in arrivals if begin_s <= point[0] <= end_s]
    if len(inside) < 4:
        return None
    chosen = numpy.unique(numpy.linspace(0, len(inside) - 1, min(MAX_POINTS, len(inside))).round().astype(int))
    points = [inside[index] for index in chosen]
    slope = float(theilslopes([seconds for seconds, _ in points], [count for _, count in points]).slope)
    return 8 / slope if slope > 0 else None


def mean_bps(arrivals: Arrivals, begin_s: float, end_s: float) -> float:
    """Payload bits that arrived between two times, per second."""
    times = [seconds for seconds, _ in arrivals]

    def until(moment: float) -> int:
        index = bisect_right(times, moment)
        return arrivals[index - 1][1] if index else 0

    return 8 * (until(end_s) - until(begin_s)) / (end_s - begin_s)


def card_rates(preferred: Mapping[int, Sequence[float]], others: Mapping[int, Sequence[float]]) -> dict[int, Estimate]:
    """The rate of each host's card in one direction, from flows that go through it and may be limited elsewhere.

    No flow is faster than its card, so those near the best one show it. `preferred` flows shared no link with others and
    are used if any of them comes near the best; `others` only show what else is possible.
    """
    rates = {}
    for host in preferred.keys() | others.keys():
        good, seen = list(preferred.get(host, ())), list(others.get(host, ()))
        top = max([*good, second_best(seen)])
        if top <= 0:
            continue
        near = [rate for rate in good if rate >= NEAR_TOP * top] or [rate for rate in seen if rate >= NEAR_TOP * top]
        rates[host] = estimate(near)
    return rates


def by_end(rates: Rates, end: int) -> dict[int, list[float]]:
    """Rates of the flows that each host sends (end 0) or receives (end 1)."""
    found: dict[int, list[float]] = defaultdict(list)
    for flow, rate in rates:
        found[flow[end]].append(rate)
    return found


def second_best(rates: Sequence[float]) -> float:
    """The largest may be a fluke, if there are several."""
    ordered = sorted(rates)
    return ordered[-2] if len(ordered) > 3 else ordered[-1] if ordered else 0.0


def split_latencies(
    pairs: Mapping[tuple[int, int], float], num_hosts: int, rack_of: Mapping[int, int]
) -> tuple[list[float], dict[int, float]]:
    """Latency of every host's cable and every rack's uplink, so that they add up to the latencies of the pairs.

    Non-negative least squares; what the pairs leave open (two hosts: only the sum is known) is split evenly.
    """
    racks = sorted(set(rack_of.values()))
    if not pairs:
        return [0.0] * num_hosts, dict.fromkeys(racks, 0.0)
    matrix = numpy.zeros((len(pairs), num_hosts + len(racks)))
    for row, (a, b) in enumerate(pairs):
        matrix[row, [a, b]] = 1
        if rack_of.get(a) != rack_of.get(b):
            for host in (a, b):
                if host in rack_of:
                    matrix[row, num_hosts + racks.index(rack_of[host])] = 1
    wanted = numpy.array(list(pairs.values()))
    scale = wanted.max() or 1.0
    ridge = RIDGE * numpy.eye(matrix.shape[1])
    parts, _ = nnls(numpy.vstack([matrix, ridge]), numpy.concatenate([wanted / scale, numpy.zeros(len(ridge))]))
    parts = parts * scale
    return parts[:num_hosts].tolist(), {rack: float(parts[num_hosts + index]) for index, rack in enumerate(racks)}
