"""What switches can pass on: a part of the capacities in which as much enters each switch as leaves it, and all trees still fit.

    find whole numbers 0 <= c'_e <= c_e, as large in sum as can be, such that
        in c'  =  out c'                                     at each switch
        c'(links out of S)  >=  sum over u in S of r_u       for every set S that leaves out a compute node

r_u trees are rooted at u; the last line is Edmonds' condition (`flow`). Which part is taken matters: two hosts that send 5 each
and receive 1 and 100 are served by 1 and 9, and not by 0 and 10, of which the sum is the same. There are too many S to write
down; the program starts with single nodes and adds what its own solution violates. HiGHS solves a round in milliseconds.
"""

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from thinwire.collectives.synthesis.flow import violated_cut
from thinwire.collectives.synthesis.graph import Counts, Floats, Mask, Matrix


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
