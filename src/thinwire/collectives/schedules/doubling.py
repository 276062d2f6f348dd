"""Few steps for short vectors: recursive doubling, and recursive halving and doubling (Rabenseifner). Any number of ranks.

m = the greatest power of two that is not above p. If m < p, the ranks 2j and 2j+1 with j < p - m form pairs: the even one hands
its vector to the odd one before, and gets the result from it after. The other m ranks, renumbered 0 to m-1, do the rest:

    recursive doubling   step k: ranks whose numbers differ in bit k swap whole vectors and add them. lg m steps, n bytes each.
                         Both compute the same sum, so all ranks hold the same bits.
    Rabenseifner         halving, k = 0, 1, ..: partners in bit k each keep one half of what they have left and swap the other,
                         added on arrival: after lg m steps each rank owns one m-th. Doubling, k = .., 1, 0: the same swaps back,
                         copied. 2 lg m steps, 2 (m-1)/m n bytes. The longest messages go to the nearest partner.

(Thakur, Rabenseifner, Gropp, Optimization of collective communication operations in MPICH, 2005; Rabenseifner 2004.)
"""

from collections.abc import Sequence

from thinwire.collectives.schedules.schedule import Chunk, Message, Schedule, Step
from thinwire.errors import UserError


def recursive_doubling(p: int) -> Schedule:
    """All-reduce in ceil(lg p) steps, or one more if p is not a power of two."""
    core, before, after = _folded(p, chunks=(0,))
    m = len(core)
    steps = [tuple(Message(core[v], core[v ^ 1 << k], (0,), True) for v in range(m)) for k in range(m.bit_length() - 1)]
    return Schedule(op="all_reduce", p=p, chunks=(Chunk(0),), steps=(*before, *steps, *after), name="recursive doubling")


def rabenseifner(p: int) -> Schedule:
    """All-reduce in 2 lg m steps, and two more of n bytes if p is not a power of two."""
    m = 1 << (p.bit_length() - 1) if p > 0 else 0
    core, before, after = _folded(p, tuple(range(m)))
    halving, doubling = [], []
    kept = [(0, m)] * m
    for k in range(m.bit_length() - 1):
        halves = [_halves(*kept[v]) for v in range(m)]
        kept = [halves[v][v >> k & 1] for v in range(m)]
        swaps = [(core[v], core[v ^ 1 << k], kept[v ^ 1 << k], kept[v]) for v in range(m)]
        halving.append(tuple(Message(a, b, tuple(range(*theirs)), True) for a, b, theirs, _ in swaps))
        doubling.append(tuple(Message(a, b, tuple(range(*mine))) for a, b, _, mine in swaps))
    steps = (*before, *halving, *reversed(doubling), *after)
    return Schedule(op="all_reduce", p=p, chunks=(Chunk(0),) * m, steps=steps, name="Rabenseifner")


def _folded(p: int, chunks: Sequence[int]) -> tuple[list[int], list[Step], list[Step]]:
    """The ranks that do the work, a power of two of them, and the steps before and after it for the others."""
    if p < 1:
        raise UserError(f"p = {p}; a schedule needs 1 rank or more")
    pairs = p - (1 << (p.bit_length() - 1))
    core = [*range(1, 2 * pairs, 2), *range(2 * pairs, p)]
    if not pairs:
        return core, [], []
    before = tuple(Message(2 * j, 2 * j + 1, tuple(chunks), True) for j in range(pairs))
    after = tuple(Message(2 * j + 1, 2 * j, tuple(chunks)) for j in range(pairs))
    return core, [before], [after]


def _halves(first: int, last: int) -> tuple[tuple[int, int], tuple[int, int]]:
    middle = (first + last) // 2
    return (first, middle), (middle, last)
