"""Schedules on real ranks: results are those of the op, the same bits on every rank and in every run, whatever the type."""

import operator
from functools import reduce

import pytest
import torch
import torch.distributed as dist

from pool import Pool, Rank
from tagless import Tagless
from thinwire.collectives.run.compiler import in_place
from thinwire.collectives.run.runner import Runner
from thinwire.collectives.schedules import bruck, direct, doubling, forest, hierarchy, ops, ring, rooted
from thinwire.collectives.schedules.combine import pipelined
from thinwire.collectives.schedules.schedule import Schedule
from thinwire.errors import UserError

SCHEDULES = {
    "ring": pipelined(ring.all_reduce([0, 2, 1, 3]), 3),
    "both ways": ring.bidirectional(ring.reduce_scatter, range(4)),
    "recursive doubling": doubling.recursive_doubling(4),
    "Rabenseifner": doubling.rabenseifner(4),
    "weighted direct": pipelined(direct.all_reduce(4, [3, 1, 2, 0]), 4),
    "direct": direct.reduce_scatter(4),
    "hierarchy": pipelined(hierarchy.all_reduce([[0, 2], [1, 3]]), 2),
    "chain broadcast": pipelined(rooted.broadcast(rooted.chain([2, 0, 3, 1])), 5),
    "chain reduce": pipelined(rooted.reduce(rooted.chain([1, 0, 3, 2])), 5),
    "gather": rooted.gather(rooted.binomial(4, 3)),
    "scatter": rooted.scatter(rooted.binomial(4, 1)),
    "Bruck": bruck.all_to_all(4),
    "pairwise": direct.pairwise(4),
    "forest": forest.all_gather([((-1, 0, 0, 1), 2), ((2, -1, 1, 2), 1), ((3, 0, -1, 2), 1), ((1, 3, 1, -1), 1)]),
}


def values(schedule: Schedule, rank: int, sizes: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    length = sum(sizes[block] for block in ops.inputs(schedule.op, schedule.p, schedule.root, rank))
    generator = torch.Generator().manual_seed(rank)
    return torch.randint(-9, 9, (length,), generator=generator).to(dtype)


def wanted(schedule: Schedule, rank: int, sizes: tuple[int, ...], dtype: torch.dtype, reduction: str) -> torch.Tensor:
    """Block by block, from everybody's inputs."""
    given = [values(schedule, other, sizes, dtype) for other in range(schedule.p)]
    result = []
    for block in ops.outputs(schedule.op, schedule.p, schedule.root, rank):
        parts = []
        for source in ops.sources(schedule.op, schedule.p, schedule.root, block):
            at = ops.offsets(ops.inputs(schedule.op, schedule.p, schedule.root, source), sizes)[block]
            parts.append(given[source][at : at + sizes[block]])
        joins = {"max": torch.maximum, "min": torch.minimum, "product": operator.mul}
        whole = reduce(joins.get(reduction, operator.add), parts)
        result.append(whole / schedule.p if reduction == "avg" else whole)
    return torch.cat(result) if result else torch.empty(0, dtype=dtype)


def runner_of(tags: bool = True) -> Runner:
    group = dist.new_group(backend="gloo")._get_backend(torch.device("cpu"))  # type: ignore[attr-defined]
    return Runner(group, dist.get_rank()) if tags else Runner(Tagless(group), dist.get_rank(), most_tag=0)


def check(runner: Runner, schedule: Schedule, n: int, dtype: torch.dtype, reduction: str) -> torch.Tensor:
    rank = dist.get_rank()
    sizes = schedule.block_sizes(n)
    given = values(schedule, rank, sizes, dtype)
    if in_place(schedule.op, schedule.root, rank):
        got = given if len(given) else torch.zeros(sum(sizes), dtype=dtype)
        given = got
    else:
        got = torch.zeros_like(wanted(schedule, rank, sizes, dtype, reduction))
    runner.run(schedule, sizes, given, got, reduction)
    torch.testing.assert_close(got, wanted(schedule, rank, sizes, dtype, reduction))
    return got


def all_of_them(context: Rank, tags: bool) -> None:
    runner = runner_of(tags)
    for schedule in SCHEDULES.values():
        for n in (0, 1, 3, 257, 70_000):
            check(runner, schedule, n, torch.float32, "sum")
            check(runner, schedule, n, torch.float32, "sum")  # the kept program


def all_types(context: Rank) -> None:
    runner = runner_of()
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int32, torch.int64, torch.uint8, torch.int8):
        for reduction in ("sum", "max", "min") + (("avg",) if dtype.is_floating_point else ()):
            for name in ("ring", "weighted direct", "recursive doubling"):
                check(runner, SCHEDULES[name], 1031, dtype, reduction)
    check(runner, SCHEDULES["direct"], 64, torch.int64, "product")


def bits(context: Rank, tags: bool) -> list[bytes]:
    runner = runner_of(tags)
    result = []
    for name in ("ring", "weighted direct", "hierarchy", "Rabenseifner", "recursive doubling"):
        for _ in range(2):
            tensor = torch.randn(10_001, generator=torch.Generator().manual_seed(dist.get_rank()))
            runner.run(SCHEDULES[name], [10_001], tensor, tensor, "avg")
            result.append(tensor.numpy().tobytes())
    return result


def wrong_length(context: Rank) -> str:
    tensor = torch.zeros(5)
    with pytest.raises(UserError) as error:
        Runner(None, dist.get_rank()).run(SCHEDULES["ring"], [6], tensor, tensor)
    return str(error.value)


@pytest.mark.parametrize("tags", [True, False])
def test_every_op_gives_what_it_means(ranks4: Pool, tags: bool) -> None:
    ranks4.run(all_of_them, tags)


def test_every_type_and_reduction(ranks4: Pool) -> None:
    ranks4.run(all_types)


def test_all_ranks_and_all_runs_have_the_same_bits(ranks4: Pool) -> None:
    results = ranks4.run(bits, True) + ranks4.run(bits, False)
    assert all(result == results[0] for result in results)
    assert results[0][0::2] == results[0][1::2]


def test_tensors_that_do_not_fit_are_refused(ranks4: Pool) -> None:
    assert "gives 5 elements, gets 5; the sizes ask for 6 and 6" in ranks4.run(wrong_length)[0]
