"""All-reduce on racks, and on a two-dimensional torus.

R racks, rack i of m_i ranks in a given order, n bytes. Three phases, rings all of them:

    in each rack    m_i - 1 steps   reduce-scatter: rank j of rack i ends with part j of m_i equal parts, summed over the rack
    between racks   2 (R-1) steps   all-reduce of each piece among the R ranks, one of each rack, that hold it
    in each rack    m_i - 1 steps   all-gather

Where racks are of unequal size, pieces are what no border of any rack's parts cuts: borders are the multiples of 1/m_i for all i,
and weights of pieces multiples of 1 / lcm(m_i). A rack's uplink carries 2 (R-1)/R n, whatever its size (a ring through all N
ranks: 2 (N-1)/N n). In segments (`combine.pipelined`) the phases of different segments overlap:

    T -> max(2 (N-1)/N n / card, 2 (R-1)/R n / uplink)

(BlueConnect, Cho et al. 2019; the phases: Mikami et al., Massively distributed SGD, 2018.)

Torus, a grid of k x l ranks: half of the vector takes rows as racks, the other half columns, so that the links along both are
busy in every phase. 2 (k-1) + 2 (l-1) steps, 2 (p-1)/p n bytes. (Sack and Gropp 2015.)
"""

from collections.abc import Iterable, Sequence
from math import lcm

from thinwire.collectives.schedules.combine import bundled, overlaid, together
from thinwire.collectives.schedules.ring import around
from thinwire.collectives.schedules.schedule import Chunk, Schedule, Step
from thinwire.errors import UserError


def all_reduce(racks: Sequence[Sequence[int]]) -> Schedule:
    """`racks` lists the ranks of each rack, in the order of its ring; meant to be run in segments."""
    ranks = [rank for rack in racks for rank in rack]
    if sorted(ranks) != list(range(len(ranks))) or not all(racks):
        raise UserError(
            f"racks {[list(rack) for rack in racks]} must name each rank from 0 to {max(len(ranks) - 1, 0)} once, none empty"
        )
    num_racks, unit = len(racks), lcm(*(len(rack) for rack in racks))
    borders = sorted({place * unit // len(rack) for rack in racks for place in range(len(rack))})
    weights = [last - first for first, last in zip(borders, [*borders[1:], unit], strict=True)]
    chunks = tuple(Chunk(0, weight) for weight in weights for _ in racks)

    in_racks = []
    for rack in racks:
        parts: list[list[int]] = [[] for _ in rack]
        for piece, first in enumerate(borders):
            parts[first * len(rack) // unit] += range(piece * num_racks, (piece + 1) * num_racks)
        in_racks.append((rack, [tuple(part) for part in parts]))
    between = []
    for piece, first in enumerate(borders):
        holders = [rack[first * len(rack) // unit] for rack in racks]
        between.append((holders, [(piece * num_racks + which,) for which in range(num_racks)]))

    steps = (
        *_all(in_racks, reduce=True),
        *_all(between, reduce=True),
        *_all(between, reduce=False),
        *_all(in_racks, reduce=False),
    )
    return Schedule(op="all_reduce", p=len(ranks), chunks=chunks, steps=steps, name=f"hierarchy of {num_racks} racks")


def torus(grid: Sequence[Sequence[int]]) -> Schedule:
    """`grid` lists the ranks of each row; neighbours in rows and columns, and their ends, are linked."""
    if len({len(row) for row in grid}) != 1:
        raise UserError(f"grid {[list(row) for row in grid]}: all rows of a torus have the same length")
    columns = list(zip(*grid, strict=True))
    return together([all_reduce(grid), all_reduce(columns)], f"{len(grid)} x {len(columns)} torus")


def _all(rings: Iterable[tuple[Sequence[int], Sequence[tuple[int, ...]]]], *, reduce: bool) -> list[Step]:
    """Rings (order, parts) at the same time; what goes between the same two ranks in one step is one message."""
    return [bundled(step) for step in overlaid(around(order, parts, reduce) for order, parts in rings)]
