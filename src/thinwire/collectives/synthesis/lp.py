"""The least time in which the links hold broadcast trees, reduce trees or both at once, roots given or free: a linear program.

    min T   over T, x_u >= 0 (sum x = 1: how much of the message has its root at u), c'_e, c''_e >= 0
    c'_e + c''_e <= b_e T                          what reduce and broadcast trees take of link e
    c', c'' enter and leave each switch in equal amounts
    for every set S that leaves out a compute node:   c''(links out of S) >= x(S),   c'(links into S) >= x(S)

The last line is Edmonds' condition for trees of total weight 1. There are too many S to write down; the program starts with
single nodes and adds those that its own solution violates, which maximum flows find. HiGHS solves a round in milliseconds.
A second objective, the least sum of c, keeps trees from taking detours.

An all-reduce is both at once: reduce-scatter and all-gather overlap, and roots may carry unequal shares. Where links are equal it
takes as long as the one after the other. Where one node is slow it is up to twice as fast: the slow node owns no share, and while
some links carry sums to the roots others carry results away.
"""

from dataclasses import dataclass

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import block_diag, csr_array, eye_array, hstack, vstack

from thinwire.collectives.synthesis.flow import min_cut, switch_balance
from thinwire.collectives.synthesis.graph import Floats, Graph, Mask
from thinwire.collectives.synthesis.optimum import optimum

_SCALE = 10**8
_TOLERANCE = 1e-7
_ROUNDS = 400
BROADCAST, BOTH = (1,), (0, 1)


@dataclass(frozen=True, slots=True)
class Sharing:
    """time: for a message of size 1 (in the graph's unit). roots: x. reduce, broadcast: c' and c'' on each pair of nodes."""

    time: float
    roots: Floats
    reduce: Floats
    broadcast: Floats


def sequential_time(graph: Graph) -> float | None:
    """The time of a reduce-scatter followed by an all-gather, where switches pass on what they receive; else None."""
    if not graph.balanced():
        return None
    return float(optimum(graph).time + optimum(graph.reversed()).time) / graph.world_size


def all_reduce_time(graph: Graph) -> float:
    """The least time of an all-reduce of a message of size 1, in the graph's unit; / graph.bytes_per_s: seconds a byte."""
    return TreeProgram(graph, BOTH).time(sequential_time(graph)) if graph.computes > 1 else 0.0


