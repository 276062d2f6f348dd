"""Cases of mpi_cases.py: collectives run by schedules over MPI."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from mpi_calls import refused

from fixed_schedules import Fixed, alone, digests, everything, fixed, group_of, quick, sent_of_an_all_reduce
from thinwire.collectives.ledger import Ledger
from thinwire.collectives.mpi.start import Mpi
from thinwire.collectives.run import engine
from thinwire.collectives.tuned.cache import Cache
from thinwire.collectives.tuned.tuner import Tuner


def mpi() -> Mpi:
    """That the default group talks over."""
    world: Any = dist.group.WORLD
    return Mpi(world._inner._library, world._inner._engine)


def scheduled(tuner: Tuner, ledger: Ledger | None = None, timeout_s: float = 20) -> Any:
    return group_of(ledger or Ledger(), tuner, timeout_s=timeout_s, inner=mpi().inner)


def zeros(n: int) -> torch.Tensor:
    return torch.zeros(n)


def case_scheduled_ops_equal_a_reference() -> None:
    equal_a_reference(torch.float32)


def long_case_scheduled_ops_of_other_types_equal_a_reference() -> None:
    equal_a_reference(torch.bfloat16, torch.int64)


def equal_a_reference(*dtypes: torch.dtype) -> None:
    for reordered in (False, True):
        group = scheduled(fixed(reordered))
        for dtype in dtypes:
            expected = alone(dist.get_rank(), dist.get_world_size(), dtype)
            for name, found in everything(group, dtype).items():
                assert torch.equal(found, expected[name]), (name, dtype, reordered, found, expected[name])


def case_bits_of_schedules() -> list[str]:
    return digests(scheduled(fixed()))


def case_the_ledger_has_what_a_schedule_sends() -> None:
    ledger = Ledger()
    sent, expected = sent_of_an_all_reduce(scheduled(fixed(), ledger), ledger)
    assert sent == expected


def case_scheduled_calls_keep_their_order_beside_native_ones() -> None:
    rank, group = dist.get_rank(), scheduled(fixed())
    tensors = [torch.full((50 + 3000 * n,), float(rank + n)) for n in range(12)]
    natives = [torch.full((7,), float(rank)) for _ in tensors]
    works: list[Any] = []
    for n, (one, native) in enumerate(zip(tensors, natives, strict=True)):
        works.append(dist.all_reduce(one, group=group, async_op=n % 3 > 0))
        works.append(dist.all_reduce(native, async_op=True))
    for work in works:
        if work is not None:
            work.wait()
    assert all(torch.equal(one, torch.full_like(one, 6.0 + 4 * n)) for n, one in enumerate(tensors))
    assert all((native == 6).all() for native in natives)


def long_case_frameworks_train_on_schedules() -> None:
    rank, p = dist.get_rank(), dist.get_world_size()
    inputs = torch.randn(p, 8, generator=torch.Generator().manual_seed(1))

    def net() -> torch.nn.Module:
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))

    whole, group = net(), scheduled(fixed())
    whole(inputs).square().mean().backward()
    replica = torch.nn.parallel.DistributedDataParallel(net(), process_group=group, bucket_cap_mb=0.0005)
    replica(inputs[rank : rank + 1]).square().mean().backward()
    for own, expected in zip(replica.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(own.grad, expected.grad)


def case_what_is_measured_is_the_same_on_all_ranks(folder: Path) -> list[Any]:
    lines: list[str] = []
    advisor = Fixed()
    chosen = []
    with quick():
        for _ in range(2):  # the second time from the file
            tuner = Tuner(advisor, Cache(folder / "cluster.collectives.json"), report=lines.append)
            dist.all_reduce(zeros(3000), group=scheduled(tuner))
            chosen.append([one.name for one in tuner.chosen.values()])
            dist.barrier()
    return [chosen, len(lines), advisor.asked]


def case_a_mismatch_of_schedules_is_named() -> list[str]:
    rank = dist.get_rank()
    engine.CHECK_AFTER_S, begun = 0.5, time.monotonic()
    first = scheduled(fixed())
    said = [refused(lambda: dist.all_reduce(zeros(3 if rank == 1 else 8), group=first))]
    known = scheduled(fixed())
    for n in (4, 8):
        dist.all_reduce(zeros(n), group=known)
    said.append(refused(lambda: dist.all_reduce(zeros(4 if rank == 1 else 8), group=known)))
    said.append(refused(lambda: dist.all_reduce(zeros(4), group=known)))
    fresh = scheduled(fixed())
    for n in (4, 8):
        dist.all_reduce(zeros(n), group=fresh)
    said.append(refused(lambda: dist.all_reduce(zeros(12 if rank == 1 else 8), group=fresh)))  # 12 asks all to agree first
    store = fresh._engine.place.store  # type: ignore[attr-defined]
    if rank == 1:
        store.set("refused", "")
    else:  # and MPI takes no collective back: who did not come does so late, or MPI could not end
        store.wait(["refused"])
        join_late(fresh)
    ended = scheduled(fixed())
    dist.all_reduce(zeros(8), group=ended)
    for n in (4, 8):
        dist.broadcast(zeros(n), 0, group=ended)
    if rank < 2:  # the first in the chain: what they do is over before anything is wrong
        dist.broadcast(zeros(4), 0, group=ended)
        said.append(refused(lambda: dist.all_reduce(zeros(8), group=ended)))
    else:
        said.append(refused(lambda: dist.broadcast(zeros(8 if rank == 2 else 4), 0, group=ended)))
    assert time.monotonic() - begun < 18, "a time-out has ended it"
    dist.barrier()
    return said


def join_late(group: Any) -> None:
    """The collective with which ranks compare their calls."""
    comm = group._engine.private._comm
    table = np.empty((comm.Get_size(), 5), dtype=np.int64)
    mpi().engine.call(lambda: comm.Iallgather(table[0].copy(), table).Wait(), "joining late", 20)


def long_case_a_rank_that_does_not_run_a_schedule_is_waited_for_in_vain() -> str:
    group = scheduled(fixed(), timeout_s=3)
    dist.all_reduce(zeros(8), group=group)
    said = ""
    if dist.get_rank() != 3:
        begun = time.monotonic()
        said = refused(lambda: dist.all_reduce(zeros(8), group=group))
        assert 2.9 < time.monotonic() - begun < 9
    dist.barrier()
    return said
