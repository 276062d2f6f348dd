"""All-gather and all-to-all in ceil(lg p) steps, any number of ranks, for short messages.

All sums mod p.

    all-gather   step k: rank r sends to r - 2^k the first min(2^k, p - 2^k) of the blocks r, r+1, .. that it has. (p-1) n bytes.
    all-to-all   the block from s to t goes the distance d = t - s. step k: whoever has a block with bit k of d set sends it on
                 to rank + 2^k. Fewer messages than pairwise, but each block travels once per set bit: about n/2 lg p bytes.

(Bruck, Ho, Kipnis, Upfal, Weathersby, Efficient algorithms for all-to-all communications in multiport message-passing
systems, 1997.)
"""

from thinwire.collectives.schedules.combine import bundled, reverse
from thinwire.collectives.schedules.schedule import Message, Schedule, whole_blocks


def all_gather(p: int) -> Schedule:
    """Blocks of one message may lie apart and wrap around."""
    steps = []
    for k in range((p - 1).bit_length()):
        some = range(min(1 << k, p - (1 << k)))
        steps.append(tuple(Message(r, (r - (1 << k)) % p, tuple(sorted((r + i) % p for i in some))) for r in range(p)))
    return Schedule(op="all_gather", p=p, chunks=whole_blocks(p), steps=tuple(steps), name="Bruck")


def reduce_scatter(p: int) -> Schedule:
    """The all-gather backwards."""
    return reverse(all_gather(p), "Bruck")


def all_to_all(p: int) -> Schedule:
    """Ranks in between store blocks that are not for them."""
    steps = []
    for k in range((p - 1).bit_length()):
        moves = []
        for block in range(p * p):
            source, distance = block // p, (block % p - block // p) % p
            if distance >> k & 1:
                holder = (source + distance % (1 << k)) % p
                moves.append(Message(holder, (holder + (1 << k)) % p, (block,)))
        steps.append(bundled(moves))
    return Schedule(op="all_to_all", p=p, chunks=whole_blocks(p * p), steps=tuple(steps), name="Bruck")
