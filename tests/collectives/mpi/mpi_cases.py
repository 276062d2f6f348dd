"""What the ranks do that mpiexec starts for the tests: every case, one after another, on each rank; outcomes go to a file.

    mpiexec -n 4 python mpi_cases.py FOLDER case|long_case [staged]

A case is a function whose name begins with `case_`, or `long_case_` if it belongs to the tests marked long; what it returns or
raises is read by test_mpi_group.py. Those of mpi_scheduled.py come last.
"""

import inspect
import pickle
import random
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import mpi_scheduled
import torch
import torch.distributed as dist
from mpi_calls import every_call, refused, train
from torch.distributed.distributed_c10d import _coalescing_manager

from thinwire.collectives.backend import ALL_GATHER, REDUCE_SCATTER
from thinwire.collectives.ledger import Ledger
from thinwire.collectives.mpi import host
from thinwire.collectives.mpi.start import process_group

P = 4
REDUCED = (
    torch.float32, torch.float64, torch.float16, torch.bfloat16,
    torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.bool,
)  # fmt: skip
MOVED = (*REDUCED, torch.complex64)
REFERENCE = {
    "SUM": lambda parts: parts.sum(0),
    "AVG": lambda parts: parts.sum(0) / parts.shape[0],
    "PRODUCT": lambda parts: parts.prod(0),
    "MAX": lambda parts: parts.amax(0),
    "MIN": lambda parts: parts.amin(0),
}


class Draw:
    """Random cases that are the same on each rank; each rank knows what the others have."""

    def __init__(self, seed: int, group: dist.ProcessGroup) -> None:
        self.random = random.Random(seed)
        self.p, self.rank = group.size(), group.rank()

    def shape(self) -> tuple[int, ...]:
        return self.random.choice([(), (0,), (1,), (7,), (3, 5), (2, 3, 4), (1000,), (70, 100)])

    def tensors(self, dtype: torch.dtype, shape: tuple[int, ...], count: int | None = None) -> list[torch.Tensor]:
        """One for each rank, of small integers: sums and products of four of them are exact in every type."""
        strange = len(shape) > 1 and self.random.random() < 0.5
        generator = torch.Generator().manual_seed(self.random.randrange(2**31))

        def one() -> torch.Tensor:
            tensor = torch.randint(1, 4, shape[::-1] if strange else shape, generator=generator).to(dtype)
            return tensor.permute(*range(len(shape))[::-1]) if strange else tensor

        return [one() for _ in range(self.p if count is None else count)]


def same(got: torch.Tensor, expected: torch.Tensor, what: object) -> None:
    assert got.dtype == expected.dtype and got.shape == expected.shape, (what, got.shape, expected.shape)
    assert torch.equal(got, expected), (what, got.flatten()[:5], expected.flatten()[:5])


def reduced(parts: list[torch.Tensor], name: str) -> torch.Tensor:
    """The reference. Sums of booleans are "or"."""
    dtype = parts[0].dtype
    wide = torch.stack([part.to(torch.float64 if dtype.is_floating_point else torch.int64) for part in parts])
    if dtype == torch.bool:
        wide = REFERENCE[{"SUM": "MAX", "PRODUCT": "MIN"}.get(name, name)](wide)
        return wide.bool()
    if name == "AVG":
        return wide.sum(0).to(dtype) / len(parts)
    return REFERENCE[name](wide).to(dtype)


def op_for(draw: Draw, dtype: torch.dtype) -> str:
    return draw.random.choice([name for name in REFERENCE if name != "AVG" or dtype.is_floating_point])


def groups() -> list[dist.ProcessGroup]:
    """The groups of two, three and four ranks that this rank is in; made once."""
    if not hasattr(groups, "made"):
        groups.made = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3], [1, 2, 3], [0, 1, 2, 3])]  # type: ignore[attr-defined]
    made: list[Any] = groups.made  # type: ignore[attr-defined]
    return [group for group in made if isinstance(group, dist.ProcessGroup)]


def reducing(draw: Draw, group: dist.ProcessGroup, dtype: torch.dtype) -> None:
    shape, p, rank = draw.shape(), draw.p, draw.rank
    name = op_for(draw, dtype)
    op = getattr(dist.ReduceOp, name)
    parts = draw.tensors(dtype, shape)
    total = reduced(parts, name)
    own = parts[rank].clone()
    dist.all_reduce(own, op=op, group=group)
    same(own, total, ("all_reduce", name, dtype, shape))
    root = draw.random.randrange(p)
    own = parts[rank].clone()
    dist.reduce(own, group_dst=root, op=op, group=group)
    if rank == root:
        same(own, total, ("reduce", name, dtype, shape))
    rows = [draw.tensors(dtype, shape) for _ in range(p)]  # rows[source][target]
    expected = reduced([row[rank] for row in rows], name)
    got = torch.empty_like(rows[rank][rank])
    dist.reduce_scatter(got, rows[rank], op=op, group=group)
    same(got, expected, ("reduce_scatter", name, dtype, shape))
    if shape:
        flat = torch.empty(shape, dtype=dtype)
        REDUCE_SCATTER(flat, torch.cat(rows[rank]), op=op, group=group)
        same(flat, expected, ("reduce_scatter_single", name, dtype, shape))


