"""All-to-all, each block straight to where it is due: in step k = 1 .. p-1 rank r sends to r + k and gets from r - k (mod p).

At every time each card sends one message and gets one. (p-1)/p n bytes, the least possible; p - 1 steps. (Thakur et al. 2005.)
"""

from thinwire.collectives.schedules.schedule import Chunk, Message, Schedule


def all_to_all(p: int) -> Schedule:
    """Any p."""
    steps = tuple(tuple(Message(r, (r + k) % p, (r * p + (r + k) % p,)) for r in range(p)) for k in range(1, p))
    return Schedule(op="all_to_all", p=p, chunks=tuple(Chunk(block) for block in range(p * p)), steps=steps, name="pairwise")
