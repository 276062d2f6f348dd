"""Adasum: a sum in which gradients that point the same way count once, and orthogonal ones in full.

    two ranks       A(a, b) = (1 - a.b / 2|a|^2) a + (1 - a.b / 2|b|^2) b

    a = b gives a; a.b = 0 gives a + b. A factor whose vector is zero is 1, so that A(a, 0) = a.

    2^k ranks       in round j = 0 .. k-1 rank r holds a vector v, exchanges it with rank s = r xor 2^j, and both go on with
                    v <- A(v of the lower one, v of the higher one), so with the same bits
    others          refused, as Horovod does

Each tensor has its own dot products, which are summed in float64. Vectors travel as they are, several tensors together; of
float16 and bfloat16 the arithmetic is float32, rounded after each round. A rank sends k times its vector.

Maleki, Musuvathi, Mytkowicz, Saarikivi et al. 2020, Scaling Distributed Training with Adaptive Summation, arXiv:2006.02924.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist

from thinwire.collectives.ledger import Ledger
from thinwire.collectives.metered_calls import swap


def power_of_two(ranks: int) -> bool:
    """Whether Adasum knows what to do with so many."""
    return ranks & (ranks - 1) == 0


def adasum(flat: torch.Tensor, sizes: Sequence[int], group: dist.ProcessGroup, ledger: Ledger) -> torch.Tensor:
    """[sum of sizes] -> the same of all ranks of `group`, bit-equal on each; `sizes`: values of each tensor. Collective."""
    rank, distance = group.rank(), 1
    while distance < group.size():
        peer = rank ^ distance
        theirs = swap(flat, peer, group, ledger, "adasum")
        low, high = (flat, theirs) if rank < peer else (theirs, flat)
        pairs = zip(low.split(list(sizes)), high.split(list(sizes)), strict=True)
        flat = torch.cat([combine(one, other) for one, other in pairs])
        distance *= 2
    return flat


def combine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """A(a, b) of the top of the file; flat vectors of one floating dtype."""
    x, y = a.double(), b.double()
    dot = torch.dot(x, y)
    wide = torch.float64 if a.dtype == torch.float64 else torch.float32
    total = _factor(dot, x).to(wide) * a.to(wide) + _factor(dot, y).to(wide) * b.to(wide)
    return total.to(a.dtype)


def _factor(dot: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    square = torch.dot(vector, vector)
    return torch.where(square > 0, 1 - dot / (2 * square), 1.0)