def moving(draw: Draw, group: dist.ProcessGroup, dtype: torch.dtype) -> None:
    shape, p, rank = draw.shape(), draw.p, draw.rank
    root = draw.random.randrange(p)
    parts = draw.tensors(dtype, shape)
    got = parts[rank].clone()
    dist.broadcast(got, group_src=root, group=group)
    same(got, parts[root], ("broadcast", dtype, shape))
    room = [torch.empty_like(part) for part in parts]
    dist.all_gather(room, parts[rank], group=group)
    for index in range(p):
        same(room[index], parts[index], ("all_gather", dtype, shape))
    room = [torch.empty_like(part) for part in parts]
    dist.gather(parts[rank], room if rank == root else None, group_dst=root, group=group)
    if rank == root:
        for index in range(p):
            same(room[index], parts[index], ("gather", dtype, shape))
    got = torch.empty_like(parts[rank])
    dist.scatter(got, parts if rank == root else None, group_src=root, group=group)
    same(got, parts[rank], ("scatter", dtype, shape))
    rows = [draw.tensors(dtype, shape) for _ in range(p)]
    room = [torch.empty_like(rows[source][rank]) for source in range(p)]
    dist.all_to_all(room, rows[rank], group=group)
    for source in range(p):
        same(room[source], rows[source][rank], ("all_to_all", dtype, shape))
    counts = [[draw.random.randrange(4) for _ in range(p)] for _ in range(p)]  # counts[source][target], uneven
    sent = [draw.tensors(dtype, (sum(row), 3), 1)[0] for row in counts]
    got = torch.empty(sum(counts[source][rank] for source in range(p)), 3, dtype=dtype)
    dist.all_to_all_single(got, sent[rank], [row[rank] for row in counts], counts[rank], group=group)
    expected = torch.cat([sent[source].split(counts[source])[rank] for source in range(p)])
    same(got, expected, ("all_to_all_single", dtype, counts))
    if shape:
        whole = torch.empty(p * shape[0], *shape[1:], dtype=dtype)
        ALL_GATHER(whole, parts[rank], group=group)
        same(whole, torch.cat(parts), ("all_gather_single", dtype, shape))


def case_a_group_is_made_while_a_collective_waits() -> None:
    """First of all cases: torch names such a group by its ranks and what each of them has made before."""
    rank, total = dist.get_rank(), torch.ones(1000)
    work = dist.all_reduce(total, async_op=True) if rank == 0 else None
    if rank < 2:
        pair = dist.new_group([0, 1], use_local_synchronization=True)
    work = work or dist.all_reduce(total, async_op=True)
    work.wait()
    assert (total == P).all()
    if rank < 2:
        dist.all_reduce(total, group=pair)
        assert (total == 2 * P).all()


def case_ops_equal_a_reference() -> None:
    group = groups()[-1]
    for seed, dtype in enumerate((torch.float32, torch.bfloat16, torch.int64, torch.bool)):
        reducing(Draw(seed, group), group, dtype)
        moving(Draw(seed, group), group, dtype)


def long_case_reducing_ops_equal_a_reference() -> None:
    for group in groups():
        for seed in range(3):
            for dtype in REDUCED:
                reducing(Draw(seed, group), group, dtype)


def long_case_moving_ops_equal_a_reference() -> None:
    for group in groups():
        for seed in range(2):
            for dtype in MOVED:
                moving(Draw(seed, group), group, dtype)


def case_input_may_be_a_part_of_the_output() -> None:
    rank = dist.get_rank()
    whole = torch.full((P, 5), -1.0)
    whole[rank] = rank
    ALL_GATHER(whole, whole[rank : rank + 1])
    same(whole, torch.arange(P).float().repeat_interleave(5).reshape(P, 5), "all_gather in place")
    REDUCE_SCATTER(whole[rank : rank + 1], whole)
    assert (whole[rank] == P * rank).all()
    swapped = torch.arange(P) + 10 * rank
    dist.all_to_all_single(swapped, swapped)
    same(swapped, 10 * torch.arange(P) + rank, "all_to_all in place")


