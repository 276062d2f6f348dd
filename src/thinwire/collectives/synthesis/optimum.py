"""How fast an all-gather can be on a graph with switches: exactly, and with k trees a rank.

    1/x* = max over cuts S that leave out a compute node of  w(S) / B+(S)          (Zhao et al., ForestColl 2024)

w(S): ranks inside S; B+(S): capacity of the links that leave S. Every rank can then broadcast at the rate x* at once, and an
all-gather of M bytes by W ranks takes M/W * 1/x*. The switches must be able to pass on what they receive (in = out).

The best cut is found by Newton's method for ratios (Dinkelbach 1967): ask at rate x; where the answer is a cut that is too small,
that cut gives a smaller x; ask again. x falls through ratios of cuts, so the end is exact; a few rounds suffice.

Whole trees: a link carries U b_e trees and each rank has k = U x* of them; U is the least that makes all of these integers. With
k given, a link carries floor(U b_e) trees; the least such U is found by bisection over the values at which a floor changes.
"""

from dataclasses import dataclass
from fractions import Fraction
from math import gcd

import numpy as np

from thinwire.collectives.synthesis.flow import balanced_part, violated_cut
from thinwire.collectives.synthesis.graph import Counts, Graph, Mask, Matrix
from thinwire.errors import UserError


@dataclass(frozen=True, slots=True)
class Optimum:
    """time = 1/x: what a rank's share of size 1 takes. k: trees a rank. capacity: trees a link. cut: its inside, or None."""

    time: Fraction
    k: int
    capacity: Matrix
    cut: Mask | None

    def bytes_per_s(self, graph: Graph) -> float:
        """The algorithm's bandwidth: bytes of the gathered whole in a second."""
        return graph.world_size * graph.bytes_per_s / float(self.time) if self.time else float("inf")


def optimum(graph: Graph) -> Optimum:
    """The exact optimum of an all-gather. UserError for switches that cannot pass on what they receive; `fixed_k` takes these."""
    capacity, factor = graph.integral()
    weights = graph.weights
    if graph.computes == 1:
        return Optimum(Fraction(0), 1, capacity, None)
    if not graph.balanced():
        raise UserError(f"{graph.name}: a switch receives more than it can send, or less; balance it, or ask for a fixed k")
    time, inside = _newton(capacity, weights)
    scale = Fraction(time.numerator, gcd(time.denominator, *(int(value) for value in capacity[capacity > 0])))
    k = scale / time
    assert k.denominator == 1
    whole = np.array([[int(scale * int(value)) for value in row] for row in capacity], dtype=np.int64)
    return Optimum(time * factor, int(k), whole, inside)


def _newton(capacity: Matrix, weights: Counts) -> tuple[Fraction, Mask]:
    """1/x* for integer capacities, and a cut that gives it."""
    total = int(weights.sum())
    inward = capacity.sum(0)[: len(weights)]
    node = max(range(len(weights)), key=lambda v: Fraction(total - int(weights[v]), int(inward[v])))
    inside = np.arange(len(capacity)) != node
    last: int | None = None
    while True:
        time = Fraction(int(weights @ inside[: len(weights)]), int(capacity[inside][:, ~inside].sum()))
        failure = violated_cut(capacity * time.numerator, weights * time.denominator, last)
        if failure is None:
            return time, inside
        last, _, inside = failure


def fixed_k(graph: Graph, k: int) -> Optimum:
    """The best all-gather with exactly k trees for each rank."""
    if k < 1:
        raise UserError(f"k = {k}: a rank has 1 tree or more")
    bandwidth, factor = graph.integral()
    if graph.computes == 1:
        return Optimum(Fraction(0), k, bandwidth, None)
    values = sorted({int(value) for value in bandwidth[bandwidth > 0]})

    def whole(scale: Fraction) -> Matrix | None:
        floors = {value: scale.numerator * value // scale.denominator for value in values} | {0: 0}
        capacity = np.vectorize(floors.__getitem__, otypes=[np.int64])(bandwidth)
        return balanced_part(capacity, graph.weights * k)

    low = Fraction(0)
    high = Fraction(graph.world_size * k)
    best = whole(high)
    while best is None:
        low, high = high, high * 2
        best = whole(high)
    while True:
        high = max(Fraction(high.numerator * value // high.denominator, value) for value in values)
        between = any(-(-high.numerator * value // high.denominator) - 1 > low * value for value in values)
        if not between:
            return Optimum(high * factor / k, k, best, None)
        middle = (low + high) / 2
        capacity = whole(middle)
        if capacity is None:
            low = middle
        else:
            high, best = middle, capacity
