"""What each collective means, in one table: who contributes to a block, and who must end with it.

The data of an op are cut into blocks, numbered. p = ranks:

    op              blocks   block b comes from   block b is due at
    all_reduce      1        all ranks            all ranks
    reduce          1        all ranks            the root
    broadcast       1        the root             all ranks
    reduce_scatter  p        all ranks            rank b
    all_gather      p        rank b               all ranks
    gather          p        rank b               the root
    scatter         p        the root             rank b
    all_to_all      p*p      rank b // p          rank b % p

A block that comes from several ranks is their sum (or maximum, ...). The input of a rank is the blocks that come from it, one
behind the other in the order of their numbers; its output is the blocks that are due at it, likewise.
"""

from collections.abc import Iterable, Sequence
from itertools import accumulate

_OPS = {
    "all_reduce": (0, "all", "all"),
    "reduce": (0, "all", "root"),
    "broadcast": (0, "root", "all"),
    "reduce_scatter": (1, "all", "block"),
    "all_gather": (1, "block", "all"),
    "gather": (1, "block", "root"),
    "scatter": (1, "root", "block"),
    "all_to_all": (2, "row", "column"),
}
"""(x, comes from, due at): there are p ** x blocks; "block" is rank b, "row" b // p and "column" b % p."""

OPS = tuple(_OPS)


def rooted(op: str) -> bool:
    """Whether one rank is special."""
    return "root" in _OPS[op]


def num_blocks(op: str, p: int) -> int:
    """Blocks of `op` among p ranks."""
    return int(p ** _OPS[op][0])


def sources(op: str, p: int, root: int | None, block: int) -> tuple[int, ...]:
    """The ranks that contribute to `block`."""
    return _ranks(_OPS[op][1], p, root, block)


def targets(op: str, p: int, root: int | None, block: int) -> tuple[int, ...]:
    """The ranks at which `block` is due."""
    return _ranks(_OPS[op][2], p, root, block)


def message_blocks(op: str, p: int) -> int:
    """Equal blocks that make up the message of `op`: what each rank hands to it (for a scatter: what each gets)."""
    return p if op in ("reduce_scatter", "all_to_all") else 1


def block_sizes(op: str, p: int, n: int) -> tuple[int, ...]:
    """Elements of each block for a message of n elements, as torch cuts it; where p does not divide n, as even as can be.

    n is the whole vector of a rank for all_reduce, reduce, broadcast, reduce_scatter and all_to_all, and one rank's part for
    all_gather, gather and scatter.
    """
    parts = message_blocks(op, p)
    return tuple(n * (b % p + 1) // parts - n * (b % p) // parts if parts > 1 else n for b in range(num_blocks(op, p)))


def inputs(op: str, p: int, root: int | None, rank: int) -> tuple[int, ...]:
    """Numbers of the blocks that lie in the input of `rank`, one behind the other."""
    return tuple(b for b in range(num_blocks(op, p)) if rank in sources(op, p, root, b))


def outputs(op: str, p: int, root: int | None, rank: int) -> tuple[int, ...]:
    """Numbers of the blocks that lie in the output of `rank`, one behind the other."""
    return tuple(b for b in range(num_blocks(op, p)) if rank in targets(op, p, root, b))


def offsets(blocks: Iterable[int], sizes: Sequence[int]) -> dict[int, int]:
    """Where each of `blocks` begins when they lie one behind the other; sizes[b] is the length of block b."""
    blocks = list(blocks)
    return dict(zip(blocks, accumulate((sizes[block] for block in blocks), initial=0), strict=False))


def _ranks(end: str, p: int, root: int | None, block: int) -> tuple[int, ...]:
    match end:
        case "all":
            return tuple(range(p))
        case "root":
            assert root is not None
            return (root,)
        case "row":
            return (block // p,)
        case "column":
            return (block % p,)
        case _:
            return (block,)