def case_coalesced_forms_equal_single_ones() -> None:
    rank = dist.get_rank()
    tensors = [torch.full((n,), float(rank + n)) for n in (1, 5, 0, 300)]
    expected = [tensor.clone() for tensor in tensors]
    for tensor in expected:
        dist.all_reduce(tensor)
    with _coalescing_manager():
        for tensor in tensors:
            dist.all_reduce(tensor)
    assert all(map(torch.equal, tensors, expected))
    inputs = [torch.full((n,), float(rank)) for n in (2, 3)]
    outputs = [torch.empty(P * n) for n in (2, 3)]
    with _coalescing_manager():
        for output, input in zip(outputs, inputs, strict=True):
            ALL_GATHER(output, input)
    assert all(torch.equal(out, torch.arange(P).repeat_interleave(n).float()) for n, out in zip((2, 3), outputs, strict=True))
    back = [torch.empty(n) for n in (2, 3)]
    with _coalescing_manager():
        for output, input in zip(back, outputs, strict=True):
            REDUCE_SCATTER(output, input)
    assert all((part == P * rank).all() for part in back)


def case_floats_are_bit_equal_on_all_ranks() -> None:
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 4e-2), (torch.float16, 4e-3)):
        parts = [torch.randn(50_001, generator=torch.Generator().manual_seed(rank)).to(dtype) for rank in range(P)]
        own = parts[dist.get_rank()].clone()
        dist.all_reduce(own)
        wide = torch.stack(parts).double().sum(0)
        assert (own.double() - wide).abs().max() <= tolerance * torch.stack(parts).double().abs().sum(0).max()
        others = [torch.empty_like(own) for _ in range(P)]
        dist.all_gather(others, own)
        assert all(torch.equal(other, own) for other in others)


def case_calls_of_a_group_run_in_order_and_groups_in_any() -> None:
    rank = dist.get_rank()
    ended: list[int] = []
    tensors = [torch.full((1 + 10_000 * (index % 3),), float(rank)) for index in range(20)]
    works = []
    for index, tensor in enumerate(tensors):
        works.append(dist.all_reduce(tensor, async_op=True))
        works[-1].get_future().then(lambda _, index=index: ended.append(index))
    assert torch.equal(works[-1].get_future().wait()[0], torch.full_like(tensors[-1], 6.0))
    assert all(work.is_completed() and work.wait() for work in works)
    assert all((tensor == 6).all() for tensor in tensors) and ended[:19] == list(range(19))
    mine = groups()
    mine = mine if rank % 2 else mine[::-1]  # one rank begins with one group, its neighbour with another
    totals = [torch.ones(3000) for _ in mine]
    works = [dist.all_reduce(total, group=group, async_op=True) for total, group in zip(totals, mine, strict=True)]
    for work, total, group in zip(works, totals, mine, strict=True):
        assert work.wait(timedelta(seconds=20)) and (total == group.size()).all()


def case_messages_find_their_receiver() -> None:
    rank = dist.get_rank()
    right, left = (rank + 1) % P, (rank - 1) % P
    for n in (0, 1, 1 << 18):  # the last one is too large to be sent before it is asked for
        theirs = torch.empty(n, 2).t() if n == 1 else torch.empty(2, n)
        sends = [dist.isend(torch.full((2, n), float(10 * rank + tag)), right, tag=tag) for tag in (1, 2)]
        for tag in (2, 1):
            dist.recv(theirs, left, tag=tag)
            assert (theirs == 10 * left + tag).all()
        for send in sends:
            send.wait()
    own = torch.empty(9, dtype=torch.int64)
    calls = [
        dist.P2POp(dist.isend, torch.full((9,), rank), right),
        dist.P2POp(dist.irecv, own, left),
    ]
    for work in dist.batch_isend_irecv(calls):
        work.wait()
    assert (own == left).all()
    if rank == 0:
        seen = set()
        for _ in range(1, P):
            source = dist.recv(own)
            assert (own == 100 * source).all()
            seen.add(source)
        assert seen == {1, 2, 3}
    else:
        dist.send(torch.full((9,), 100 * rank), 0)