class TreeProgram:
    """The program above. Columns: T, x of each compute node, then c of each link for each phase."""

    def __init__(self, graph: Graph, phases: tuple[int, ...], roots: Floats | None = None) -> None:
        """phases: BROADCAST, or BOTH. roots: x where it is given."""
        self._graph = graph
        self._links = np.array(sorted(graph.capacity))
        self._rates = np.array([float(graph.capacity[a, b]) for a, b in self._links])
        self._unit = float(self._rates.max())
        self._phases = phases
        self._roots = roots
        computes, count = graph.computes, len(self._links)
        self._columns = 1 + computes + len(self._phases) * count
        self._at = {phase: 1 + computes + place * count for place, phase in enumerate(self._phases)}
        self._cuts: list[csr_array] = []
        self._known: set[bytes] = set()
        for node in range(computes):
            alone = np.arange(len(graph.nodes)) == node
            self._add(alone)
            self._add(~alone)

    def time(self, known: float | None = None) -> float:
        """The least T. known: a time that can be reached; if no less is possible, this ends once that shows."""
        objective = np.eye(1, self._columns)[0]
        enough = None if known is None else known * self._unit * (1 - 1e-9)
        return float(self._converged(objective, None, enough)[0]) / self._unit

    def solve(self) -> Sharing:
        """The optimum, with as little of the links as its time allows."""
        time = self.time() * self._unit
        objective = np.zeros(self._columns)
        objective[1 + self._graph.computes :] = 1
        solution = self._converged(objective, time * (1 + 1e-9))
        parts = [self._part(solution, phase) for phase in (0, 1)]
        return Sharing(time / self._unit, solution[1 : 1 + self._graph.computes], parts[0], parts[1])

    def _part(self, solution: Floats, phase: int) -> Floats:
        matrix = np.zeros((len(self._graph.nodes),) * 2)
        if phase in self._at:
            start = self._at[phase]
            matrix[self._links[:, 0], self._links[:, 1]] = solution[start : start + len(self._links)]
        return matrix

    def _converged(self, objective: Floats, time: float | None, enough: float | None = None) -> Floats:
        for _ in range(_ROUNDS):
            solution = self._once(objective, time)
            if (enough is not None and solution[0] >= enough) or not self._separate(solution):
                return solution
        raise AssertionError(f"{self._graph.name}: cuts were still violated after {_ROUNDS} rounds")

    def _once(self, objective: Floats, time: float | None) -> Floats:
        computes, count = self._graph.computes, len(self._links)
        rows = [self._capacity_rows(), *self._cuts]
        limits = np.zeros(count + len(self._cuts))
        equal, amounts = self._equalities()
        shares = [(0.0, 1.0)] * computes if self._roots is None else [(share, share) for share in self._roots.tolist()]
        bounds = [(0, time), *shares, *[(0, None)] * (len(self._phases) * count)]
        done = linprog(
            objective, A_ub=vstack(rows, format="csr"), b_ub=limits, A_eq=equal, b_eq=amounts, bounds=bounds, method="highs"
        )
        assert done.status == 0, f"{self._graph.name}: {done.message}"
        return np.asarray(done.x)

    def _capacity_rows(self) -> csr_array:
        """Sum of the phases on a link - b T <= 0."""
        count, computes = len(self._links), self._graph.computes
        times = np.pad(-self._rates[:, None] / self._unit, ((0, 0), (0, computes)))
        return hstack([csr_array(times), *[eye_array(count)] * len(self._phases)], format="csr")

    def _equalities(self) -> tuple[csr_array, Floats]:
        """sum x = 1, and what enters a switch leaves it, in each phase."""
        computes = self._graph.computes
        shares = np.zeros((1, self._columns - len(self._phases) * len(self._links)))
        shares[0, 1 : 1 + computes] = 1
        balance = switch_balance(self._links, computes, len(self._graph.nodes))
        table = block_diag([shares, *[balance] * len(self._phases)], format="csr")
        return table, np.eye(1, table.shape[0])[0]

    def _add(self, inside: Mask) -> bool:
        """The rows of a cut, for each phase: x(S) - c(out of S, or into it) <= 0. False if they are there already."""
        key = inside.tobytes()
        if key in self._known or inside[: self._graph.computes].all():
            return False
        self._known.add(key)
        for phase, start in self._at.items():
            row = np.zeros(self._columns)
            row[1 : 1 + self._graph.computes] = inside[: self._graph.computes]
            tails, heads = (self._links[:, 1], self._links[:, 0]) if phase == 0 else (self._links[:, 0], self._links[:, 1])
            row[start : start + len(self._links)] = -(inside[tails] & ~inside[heads]).astype(float)
            self._cuts.append(csr_array(row[None, :]))
        return True

    def _separate(self, solution: Floats) -> bool:
        """Add the cuts that `solution` violates. False if there is none."""
        computes, size = self._graph.computes, len(self._graph.nodes)
        found = False
        for phase in self._phases:
            part = self._part(solution, phase)
            graph = np.zeros((size + 1, size + 1), dtype=np.int64)
            graph[:size, :size] = np.rint(np.minimum(part if phase else part.T, 1.0) * _SCALE)
            graph[size, :computes] = np.rint(solution[1 : 1 + computes] * _SCALE)
            needed = int(graph[size].sum()) - int(_TOLERANCE * _SCALE) - size
            for node in range(computes):
                value, inside = min_cut(graph, size, node)
                if value < needed:
                    found |= self._add(inside[:size])
                else:
                    graph[size, node] = _SCALE
        return found
