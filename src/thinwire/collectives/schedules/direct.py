"""All pairs: direct all-gather, reduce-scatter, all-reduce and all-to-all; weighted by the ranks' cards; parameter servers.

Rank i sends each other rank j, in the order i+1, i+2, ... (mod p), the part that j owns. One step for a reduce-scatter, one
for an all-gather. The owner of a part adds the contributions in a fixed order.

Weighted: rank i owns the share w_i of the vector, sum w_i = 1. It sends (and gets) 1 - w_i in the reduce-scatter and (p-1) w_i
in the all-gather, 1 + (p-2) w_i together. Run in segments (`combine.pipelined`), so that the all-gather of one overlaps the
reduce-scatter of the next, this takes on a switch that does not block, cards of b_i bytes/s in each direction, vector of M bytes:

    T = M max_i (1 + (p-2) w_i) / b_i,  least where w_i ~ max(0, b_i t - 1),  t = max(1 / min b, 2 (p-1) / sum b)

which is the least possible: every rank must send M and get M, and all together 2 (p-1) M. A slow rank owns little or nothing.
(hivemind finds such shares by a linear program; here they are a closed form.)

Parameter servers: only k ranks own parts, M/k each; the others send each of them its part and get the sum back: many to one, then
one to many. (Li et al., Scaling distributed machine learning with the parameter server, 2014.)

All-to-all, each block straight to its rank: all in one step; or pairwise: in step k = 1 .. p-1 rank r sends to r + k and gets
from r - k (mod p), so that each card always sends one message and gets one. (p-1)/p n bytes, the least possible. (Thakur 2005.)
"""

from collections.abc import Sequence
from dataclasses import replace
from math import floor

from thinwire.collectives.schedules.combine import reverse, then
from thinwire.collectives.schedules.schedule import Message, Schedule, whole_blocks
from thinwire.errors import UserError


def all_gather(p: int) -> Schedule:
    """Each rank sends its block to all others."""
    step = tuple(Message(i, (i + k) % p, (i,)) for k in range(1, p) for i in range(p))
    return Schedule(op="all_gather", p=p, chunks=whole_blocks(p), steps=(step,) if step else (), name="direct")


def reduce_scatter(p: int) -> Schedule:
    """Each rank sends every other its contribution."""
    return reverse(all_gather(p), "direct")


def all_reduce(p: int, shares: Sequence[int] = ()) -> Schedule:
    """Rank r adds up and hands out shares[r] of the vector (integers; default: all equal; 0: nothing)."""
    return then(reduce_scatter(p), all_gather(p), "weighted direct" if shares else "direct", shares)


def all_to_all(p: int) -> Schedule:
    """In one step."""
    schedule = pairwise(p)
    return replace(schedule, steps=(schedule.messages,) if p > 1 else (), name="direct")


def pairwise(p: int) -> Schedule:
    """All-to-all in p - 1 steps."""
    steps = tuple(tuple(Message(r, (r + k) % p, (r * p + (r + k) % p,)) for r in range(p)) for k in range(1, p))
    return Schedule(op="all_to_all", p=p, chunks=whole_blocks(p * p), steps=steps, name="pairwise")


def parameter_server(p: int, servers: Sequence[int]) -> Schedule:
    """All-reduce through the ranks `servers`, which own equal parts. They contribute like all others."""
    if not servers or len(set(servers)) < len(servers) or not set(servers) <= set(range(p)):
        raise UserError(f"servers = {list(servers)}; they must be one or more different ranks of 0 to {p - 1}")
    shares = [int(rank in servers) for rank in range(p)]
    return then(reduce_scatter(p), all_gather(p), f"parameter server, {len(servers)} of {p}", shares)


def best_shares(rates_bps: Sequence[float], total: int = 1000) -> tuple[int, ...]:
    """Integers that sum to `total`, in proportion to the best w_i for cards of these rates; see the top of the file."""
    p = len(rates_bps)
    if not rates_bps or min(rates_bps) <= 0:
        raise UserError(f"rates_bps = {list(rates_bps)}; there must be one or more, all above 0")
    t = max(1 / min(rates_bps), 2 * (p - 1) / sum(rates_bps))
    spare = [max(0.0, rate * t - 1) for rate in rates_bps]
    if sum(spare) < 1e-9 * p:  # two equal ranks: any shares do
        spare = [1.0] * p
    exact = [total * one / sum(spare) for one in spare]
    shares = [floor(one + 1e-9) for one in exact]
    by_rest = sorted(range(p), key=lambda rank: shares[rank] - exact[rank])
    for rank in by_rest[: total - sum(shares)]:
        shares[rank] += 1
    return tuple(shares)