def case_a_mismatch_is_named_and_breaks_nothing() -> list[str]:
    rank = dist.get_rank()
    odd = rank == 2
    said = [
        refused(lambda: dist.all_reduce(torch.ones(6 if odd else 5))),
        refused(lambda: dist.all_reduce(torch.ones(5, dtype=torch.float64 if odd else torch.float32))),
        refused(lambda: dist.all_reduce(torch.ones(5), op=dist.ReduceOp.MAX if odd else dist.ReduceOp.SUM)),
        refused(lambda: dist.broadcast(torch.ones(5), 1 if odd else 0)),
        refused(lambda: dist.barrier() if odd else dist.all_reduce(torch.ones(5))),
        refused(lambda: dist.all_to_all_single(torch.ones(4), torch.ones(5 if odd else 4), None, [1, 1, 1, 2] if odd else None)),
    ]
    work = dist.all_reduce(torch.ones(2 if odd else 3), async_op=True)
    said.append(refused(lambda: work.get_future().wait()))
    assert "all_reduce of 3 values" in str(work.exception()) and not work.is_success()
    total = torch.ones(1)
    dist.all_reduce(total)
    assert total == P
    return said


def case_a_message_of_another_size_is_named() -> list[str]:
    rank, said = dist.get_rank(), []
    for n in (4, 6):
        if rank == 0:
            dist.send(torch.ones(n), 1)
        elif rank == 1:
            said.append(refused(lambda: dist.recv(torch.empty(5), 0)))
    return said


def case_what_cannot_be_done_is_refused_at_once() -> list[str]:
    return [
        refused(lambda: dist.all_reduce(torch.ones(2).to(torch.float8_e4m3fn))),
        refused(lambda: dist.all_reduce(torch.ones(2, dtype=torch.int32), op=dist.ReduceOp.AVG)),
        refused(lambda: dist.all_reduce(torch.ones(2), op=dist.ReduceOp.BXOR)),
        refused(lambda: dist.all_gather([torch.ones(2)] * 3, torch.ones(2))),
        refused(lambda: ALL_GATHER(torch.ones(7), torch.ones(2))),
        refused(lambda: dist.all_to_all_single(torch.ones(6), torch.ones(6))),
        refused(lambda: dist.send(torch.ones(1), 1 - min(1, dist.get_rank()), tag=-5)),
    ]


def case_a_rank_that_does_not_come_is_waited_for_in_vain() -> list[str]:
    rank, said = dist.get_rank(), []
    group = dist.new_group([0, 1, 2, 3], timeout=timedelta(seconds=1))
    if rank != 3:
        begun = time.monotonic()
        said.append(refused(lambda: dist.barrier(group=group)))
        assert 0.9 < time.monotonic() - begun < 5
        said.append(refused(lambda: dist.all_reduce(torch.ones(1), group=group)))
    dist.barrier()
    if rank == 3:  # too late for the others, but MPI is then done with it
        dist.barrier(group=group)
    return said


def long_case_frameworks_compute_what_one_process_computes() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    rank = dist.get_rank()
    inputs = torch.randn(P, 8, generator=torch.Generator().manual_seed(1))

    def net() -> torch.nn.Module:
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))

    alone = net()
    alone(inputs).square().mean().backward()
    ddp = torch.nn.parallel.DistributedDataParallel(net())
    ddp(inputs[rank : rank + 1]).square().mean().backward()
    for own, whole in zip(ddp.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(own.grad, whole.grad)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    sharded = net()
    fully_shard(sharded, mesh=mesh)
    sharded(inputs[rank : rank + 1]).square().mean().backward()
    for own, whole in zip(sharded.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(own.grad.full_tensor(), whole.grad)
    gathered: list[Any] = [None] * P
    dist.all_gather_object(gathered, {"rank": rank, "text": "x" * rank})
    assert gathered == [{"rank": index, "text": "x" * index} for index in range(P)]


def case_the_ledger_enters_every_call() -> Any:
    return every_call(LEDGER)


def long_case_a_training(folder: Path) -> Any:
    return train(LEDGER, folder)


LEDGER = Ledger()


def main() -> None:
    torch.set_num_threads(1)
    outcomes: dict[str, tuple[bool, Any]] = {}
    if sys.argv[3:] == ["staged"]:  # as with tensors of a device, of which there is none here
        host.lies_on_host = lambda tensor: False
    with process_group(LEDGER, timeout_s=20):
        rank, folder, prefix = dist.get_rank(), Path(sys.argv[1]), f"{sys.argv[2]}_"
        for name, case in [*globals().items(), *vars(mpi_scheduled).items()]:
            if name.startswith(prefix):
                begun = time.monotonic()
                try:
                    outcomes[name] = (True, case(folder) if inspect.signature(case).parameters else case())
                except Exception:
                    outcomes[name] = (False, traceback.format_exc())
                if rank == 0:
                    print(f"{time.monotonic() - begun:6.2f} s {name}", flush=True)
                (folder / f"outcomes-{rank}").write_bytes(pickle.dumps(outcomes))
                if not outcomes[name][0]:
                    break  # the ranks are no longer in step
                dist.barrier()


if __name__ == "__main__":
    main()
