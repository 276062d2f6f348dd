"""Groups whose collectives are schedules fixed by a test, over gloo or MPI; each op once on them, and what one process gets."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from thinwire.collectives.backend import ALL_GATHER, REDUCE_SCATTER
from thinwire.collectives.ledger import Ledger
from thinwire.collectives.run.transport import InnerFactory
from thinwire.collectives.scheduled import register_scheduled
from thinwire.collectives.schedules import direct, ring, rooted
from thinwire.collectives.schedules.combine import pipelined
from thinwire.collectives.tuned import tuner as tuner_module
from thinwire.collectives.tuned.advice import Advisor
from thinwire.collectives.tuned.implementation import NATIVE, Implementation
from thinwire.collectives.tuned.tuner import Tuner


class Fixed(Advisor):
    """Always a schedule of ours, or the native collective on ranks in another order."""

    def __init__(self, reordered: bool = False) -> None:
        super().__init__()
        self.reordered, self.asked = reordered, 0

    def implementations(self, op: str, message_bytes: int, ranks: Any, root: int) -> list[Implementation]:
        self.asked += 1
        p = len(ranks)
        order = [(root + place) % p for place in range(p)]
        made = {
            "all_reduce": lambda: pipelined(direct.all_reduce(p, [*range(1, p), 0]), 3),
            "reduce_scatter": lambda: ring.reduce_scatter(range(p)),
            "all_gather": lambda: ring.bidirectional(ring.all_gather, range(p)),
            "broadcast": lambda: pipelined(rooted.broadcast(rooted.chain(order)), 4),
            "reduce": lambda: pipelined(rooted.reduce(rooted.chain(order)), 4),
            "all_to_all": lambda: direct.pairwise(p),
        }[op]()
        if self.reordered and op in ("all_reduce", "broadcast", "reduce"):
            return [Implementation("native reordered", None, tuple(reversed(range(p))))]
        return [Implementation(made.name, made), NATIVE]


def fixed(reordered: bool = False) -> Tuner:
    return Tuner(Fixed(reordered), measures=False)


@contextmanager
def quick(stale: float = float("inf")) -> Iterator[None]:
    """Tuners measure as little as they can. stale: from which factor on a choice is; by default never."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"STALE": stale, "MOST_TURNS": 1, "REPEATED": 1, "TURNS": 1}.items():
            patch.setattr(tuner_module, name, value)
        yield


def group_of(
    ledger: Ledger, tuner: Tuner, ranks: list[int] | None = None, timeout_s: float = 60, inner: InnerFactory | None = None
) -> dist.ProcessGroup:
    name = f"scheduled{id(tuner)}"  # a backend of its own, made by the same line on every rank
    names = [name]
    dist.broadcast_object_list(names, 0)
    register_scheduled(ledger, tuner, names[0], inner)
    return dist.new_group(ranks, backend=names[0], timeout=timedelta(seconds=timeout_s))


def given(rank: int, n: int, dtype: torch.dtype) -> torch.Tensor:
    """Integers, so that the order of additions cannot be seen."""
    return torch.randint(-8, 8, (n,), generator=torch.Generator().manual_seed(rank)).to(dtype)


def everything(group: dist.ProcessGroup, dtype: torch.dtype, device: str = "cpu") -> dict[str, torch.Tensor]:
    """Each op once."""
    p = group.size()
    root = dist.get_global_rank(group, p - 1)
    results: dict[str, torch.Tensor] = {}

    def fresh() -> torch.Tensor:
        return given(dist.get_rank(), 6 * p, dtype).to(device)

    def zeros(n: int) -> torch.Tensor:
        return torch.zeros(n, dtype=dtype, device=device)

    for name, op in {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}.items():
        results[name] = fresh()
        dist.all_reduce(results[name], op, group=group)
    results["transposed"] = fresh().view(2, -1).t()
    work = dist.all_reduce(results["transposed"], group=group, async_op=True)
    work.wait()
    results["broadcast"] = fresh()
    dist.broadcast(results["broadcast"], root, group=group)
    reduced = fresh()
    dist.reduce(reduced, root, group=group)
    results["reduce"] = reduced if dist.get_rank() == root else fresh()
    results["all_gather"] = zeros(6 * p * p)
    ALL_GATHER(results["all_gather"], fresh(), group=group)
    results["reduce_scatter"] = zeros(6)
    REDUCE_SCATTER(results["reduce_scatter"], fresh(), group=group)
    results["all_to_all"] = zeros(6 * p)
    dist.all_to_all_single(results["all_to_all"], fresh(), group=group)
    results["list"] = zeros(6 * p * p)
    dist.all_gather(list(results["list"].chunk(p)), fresh(), group=group)
    return results


def alone(rank: int, p: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What `everything` must give on `rank` of a group of all p ranks."""
    parts = torch.stack([given(other, 6 * p, dtype) for other in range(p)])
    total = parts.sum(0, dtype=dtype)
    return {
        "sum": total,
        "max": parts.amax(0),
        "min": parts.amin(0),
        "transposed": total.view(2, -1).t(),
        "broadcast": parts[-1],
        "reduce": total if rank == p - 1 else parts[rank],
        "all_gather": parts.flatten(),
        "reduce_scatter": total.chunk(p)[rank],
        "all_to_all": torch.cat([row.chunk(p)[rank] for row in parts]),
        "list": parts.flatten(),
    }


def sent_of_an_all_reduce(group: dist.ProcessGroup, ledger: Ledger, n: int = 600) -> tuple[int, float]:
    """Bytes that an all-reduce of n values among 4 ranks enters, and those that `Fixed`'s schedule sends."""
    dist.all_reduce(torch.zeros(n), group=group)  # agrees upon it
    before = ledger.sent_bytes
    dist.all_reduce(torch.zeros(n), group=group)
    # shares 1, 2, 3, 0 of 6: a rank sends what it does not own, and its own share to the three others
    share = [1, 2, 3, 0][dist.get_rank()] / 6
    return ledger.sent_bytes - before, round(4 * n * (1 - share + 3 * share))


def digests(group: dist.ProcessGroup) -> list[str]:
    """Of results whose bits show in which order numbers were added."""
    found = []
    for _ in range(2):
        values = torch.randn(10_004, generator=torch.Generator().manual_seed(dist.get_rank()))
        part = torch.empty(10_004 // group.size())
        REDUCE_SCATTER(part, values.clone(), group=group)
        dist.all_reduce(values, dist.ReduceOp.AVG, group=group)
        whole = torch.empty(10_004)
        ALL_GATHER(whole, part, group=group)
        found += [hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for tensor in (values, whole)]
    return found
