"""Maximum flow on small dense integer graphs, and the question that all of synthesis asks of it.

The question (Edmonds 1973): r_u trees are rooted at each compute node u, R = sum r_u in all. They exist within the capacities c
(switches taken as plain nodes) iff a source s with edges s -> u of capacity r_u can send R to each compute node v on its own.

Two shortcuts keep the number of flows small. Once v is known to get R, no cut that parts it from s is too small, so v may be
merged with s for all later questions. And sum_u min(s -> u, u -> v) is a flow already: where that is R, none has to be sought.

What switches can pass on: a part of the capacities in which as much enters each switch as leaves it, and all trees still fit.

    find whole numbers 0 <= c'_e <= c_e, as large in sum as can be, such that
        in c'  =  out c'                                     at each switch
        c'(links out of S)  >=  sum over u in S of r_u       for every set S that leaves out a compute node

r_u trees are rooted at u; the last line is Edmonds' condition. Which part is taken matters: two hosts that send 5 each
and receive 1 and 100 are served by 1 and 9, and not by 0 and 10, of which the sum is the same. There are too many S to write
down; the program starts with single nodes and adds what its own solution violates. HiGHS solves a round in milliseconds.
"""

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array
from scipy.sparse.csgraph import breadth_first_order, maximum_flow

from thinwire.collectives.synthesis.graph import Counts, Floats, Mask, Matrix

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


def balanced_part(capacity: Matrix, roots: Counts) -> Matrix | None:
    """A part of `capacity` as above; None if there is none, not even of `capacity` itself.

    capacity: trees that each link may carry. roots: trees of each compute node; these are the first nodes, the others switch.
    """
    if violated_cut(capacity, roots) is not None:
        return None
    if bool((capacity.sum(0) == capacity.sum(1))[len(roots) :].all()):
        return capacity
    links = np.argwhere(capacity)
    most = np.minimum(capacity[links[:, 0], links[:, 1]], roots.sum())  # more trees than there are no link has to carry
    rules = [LinearConstraint(switch_balance(links, len(roots), len(capacity)), 0, 0)]
    rules += [_leaves(links, np.arange(len(capacity)) != node, roots) for node in range(len(roots))]
    while True:
        done = milp(-np.ones(len(links)), integrality=np.ones(len(links)), bounds=Bounds(0, most), constraints=rules)
        if done.x is None:
            return None
        part = np.zeros_like(capacity)
        part[links[:, 0], links[:, 1]] = np.rint(done.x).astype(np.int64)
        failure = violated_cut(part, roots)
        if failure is None:
            return part
        rules.append(_leaves(links, failure[2], roots))


def switch_balance(links: Matrix, computes: int, size: int) -> Floats:
    """A row for each switch, the nodes from `computes` to `size`: 1 for links into it, -1 for links out of it."""
    switches = np.arange(computes, size)[:, None]
    return (links[:, 1] == switches) * 1.0 - (links[:, 0] == switches)


def _leaves(links: Matrix, inside: Mask, roots: Counts) -> LinearConstraint:
    """Enough goes out of these nodes for the trees that are rooted in them."""
    crossing = inside[links[:, 0]] & ~inside[links[:, 1]]
    return LinearConstraint(crossing.astype(float), float(roots @ inside[: len(roots)]), np.inf)
