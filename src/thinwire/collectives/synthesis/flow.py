"""Maximum flow on small dense integer graphs, and the question that all of synthesis asks of it.

The question (Edmonds 1973): r_u trees are rooted at each compute node u, R = sum r_u in all. They exist within the capacities c
(switches taken as plain nodes) iff a source s with edges s -> u of capacity r_u can send R to each compute node v on its own.

Two shortcuts keep the number of flows small. Once v is known to get R, no cut that parts it from s is too small, so v may be
merged with s for all later questions. And sum_u min(s -> u, u -> v) is a flow already: where that is R, none has to be sought.
"""

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import breadth_first_order, maximum_flow

from thinwire.collectives.synthesis.graph import Counts, Mask, Matrix

_INT32 = 2**31 - 1


def min_cut(capacity: Matrix, source: int, target: int) -> tuple[int, Mask]:
    """The maximum flow from source to target, and the nodes on the source's side of a least cut."""
    value, flow = max_flow(capacity, source, target)
    inside = np.zeros(len(capacity), dtype=bool)
    inside[breadth_first_order(csr_array(capacity > flow), source, return_predecessors=False)] = True
    return value, inside


def max_flow(capacity: Matrix, source: int, target: int) -> tuple[int, Matrix]:
    """The value of a maximum flow, and its net amounts (negative against an edge)."""
    narrow = int(capacity.sum()) < _INT32
    done = maximum_flow(csr_array(capacity.astype(np.int32 if narrow else np.int64)), source, target)
    return int(done.flow_value), done.flow.toarray().astype(np.int64)


def violated_cut(capacity: Matrix, roots: Counts, first: int | None = None) -> tuple[int, int, Mask] | None:
    """None if `roots` (one number for each compute node) can all reach all; else (v, how many are missing at v, the cut).

    The cut is the nodes on the source's side. `first`: the compute node to ask first (it failed last time, say).
    """
    computes, size = len(roots), len(capacity)
    total = int(roots.sum())
    extended = np.zeros((size + 1, size + 1), dtype=np.int64)
    extended[:size, :size] = capacity
    extended[size, :computes] = roots
    waiting = np.ones(computes, dtype=bool)
    while waiting.any():
        known = extended[size, :computes] + np.minimum(extended[size, :size, None], capacity[:, :computes]).sum(0)
        found = waiting & (known >= total)
        if first is not None or not found.any():
            node = int(np.where(waiting, known, -1).argmax()) if first is None else first
            value, inside = min_cut(extended, size, node)
            if value < total:
                return node, total - value, inside[:-1]
            found, first = np.arange(computes) == node, None
        extended[size, :computes][found] = total
        waiting &= ~found
    return None
