"""Horovod's collectives on real ranks: results by their definition, gradients, and an error on all ranks for whatever differs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import thinwire.horovod.torch as hvd
from pool import Pool, Rank
from thinwire.adapters.horovod.adasum import combine

NUMBERS = [
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
]
REDUCED = [torch.int16, torch.int32, torch.int64, torch.float16, torch.float32, torch.float64]


@pytest.fixture(autouse=True)
def _ended(request: pytest.FixtureRequest) -> Any:
    yield
    for pool in {"ranks1", "ranks2", "ranks3", "ranks4"} & set(request.fixturenames):
        ranks: Pool = request.getfixturevalue(pool)
        if ranks.pids:
            ranks.run(ended)


def ended(context: Rank) -> None:
    hvd.shutdown()


def of(rank: int, dtype: torch.dtype, *shape: int, seed: int = 0) -> torch.Tensor:
    """Small whole numbers, so that sums are exact in every dtype."""
    draw = torch.Generator().manual_seed(100 * seed + rank)
    return torch.randint(1, 5, shape or (3, 5), generator=draw).to(dtype)


def everybody(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.stack([of(rank, dtype, *shape) for rank in range(hvd.size())])


def reductions(context: Rank) -> None:
    hvd.init()
    assert (hvd.rank(), hvd.size(), hvd.local_rank(), hvd.cross_size()) == (context.rank, context.world_size, context.rank, 1)
    for dtype in REDUCED:
        own, all_ = of(hvd.rank(), dtype), everybody(dtype)
        total = all_.double().sum(0)
        assert torch.equal(hvd.allreduce(own, op=hvd.Sum), total.to(dtype))
        mean = total / hvd.size()
        torch.testing.assert_close(hvd.allreduce(own), mean.to(dtype), rtol=1e-3 if dtype == torch.float16 else 1e-6, atol=0)
        assert torch.equal(hvd.allreduce(own, op=hvd.Min), all_.min(0).values)
        assert torch.equal(hvd.allreduce(own, op=hvd.Max), all_.max(0).values)
        assert torch.equal(hvd.allreduce(own, op=hvd.Product), all_.double().prod(0).to(dtype))
        assert torch.equal(
            hvd.allreduce(own, op=hvd.Sum, prescale_factor=0.5), (all_.double() * 0.5).to(dtype).double().sum(0).to(dtype)
        )
        assert torch.equal(hvd.allreduce(own, op=hvd.Sum, postscale_factor=0.25), (total * 0.25).to(dtype))
        assert hvd.allreduce_(own, op=hvd.Sum) is own and torch.equal(own, total.to(dtype))
    mixed = [of(hvd.rank(), dtype) for dtype in (torch.int32, torch.float32, torch.int32)]
    group = hvd.grouped_allreduce(mixed, op=hvd.Sum)
    assert [one.dtype for one in group] == [torch.int32, torch.float32, torch.int32]
    assert all(torch.equal(one, everybody(one.dtype).sum(0).to(one.dtype)) for one in group)
    transposed = of(hvd.rank(), torch.float32).t()
    assert torch.equal(hvd.allreduce_(transposed, op=hvd.Sum), everybody(torch.float32).sum(0).t())


def opposite_orders(context: Rank) -> None:
    """Calls with names meet whatever the order; and what fits travels in fewer messages."""
    hvd.init()
    numbers = list(range(40))
    order = numbers if context.rank % 2 else numbers[::-1]
    handles = {
        number: hvd.allreduce_async(torch.full((number + 1,), float(number)), name=f"{number}", op=hvd.Sum) for number in order
    }
    for number in numbers:
        assert torch.equal(hvd.synchronize(handles[number]), torch.full((number + 1,), float(number * hvd.size())))
        assert hvd.poll(handles[number])
    rows = {call: total for call, total in context.recorded().items() if call.label == "allreduce"}
    assert sum(total.calls for total in rows.values()) < len(numbers)
    assert sum(call.message_bytes * total.calls for call, total in rows.items()) == 4 * sum(number + 1 for number in numbers)


def rows_and_bytes(context: Rank) -> None:
    hvd.init()
    rank, size = hvd.rank(), hvd.size()
    for dtype in [*NUMBERS, torch.bool]:
        gathered = hvd.allgather(of(rank, dtype, rank + 1, 3))
        assert torch.equal(gathered, torch.cat([of(one, dtype, one + 1, 3) for one in range(size)]))
        assert torch.equal(hvd.broadcast(of(rank, dtype), size - 1), of(size - 1, dtype))
        own = of(rank, dtype)
        assert hvd.broadcast_(own, 0) is own and torch.equal(own, of(0, dtype))
        splits = torch.tensor([(rank + to) % 3 for to in range(size)], dtype=torch.int32)
        rows, counts = hvd.alltoall(of(rank, dtype, int(splits.sum()), 2), splits)
        sent = [torch.tensor([(one + to) % 3 for to in range(size)]) for one in range(size)]
        mine = [of(one, dtype, int(s.sum()), 2).split(s.tolist())[rank] for one, s in enumerate(sent)]
        assert (
            torch.equal(rows, torch.cat(mine)) and counts.tolist() == [len(one) for one in mine] and counts.dtype == torch.int32
        )
    assert torch.equal(hvd.alltoall(torch.arange(2 * size)), torch.tensor([2 * rank, 2 * rank + 1] * size))
    empty, several = hvd.grouped_allgather([torch.empty(0, 2), torch.full((rank,), 7)])
    assert empty.shape == (0, 2) and len(several) == size * (size - 1) // 2
    for length in (size, size + 1, 1):
        tensor = of(rank, torch.float32, length, 2)
        total = everybody(torch.float32, length, 2).sum(0)
        first = sum(length // size + (one < length % size) for one in range(rank))
        part = total[first : first + length // size + (rank < length % size)]
        assert torch.equal(hvd.reducescatter(tensor, op=hvd.Sum), part)
        assert torch.allclose(hvd.reducescatter(tensor), part / size)
    sparse = torch.sparse_coo_tensor(torch.tensor([[rank, 5]]), torch.ones(2, 3), (6, 3), check_invariants=False)
    total = hvd.sparse_allreduce_async(sparse, "sparse", hvd.Sum)().to_dense()
    assert total[5].tolist() == [size] * 3 and total.sum() == 6 * size
    assert hvd.broadcast_object({"rank": rank}, root_rank=size - 1) == {"rank": size - 1}
    assert hvd.allgather_object("x" * rank) == ["x" * one for one in range(size)]
    hvd.barrier()


def gradients(context: Rank) -> dict[str, torch.Tensor]:
    hvd.init()
    rank, size = hvd.rank(), hvd.size()
    calls: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "sum": lambda x: hvd.allreduce(x, op=hvd.Sum),
        "mean": lambda x: hvd.grouped_allreduce([x])[0],
        "scaled": lambda x: hvd.allreduce(x, op=hvd.Sum, prescale_factor=0.5, postscale_factor=4.0),
        "gather": hvd.allgather,
        "broadcast": lambda x: hvd.broadcast(x, 1),
        "exchange": lambda x: hvd.alltoall(x[: 2 * size - 1], torch.tensor([2, *[1] * (size - 1)], dtype=torch.int32))[0],
        "scatter": lambda x: hvd.reducescatter(x, op=hvd.Sum),
        "scatter mean": hvd.reducescatter,
    }
    found = {}
    for name, call in calls.items():
        x = torch.ones(2 * size, requires_grad=True)
        call(x).sum().mul(rank + 1).backward()
        found[name] = x.grad
    return found


def mismatches(context: Rank) -> list[str]:
    hvd.init()
    odd = context.rank == 1
    calls: list[Callable[[], Any]] = [
        lambda: hvd.allreduce(torch.ones(3 + odd), name="shape"),
        lambda: hvd.allreduce(torch.ones(2, 3) if odd else torch.ones(6), name="dims"),
        lambda: hvd.allreduce(torch.ones(3).to(torch.float64 if odd else torch.float32), name="dtype"),
        lambda: hvd.allreduce(torch.ones(3), name="op", op=hvd.Max if odd else hvd.Sum),
        lambda: hvd.allreduce(torch.ones(3), name="scale", prescale_factor=2.0 if odd else 1.0),
        lambda: hvd.allreduce(torch.ones(8, 8), name="code", compression=hvd.Compression.int8 if odd else hvd.Compression.none),
        lambda: hvd.allgather(torch.ones(2, 3 + odd), name="row"),
        lambda: hvd.broadcast(torch.ones(3), int(odd), name="root"),
        lambda: hvd.alltoall(torch.ones(6, 1 + odd), name="rows"),
        lambda: hvd.reducescatter(torch.ones(4 + odd), name="part"),
        lambda: hvd.allreduce(torch.ones(1), name="mine" if odd else "yours"),
        lambda: hvd.broadcast(torch.ones(1), 0, name="kind") if odd else hvd.allreduce(torch.ones(1), name="kind"),
    ]
    found = []
    for call in calls:
        with pytest.raises(hvd.HorovodInternalError) as error:
            call()
        found.append(str(error.value))
    assert hvd.allreduce(torch.ones(1), name="goes on", op=hvd.Sum) == hvd.size()
    return found


def refusals(context: Rank) -> None:
    """What one rank can see by itself is a ValueError there, before anybody waits."""
    with pytest.raises(ValueError, match="not been initialized"):
        hvd.rank()
    hvd.init()
    others = hvd.ProcessSet([0])
    calls: list[Callable[[], Any]] = [
        lambda: hvd.allreduce(torch.ones(1), average=True, op=hvd.Sum),
        lambda: hvd.allreduce(torch.ones(1), op="sum"),
        lambda: hvd.alltoall(torch.ones(hvd.size() + 1)),
        lambda: hvd.alltoall(torch.ones(1), torch.full((hvd.size(),), 2, dtype=torch.int32)),
        lambda: hvd.alltoall(torch.ones(hvd.size()), torch.ones(hvd.size())),
        lambda: hvd.allgather(torch.tensor(1.0)),
        lambda: hvd.reducescatter(torch.tensor(1.0)),
        lambda: hvd.broadcast(torch.ones(1), hvd.size()),
        lambda: hvd.allreduce(torch.ones(1), process_set=others),
        lambda: hvd.init(comm=[0]),
        lambda: hvd.Compression.int4(k=3),
        lambda: hvd.allreduce(torch.ones(2, 2), compression=hvd.Compression.int4),
        lambda: hvd.allreduce(torch.ones(2, dtype=torch.int32), op=hvd.Adasum),
    ]
    for number, call in enumerate(calls):
        with pytest.raises(ValueError):
            call()
            pytest.fail(f"call {number} was not refused")
    with pytest.raises(NotImplementedError):
        hvd.reducescatter(torch.ones(4), op=hvd.Adasum)
    with pytest.warns(DeprecationWarning):
        assert hvd.allreduce(torch.ones(1), average=False) == hvd.size()
    if context.rank == 0:
        first = hvd.allreduce_async(torch.ones(1), name="twice")
        with pytest.raises(ValueError, match="under way already"):
            hvd.allreduce_async(torch.ones(1), name="twice")
    hvd.barrier()
    if context.rank != 0:
        first = hvd.allreduce_async(torch.ones(1), name="twice")
    hvd.synchronize(first)


def joins(context: Rank) -> int:
    """Ranks with unequal numbers of batches; those that are out of them stand in with zeros."""
    hvd.init()
    for number in range(context.rank + 1):
        mean = hvd.allreduce(torch.ones(2, dtype=torch.float64))
        assert torch.allclose(mean, torch.full((2,), (hvd.size() - number) / hvd.size(), dtype=torch.float64))
    last = hvd.join()
    assert hvd.allreduce(torch.ones(1), op=hvd.Sum) == hvd.size()  # calls without a name meet again
    if context.rank:
        with pytest.raises(hvd.HorovodInternalError, match="rank 0 joined"):
            hvd.allgather(torch.ones(1), name="too late")
    hvd.join()
    return last


def process_sets(context: Rank) -> None:
    first, last = hvd.ProcessSet([1, 0]), hvd.ProcessSet([2])
    with pytest.raises(ValueError, match="twice"):
        hvd.init(process_sets=[first, hvd.ProcessSet([0, 1])])
    hvd.init(process_sets=[first])
    hvd.add_process_set(last)
    assert hvd.global_process_set.ranks == [0, 1, 2] and (first.process_set_id, last.process_set_id) == (1, 2)
    own = last if context.rank == 2 else first
    for _ in range(1 + context.rank // 2):  # sets do not wait for each other
        assert hvd.allreduce(torch.ones(1), op=hvd.Sum, process_set=own) == own.size()
        assert hvd.allgather(torch.tensor([context.rank]), process_set=own).tolist() == own.ranks
    assert hvd.broadcast(torch.tensor([context.rank]), own.ranks[-1], process_set=own) == own.ranks[-1]
    assert (own.rank(), own.included()) == (own.ranks.index(context.rank), True)
    other = first if own is last else last
    assert other.rank() == -1 and not other.included()
    with pytest.raises(ValueError, match="not in ProcessSet"):
        hvd.allreduce(torch.ones(1), process_set=other)
    with pytest.raises(ValueError, match="already"):
        hvd.add_process_set([2])
    assert hvd.remove_process_set(last) and not hvd.remove_process_set(last)
    with pytest.raises(ValueError, match="not registered"):
        last.size()
    assert hvd.add_process_set([2]).process_set_id == 3
    with pytest.raises(NotImplementedError, match="power of two"):
        hvd.allreduce(torch.ones(1), op=hvd.Adasum)


def adaptive_sums(context: Rank) -> None:
    hvd.init()
    for dtype, close in ((torch.float64, 1e-12), (torch.float32, 1e-6), (torch.float16, 1e-2)):
        draw = torch.Generator().manual_seed(0)
        vectors = [torch.randn(33, generator=draw, dtype=torch.float64).to(dtype) for _ in range(hvd.size())]
        wanted = vectors
        while len(wanted) > 1:
            wanted = [combine(*wanted[at : at + 2]) for at in range(0, len(wanted), 2)]
        found, zero = hvd.grouped_allreduce([vectors[context.rank], torch.zeros(4, dtype=dtype)], op=hvd.Adasum)
        torch.testing.assert_close(found, wanted[0], rtol=close, atol=close)
        assert not zero.any()
        assert len({one.numpy().tobytes() for one in hvd.allgather(found[None])}) == 1
    axis = torch.zeros(hvd.size(), dtype=torch.float64)
    axis[context.rank] = context.rank + 1.0
    assert hvd.allreduce(axis, op=hvd.Adasum).tolist() == [rank + 1.0 for rank in range(hvd.size())]  # orthogonal: the sum
    assert torch.allclose(hvd.allreduce(torch.ones(5, dtype=torch.float64), op=hvd.Adasum), torch.ones(5, dtype=torch.float64))


def ends(context: Rank) -> str:
    """One rank leaves; whatever the others wait for fails."""
    hvd.init()
    if context.rank == 0:
        handle = hvd.allreduce_async(torch.ones(1), name="never")
    hvd.barrier()
    if context.rank == 0:
        with pytest.raises(hvd.HorovodInternalError) as error:
            hvd.synchronize(handle)
        with pytest.raises(hvd.HorovodInternalError):
            hvd.allreduce(torch.ones(1))
    hvd.shutdown()
    assert not hvd.is_initialized()
    hvd.init()
    assert hvd.allreduce(torch.ones(1), op=hvd.Sum) == hvd.size()
    return str(error.value) if context.rank == 0 else ""


def coded(context: Rank) -> dict[str, tuple[float, int]]:
    """Relative error of an average through codes, and its bytes."""
    hvd.init()
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(context.rank))
    mean = sum(torch.randn(64, 128, generator=torch.Generator().manual_seed(rank)) for rank in range(hvd.size())) / hvd.size()
    found = {}
    for name in ("none", "fp16", "bf16", "int8", "int4"):
        before = context.ledger.sent_bytes
        result = hvd.allreduce(x, name="w", compression=getattr(hvd.Compression, name))
        found[name] = float((result - mean).norm() / mean.norm()), context.ledger.sent_bytes - before
        assert len({one.numpy().tobytes() for one in hvd.allgather(result[None])}) == 1
    whole = torch.ones(3, dtype=torch.int32)
    assert hvd.allreduce(whole, compression=hvd.Compression.int4, op=hvd.Sum).tolist() == [hvd.size()] * 3
    return found


def alone(context: Rank) -> None:
    hvd.init()
    assert (hvd.size(), hvd.rank(), hvd.local_size(), hvd.join()) == (1, 0, 1, -1)
    x = torch.tensor([1.0, 2.0])
    assert hvd.allreduce(x).tolist() == hvd.broadcast(x, 0).tolist() == hvd.allgather(x).tolist() == [1.0, 2.0]
    assert hvd.alltoall(x).tolist() == hvd.reducescatter(x).tolist() == [1.0, 2.0]


@pytest.mark.parametrize("pool", ["ranks2", "ranks3"])
@pytest.mark.parametrize("function", [reductions, opposite_orders, rows_and_bytes, joins])
def test_calls_are_what_they_are_called(request: pytest.FixtureRequest, pool: str, function: Callable[[Rank], Any]) -> None:
    results = request.getfixturevalue(pool).run(function)
    if function is joins:
        assert len(set(results)) == 1 and results[0] == len(results) - 1


def test_gradients_come_back(ranks2: Pool) -> None:
    """With losses (r + 1) sum(result of rank r)."""
    for rank, found in enumerate(ranks2.run(gradients)):
        wanted = {
            "sum": [3.0] * 4,
            "mean": [1.5] * 4,
            "scaled": [6.0] * 4,
            "gather": [1.5] * 4,
            "broadcast": [1.5 * rank] * 4,
            "exchange": [1.0, 1.0, 2.0, 0.0],
            "scatter": [2.0, 2.0, 4.0, 4.0],
            "scatter mean": [1.0, 1.0, 2.0, 2.0],
        }
        assert {name: gradient.tolist() for name, gradient in found.items()} == wanted


def test_what_differs_is_one_error_on_all_ranks(ranks2: Pool) -> None:
    first, second = ranks2.run(mismatches)
    assert first[:10] == second[:10]
    for error, name in zip(first, ["shape", "dims", "dtype", "op", "scale", "code", "row", "root", "rows", "part"], strict=False):
        assert f"'{name}'" in error and "rank 0" in error and "rank 1" in error and "\n" not in error
    assert first[0] == "allreduce of 'shape': the shape differs: 3 on rank 0, 4 on rank 1; call it alike on all ranks"
    assert "'yours'" in first[10] and "missing on rank 1" in first[10] and "'mine'" in second[10]
    assert "allreduce of 'kind'" in first[11] and "broadcast of 'kind'" in second[11]


@pytest.mark.parametrize("function", [refusals, pytest.param(ends, marks=pytest.mark.long)])
def test_mistakes_of_one_rank_and_its_end(ranks2: Pool, function: Callable[[Rank], Any]) -> None:
    results = ranks2.run(function)
    assert function is refusals or results[0] == "rank 1 has shut Horovod down"


def test_process_sets(ranks3: Pool) -> None:
    ranks3.run(process_sets)


@pytest.mark.long
@pytest.mark.parametrize("pool", ["ranks2", "ranks4"])
def test_adasum_is_the_recursion_of_its_file(request: pytest.FixtureRequest, pool: str) -> None:
    request.getfixturevalue(pool).run(adaptive_sums)


def test_codes_average_in_fewer_bytes(ranks2: Pool) -> None:
    (errors, _) = ranks2.run(coded)
    assert errors["none"][0] < 1e-6 and errors["fp16"][0] < 1e-3 and errors["int8"][0] < 0.02 and errors["int4"][0] < 0.2
    sent = {name: sent for name, (_, sent) in errors.items()}
    assert sent["none"] == 4 * 64 * 128 == 2 * sent["fp16"] == 2 * sent["bf16"]
    assert sent["int8"] < 0.3 * sent["none"] and sent["int4"] < 0.18 * sent["none"]


def test_one_rank_needs_no_others(ranks1: Pool) -> None:
    ranks1.run(alone)
