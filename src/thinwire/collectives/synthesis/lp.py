"""The least time in which the links hold broadcast trees, reduce trees or both at once, roots given or free: a linear program.

    min T   over T, x_u >= 0 (sum x = 1: how much of the message has its root at u), c'_e, c''_e >= 0
    c'_e + c''_e <= b_e T                          what reduce and broadcast trees take of link e
    c', c'' enter and leave each switch in equal amounts
    for every set S that leaves out a compute node:   c''(links out of S) >= x(S),   c'(links into S) >= x(S)

The last line is Edmonds' condition for trees of total weight 1. There are too many S to write down; the program starts with
single nodes and adds those that its own solution violates, which maximum flows find. HiGHS solves a round in milliseconds.
A second objective, the least sum of c, keeps trees from taking detours.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog
from scipy.sparse import coo_array, csr_array, vstack

from thinwire.collectives.synthesis.flow import least_cut
from thinwire.collectives.synthesis.graph import Graph, Mask

Floats = NDArray[np.float64]
_SCALE = 10**8
_TOLERANCE = 1e-7
_ROUNDS = 400


@dataclass(frozen=True, slots=True)
class Sharing:
    """time: for a message of size 1 (in the graph's unit). roots: x. reduce, broadcast: c' and c'' on each pair of nodes."""

    time: float
    roots: Floats
    reduce: Floats
    broadcast: Floats


def share_links(graph: Graph, *, reduce: bool, broadcast: bool, roots: Floats | None = None) -> Sharing:
    """The optimum of the program above, with as little of the links as its time allows. roots: x where it is given."""
    return _Program(graph, (reduce, broadcast), roots).solve()


def least_time(graph: Graph, *, reduce: bool, broadcast: bool, roots: Floats | None = None, known: float | None = None) -> float:
    """The time of the optimum alone. known: a time that can be reached; if no less is possible, this ends once that shows."""
    return _Program(graph, (reduce, broadcast), roots).time(known)


class _Program:
    """Columns: T, x of each compute node, then c of each link for each phase that is asked for."""

    def __init__(self, graph: Graph, wanted: tuple[bool, bool], roots: Floats | None) -> None:
        self._graph = graph
        self._links = np.array(sorted(graph.capacity))
        self._rates = np.array([float(graph.capacity[a, b]) for a, b in self._links])
        self._unit = float(self._rates.max())
        self._phases = [phase for phase in (0, 1) if wanted[phase]]
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
        objective = np.eye(1, self._columns)[0]
        enough = None if known is None else known * self._unit * (1 - 1e-9)
        return float(self._converged(objective, None, enough)[0]) / self._unit

    def solve(self) -> Sharing:
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
        rows = [csr_array(self._capacity_rows()), *self._cuts]
        limits = np.zeros(count + len(self._cuts))
        equal, amounts = self._equalities()
        bounds: list[tuple[float, float | None]] = [(0, time)]
        if self._roots is None:
            bounds += [(0, 1)] * computes
        else:
            bounds += [(float(share), float(share)) for share in self._roots]
        bounds += [(0, None)] * (len(self._phases) * count)
        done = linprog(
            objective, A_ub=vstack(rows, format="csr"), b_ub=limits, A_eq=equal, b_eq=amounts, bounds=bounds, method="highs"
        )
        assert done.status == 0, f"{self._graph.name}: {done.message}"
        return np.asarray(done.x)

    def _capacity_rows(self) -> coo_array:
        """Sum of the phases on a link - b T <= 0."""
        count = len(self._links)
        place = np.arange(count)
        columns = [self._at[phase] + place for phase in self._phases]
        values = np.concatenate([np.ones(count * len(columns)), -self._rates / self._unit])
        rows = np.concatenate([place] * (len(columns) + 1))
        return coo_array((values, (rows, np.concatenate([*columns, np.zeros(count, dtype=int)]))), shape=(count, self._columns))

    def _equalities(self) -> tuple[csr_array, Floats]:
        """sum x = 1, and what enters a switch leaves it, in each phase."""
        computes = self._graph.computes
        switches = range(computes, len(self._graph.nodes))
        table = np.zeros((1 + len(switches) * len(self._phases), self._columns))
        table[0, 1 : 1 + computes] = 1
        row = 1
        for start in self._at.values():
            for switch in switches:
                table[row, start : start + len(self._links)] = (self._links[:, 1] == switch) * 1.0 - (self._links[:, 0] == switch)
                row += 1
        return csr_array(table), np.eye(1, len(table))[0]

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
                value, inside = least_cut(graph, size, node)
                if value < needed:
                    found |= self._add(inside[:size])
                else:
                    graph[size, node] = _SCALE
        return found
