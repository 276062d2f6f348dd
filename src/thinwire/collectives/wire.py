"""Who sends how many bytes to whom in one collective call, as the backend's own algorithm does it.

gloo, as shipped with torch 2.11 to 2.15 (n = message bytes of one rank, p = ranks):

    all_reduce      ring: each rank sends 2 (p-1)/p n to its left neighbour
    reduce_scatter  n is the whole input; gloo runs an all-reduce and keeps one part: 2 (p-1)/p n
    all_gather      ring: each rank forwards p-1 messages of n to its right neighbour (n: one rank's input)
    all_to_all      each rank sends n/p to each other rank
    broadcast       binomial tree, whole messages, nearest ranks first
    reduce          ring reduce-scatter as in all_reduce, then each rank sends its n/p to the root
    gather, scatter directly to or from the root, n per rank
    send            n to the peer;  recv, barrier: nothing that counts
"""

from functools import lru_cache

from thinwire.errors import UserError

Flow = tuple[int, int, int]
"""(source, target, payload bytes), positions in the group."""

COLLECTIVES = ("all_reduce", "reduce_scatter", "all_gather", "all_to_all", "broadcast", "reduce", "gather", "scatter")
OPS = (*COLLECTIVES, "send", "recv", "barrier")


@lru_cache(maxsize=4096)
def flows(op: str, message_bytes: int, world_size: int, root: int = 0) -> tuple[Flow, ...]:
    """All flows of one call of `op` in a group of `world_size`; `root` is the root, or for "send" the peer of rank 0."""
    n, p = message_bytes, world_size
    if op not in OPS:
        raise UserError(f"unknown collective {op!r}; known: {', '.join(OPS)}")
    if p == 1 or op in ("recv", "barrier"):
        return ()
    match op:
        case "all_reduce" | "reduce_scatter":
            return tuple((rank, (rank - 1) % p, 2 * (p - 1) * n // p) for rank in range(p))
        case "all_gather":
            return tuple((rank, (rank + 1) % p, (p - 1) * n) for rank in range(p))
        case "all_to_all":
            return tuple((a, b, n // p) for a in range(p) for b in range(p) if a != b)
        case "broadcast":
            return tuple(flow for turn in binomial_rounds(n, p, root) for flow in turn)
        case "reduce":
            ring = tuple((rank, (rank - 1) % p, (p - 1) * n // p) for rank in range(p))
            return ring + tuple((rank, root, n // p) for rank in range(p) if rank != root)
        case "gather":
            return tuple((rank, root, n) for rank in range(p) if rank != root)
        case "scatter":
            return tuple((root, rank, n) for rank in range(p) if rank != root)
        case _:
            return ((0, root or 1, n),)


@lru_cache(maxsize=65536)
def sent_bytes(op: str, message_bytes: int, world_size: int, rank: int, root: int = 0) -> int:
    """Payload bytes that `rank` puts on the wire in one call of `op`."""
    if op == "send":
        return message_bytes
    return sum(size for source, _, size in flows(op, message_bytes, world_size, root) if source == rank)


def binomial_rounds(n: int, p: int, root: int) -> list[tuple[Flow, ...]]:
    """A broadcast: in round i ranks below 2^i, counted from the root, send the message to those 2^i above."""
    distances = (1 << i for i in range((p - 1).bit_length()))
    return [tuple(((v + root) % p, (v + d + root) % p, n) for v in range(min(d, p - d))) for d in distances]
