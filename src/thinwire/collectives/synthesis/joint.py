"""The exact optimum of an all-reduce in which reduce-scatter and all-gather overlap and roots may carry unequal shares.

Where links are equal it equals a reduce-scatter followed by an all-gather. Where one node is slow it is up to twice as fast: the
slow node owns no share, and while some links carry sums to the roots others carry results away. `lp` has the program.

Closed forms, T for a message of size 1 (b_i: rate of node i each way, N nodes):

    star     max(1 / b_min, 2 (N-1) / sum b)
    racks    max(star, 2 (R-1) / (R U))            R racks of equal size, U: rate of an uplink each way
"""

from collections.abc import Sequence

from thinwire.collectives.synthesis.graph import Graph
from thinwire.collectives.synthesis.lp import least_time
from thinwire.collectives.synthesis.optimum import optimum


def sequential_time(graph: Graph) -> float | None:
    """The time of a reduce-scatter followed by an all-gather, where switches pass on what they receive; else None."""
    if not graph.balanced():
        return None
    return float(optimum(graph).time + optimum(graph.reversed()).time) / graph.world_size


def all_reduce_time(graph: Graph) -> float:
    """The least time of an all-reduce of a message of size 1, in the graph's unit; / graph.bytes_per_s: seconds a byte."""
    if graph.computes == 1:
        return 0.0
    return least_time(graph, reduce=True, broadcast=True, known=sequential_time(graph))


def star_time(rates: Sequence[float]) -> float:
    """Nodes on one switch that never blocks."""
    return max(1 / min(rates), 2 * (len(rates) - 1) / sum(rates)) if len(rates) > 1 else 0.0


def rack_time(racks: int, rates: Sequence[float], uplink: float) -> float:
    """Racks with equal uplinks to a core that never blocks; rates: of all nodes."""
    return max(star_time(rates), 2 * (racks - 1) / (racks * uplink))
