"""Switches out of the graph: each path u -> w -> t through a switch w becomes an edge u -> t between nodes that compute.

Splitting off the pair (u, w), (w, t) by g takes g from both and adds g to u -> t (nothing where u = t). A switch with in = out
can be split off completely so that all trees still exist (Bang-Jensen, Frank & Jackson 1995, used so by Zhao et al., ForestColl
2024); any order of the pairs ends well, each by the largest g that leaves every compute node reachable by R trees.

The order decides how deep the trees become, so a whole plan is tried first, and pairs one by one only where it does not hold:
    1. what enters w is spread evenly over all others, so that a root finds every other node one hop away;
    2. the same, but over pairs that nothing else joins (cards beside an NVSwitch carry what goes to other boxes).
A cut that is just large enough stays so; pairs that would shrink one are skipped without asking.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

from thinwire.collectives.synthesis.flow import max_flow, violated_cut
from thinwire.collectives.synthesis.graph import Counts, Mask, Matrix, Pair

Piece = tuple[tuple[int, ...], int]
"""A physical path (nodes, both ends included) and how many trees it carries."""

_ROUNDS = 20


@dataclass(slots=True)
class Split:
    """The graph while it loses its switches: capacities, and for each edge the physical paths behind it."""

    capacity: Matrix
    roots: Counts
    paths: dict[Pair, list[Piece]]
    tight: list[Mask] = field(default_factory=list)
    asked_last: int | None = None

    def move(self, u: int, w: int, t: int, amount: int) -> None:
        self.capacity[u, w] -= amount
        self.capacity[w, t] -= amount
        heads, tails = take(self.paths[u, w], amount), take(self.paths[w, t], amount)
        if u == t:
            return
        self.capacity[u, t] += amount
        # Put end to end; a loop in one is cut off, which only frees links.
        joined = [(_without_loops(head + tail[1:]), part) for head, tail, part in paired(heads, tails)]
        self.paths.setdefault((u, t), []).extend(joined)

    def most(self, u: int, w: int, t: int, wanted: int) -> int:
        """The largest amount up to `wanted` by which (u, w), (w, t) can be split off: none that shrinks a tight cut."""
        while wanted > 0 and not any(inside[u] == inside[t] != inside[w] for inside in self.tight):
            trial = self.capacity.copy()
            trial[u, w] -= wanted
            trial[w, t] -= wanted
            if u != t:
                trial[u, t] += wanted
            failure = violated_cut(trial, self.roots, self.asked_last)
            if failure is None:
                return wanted
            self.asked_last, missing, inside = failure
            wanted -= missing
            if wanted <= 0:
                self.tight.append(inside)
        return 0


def without_switches(capacity: Matrix, roots: Counts) -> tuple[Matrix, dict[Pair, list[Piece]]]:
    """Capacities between compute nodes alone, with as many trees as before, and the physical paths of each edge.

    capacity: balanced at every switch; roots: trees rooted at each compute node, all of which must exist.
    """
    computes = len(roots)
    paths: dict[Pair, list[Piece]] = {(a, b): [((a, b), int(capacity[a, b]))] for a, b in np.argwhere(capacity).tolist()}
    split = Split(capacity.copy(), roots, paths)
    waiting = set(range(computes, len(capacity)))
    while waiting:
        w = min(waiting, key=lambda w: _order(split.capacity, w, computes))
        waiting.remove(w)
        _remove(split, w)
    return split.capacity[:computes, :computes], split.paths


def take(pieces: list[Any], amount: Any) -> list[Any]:
    """Remove `amount` from the front of `pieces`, (what, how much) each; return what was removed."""
    taken: list[Any] = []
    while amount:
        what, size = pieces[0]
        part = min(size, amount)
        taken.append((what, part))
        amount -= part
        if part == size:
            pieces.pop(0)
        else:
            pieces[0] = what, size - part
    return taken


def paired(pieces: list[Any], others: list[Any]) -> Iterator[tuple[Any, Any, Any]]:
    """(one, other, how much of both), until both lists, which hold as much, are used up."""
    while pieces:
        (one, size), (other, left) = pieces[0], others[0]
        part = min(size, left)
        yield one, other, part
        take(pieces, part)
        take(others, part)


def _order(capacity: Matrix, w: int, computes: int) -> tuple[bool, int, int, int]:
    """The order of the switches: those between two nodes (cards), then the core (switches among switches), then small ones."""
    joined = (capacity[w] > 0) | (capacity[:, w] > 0)
    return bool(joined.sum() > 2), -int(joined[computes:].sum()), int(joined[:computes].sum()), w


def _remove(split: Split, w: int) -> None:
    plans = [_spread(split.capacity, w, allowed) for allowed in _choices(split.capacity, w, len(split.roots))]
    for plan in plans:
        trial = split.capacity.copy()
        trial[:, w] = trial[w, :] = 0
        trial += plan
        np.fill_diagonal(trial, 0)
        failure = violated_cut(trial, split.roots, split.asked_last)
        if failure is None:
            for u, t in np.argwhere(plan).tolist():
                split.move(u, w, t, int(plan[u, t]))
            return
        split.asked_last = failure[0]
    anything = np.minimum.outer(split.capacity[:, w], split.capacity[w])
    for plan in (*plans[::-1], anything):
        for u, t in np.argwhere(plan).tolist():
            wanted = min(int(plan[u, t]), int(split.capacity[u, w]), int(split.capacity[w, t]))
            split.move(u, w, t, split.most(u, w, t, wanted))
    assert not split.capacity[w].any() and not split.capacity[:, w].any(), f"switch {w} cannot be split off"


def _choices(capacity: Matrix, w: int, computes: int) -> list[Mask]:
    """Which pairs should share w: all; those that no other edge or switch joins; those in parts that no edges join."""
    others = capacity > 0
    others[:, w] = others[w, :] = False
    all_pairs = ~np.eye(len(capacity), dtype=bool)
    direct = others.copy()
    direct[computes:] = direct[:, computes:] = False
    part = connected_components(csr_array(direct), directed=False)[1]
    return [all_pairs, all_pairs & ~others & ~(others @ others), part[:, None] != part[None, :]]


def _spread(capacity: Matrix, w: int, allowed: Mask) -> Matrix:
    """An integral plan of what goes from u through w to t, as even as can be. Pairs not allowed take only what is left."""
    size = len(capacity)
    inward, outward = capacity[:, w].copy(), capacity[w].copy()
    even = np.where(allowed, np.outer(inward, outward), 0).astype(float)
    for _ in range(_ROUNDS):  # scale rows and columns to what they may carry
        for axis, limit in ((1, inward[:, None]), (0, outward[None, :])):
            even *= np.divide(
                limit, even.sum(axis, keepdims=True), out=np.zeros(limit.shape), where=even.sum(axis, keepdims=True) > 0
            )
    even *= np.minimum(1, np.divide(inward[:, None], np.maximum(even.sum(1, keepdims=True), 1e-9)))
    plan = np.floor(even + 1e-6).astype(np.int64)
    most = np.minimum.outer(inward, outward)
    for limit in (np.where(even > 0, 1, 0), np.where(allowed, most, 0), np.where(np.eye(size, dtype=bool), 0, most)):
        plan += _filled(inward - plan.sum(1), outward - plan.sum(0), limit)
    plan[np.diag_indices(size)] += inward - plan.sum(1)
    return plan


def _filled(rows: Counts, columns: Counts, limit: Matrix) -> Matrix:
    """As much as fits into the remaining rows and columns, at most `limit` in each place."""
    size = len(rows)
    if not rows.any() or not limit.any():
        return np.zeros_like(limit)
    graph = np.zeros((2 * size + 2, 2 * size + 2), dtype=np.int64)
    graph[2 * size, :size] = rows
    graph[:size, size : 2 * size] = limit
    graph[size : 2 * size, 2 * size + 1] = columns
    return np.maximum(max_flow(graph, 2 * size, 2 * size + 1)[1], 0)[:size, size : 2 * size]


def _without_loops(path: tuple[int, ...]) -> tuple[int, ...]:
    kept: list[int] = []
    for node in path:
        if node in kept:
            del kept[kept.index(node) :]
        kept.append(node)
    return tuple(kept)
