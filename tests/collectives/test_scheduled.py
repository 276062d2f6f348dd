"""The backend with schedules behind it: frameworks get the same results, the ledger the bytes that were sent, mistakes a line."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from fixed_schedules import Fixed, everything, fixed, group_of, quick, sent_of_an_all_reduce
from pool import Pool, Rank, RankFailure
from tagless import over_tagless
from thinwire.cluster.equal import equal_hosts
from thinwire.collectives.backend import REDUCE_SCATTER
from thinwire.collectives.ledger import Ledger
from thinwire.collectives.run import engine
from thinwire.collectives.run.transport import InnerFactory
from thinwire.collectives.schedules import ring
from thinwire.collectives.tuned.cache import Cache
from thinwire.collectives.tuned.implementation import NATIVE, Implementation
from thinwire.collectives.tuned.tuner import Tuner

CARRIERS = [None, over_tagless]


def same_as_gloo(context: Rank, reordered: bool, inner: InnerFactory) -> None:
    ours, native = group_of(Ledger(), fixed(reordered), inner=inner), dist.new_group(backend="gloo")
    for dtype in (torch.float32, torch.bfloat16, torch.int64):
        wanted = everything(native, dtype)
        for name, found in everything(ours, dtype).items():
            assert torch.equal(found, wanted[name]), f"{name} of {dtype}: {found} instead of {wanted[name]}"


def frameworks(context: Rank) -> None:
    """DDP and FSDP2 on our backend train like on gloo."""
    losses = []
    for backend in ("ours", "gloo"):
        group = group_of(Ledger(), fixed()) if backend == "ours" else dist.new_group(backend="gloo")
        torch.manual_seed(1)
        plain = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
        sharded = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
        replica = DistributedDataParallel(plain, process_group=group, bucket_cap_mb=0.0005)
        mesh = dist.DeviceMesh.from_group(group, "cpu")
        fully_shard(sharded, mesh=mesh)
        row = []
        for model in (replica, sharded):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            for step in range(3):
                generator = torch.Generator().manual_seed(100 * step + dist.get_rank())
                loss = model(torch.randn(16, 8, generator=generator)).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                row.append(loss.item())
        losses.append(row)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def spared(context: Rank) -> None:
    """gloo adds up in everybody's tensor."""
    group = group_of(Ledger(), fixed())
    values = torch.arange(100.0)
    dist.reduce(values, 2, group=group)
    assert torch.equal(values, torch.arange(100.0) * (4 if dist.get_rank() == 2 else 1))


def sub_groups(context: Rank) -> list[float]:
    ledger, tuner = Ledger(), fixed()
    halves = [group_of(ledger, tuner, ranks) for ranks in ([3, 1], [0, 2])]
    mine = halves[0] if dist.get_rank() % 2 else halves[1]
    total = torch.full((5,), float(dist.get_rank()))
    dist.all_reduce(total, group=mine)
    return total.tolist()


def entered(context: Rank) -> tuple[int, float]:
    ledger = Ledger()
    return sent_of_an_all_reduce(group_of(ledger, fixed()), ledger)


def decided_again(context: Rank) -> list[tuple[bool, bool]]:
    """Whether an all-reduce is gloo's own, and right, before and after the first rank hears of other links."""
    tuner, found = fixed(), []
    group = group_of(Ledger(), tuner)
    for _ in range(2):
        total = torch.ones(100)
        dist.all_reduce(total, group=group)
        dist.all_reduce(total, group=group)
        right = torch.equal(total, torch.full((100,), float(context.world_size**2)))
        found.append((next(iter(tuner.chosen.values())).native, right))
        if context.rank == 0:
            tuner.advisor.implementations = lambda *_: [NATIVE]  # type: ignore[method-assign]
        tuner.again(equal_hosts(context.world_size, 1e6))
    return found


def mismatch(context: Rank, later: bool) -> None:
    group = group_of(Ledger(), fixed())
    if later:  # a size that only one rank has not used yet
        for n in (4, 8):
            dist.all_reduce(torch.zeros(n), group=group)
    engine.CHECK_AFTER_S = 0.5
    dist.all_reduce(torch.zeros((12 if later else 3) if dist.get_rank() == 1 else 8), group=group)


def another_op(context: Rank) -> None:
    group = group_of(Ledger(), fixed())
    if dist.get_rank() == 2:
        dist.broadcast(torch.zeros(8), 0, group=group)
    else:
        dist.all_reduce(torch.zeros(8), group=group)


def absent(context: Rank) -> None:
    """Rank 3 comes when the others have given up."""
    group = group_of(Ledger(), fixed(), timeout_s=1)
    if dist.get_rank() != 3:
        dist.all_reduce(torch.zeros(8), group=group)
    else:
        time.sleep(3)


class Wrong(Fixed):
    """Its ring leaves out the last message."""

    def implementations(self, op: str, message_bytes: int, ranks: Any, root: int) -> list[Implementation]:
        whole = ring.all_reduce(range(len(ranks)))
        cut = replace(whole, steps=(*whole.steps[:-1], whole.steps[-1][1:]))
        return [Implementation("cut ring", cut)]


def wrong(context: Rank) -> None:
    group = group_of(Ledger(), Tuner(Wrong(), measures=False))
    dist.all_reduce(torch.zeros(8), group=group)


def mixed(context: Rank) -> bool:
    """Calls that are waited for at once and calls that are not, on one group: the order of the calls is kept."""
    group = group_of(Ledger(), fixed())
    tensors = [torch.full((50 + n,), float(dist.get_rank() + n)) for n in range(12)]
    works = [dist.all_reduce(one, group=group, async_op=n % 3 > 0) for n, one in enumerate(tensors)]
    for work in works:
        if work is not None:
            work.wait()
    return all(torch.equal(one, torch.full((50 + n,), 6.0 + 4 * n)) for n, one in enumerate(tensors))


def measured(context: Rank, folder: str, inner: InnerFactory) -> tuple[list[str], list[Any], int]:
    lines: list[str] = []
    advisor = Fixed()
    keys = ("all_reduce", "reduce_scatter")
    with quick():
        for _ in range(2):  # the second time from the file
            tuner = Tuner(advisor, Cache(Path(folder) / "cluster.collectives.json"), report=lines.append)
            group = group_of(Ledger(), tuner, inner=inner)
            dist.all_reduce(torch.zeros(3000), group=group)
            dist.reduce_scatter_tensor(torch.zeros(1000), torch.zeros(4000), group=group)
            chosen = [one.name for key, one in group._decided.items() if key[0] in keys]  # type: ignore[attr-defined]
            dist.barrier()
    return lines, chosen, advisor.asked


@pytest.mark.parametrize("reordered", [False, True])
@pytest.mark.parametrize("inner", CARRIERS)
def test_every_call_gives_what_gloo_gives(ranks4: Pool, reordered: bool, inner: InnerFactory) -> None:
    ranks4.run(same_as_gloo, reordered, inner)


def test_a_reduce_leaves_the_tensors_of_other_ranks_alone(ranks4: Pool) -> None:
    ranks4.run(spared)


def test_ddp_and_fsdp2_train_alike(ranks4: Pool) -> None:
    ranks4.run(frameworks)


def test_sub_groups_have_schedules_of_their_own(ranks4: Pool) -> None:
    assert ranks4.run(sub_groups) == [[2.0] * 5, [4.0] * 5, [2.0] * 5, [4.0] * 5]


def test_all_ranks_decide_anew_when_links_are_others(ranks4: Pool) -> None:
    assert ranks4.run(decided_again) == [[(False, True), (True, True)]] * 4


def test_the_ledger_has_what_the_schedule_sends(ranks4: Pool) -> None:
    for sent, wanted in ranks4.run(entered):
        assert sent == wanted


@pytest.mark.parametrize("function, arguments", [(mismatch, (False,)), (mismatch, (True,)), (another_op, ())])
def test_what_differs_between_ranks_is_named_by_all(ranks4: Pool, function: Any, arguments: tuple[bool, ...]) -> None:
    with pytest.raises(RankFailure, match=r"ranks differ in what they call: rank \d (all_reduce|broadcast)"):
        ranks4.run(function, *arguments)


@pytest.mark.long
def test_a_rank_that_does_not_call_is_waited_for_until_the_time_out(ranks4: Pool) -> None:
    with pytest.raises(RankFailure, match=r"failed after [1-9][0-9.]* s of at most 1:"):
        ranks4.run(absent)


def test_a_schedule_that_is_not_right_never_runs(ranks4: Pool) -> None:
    with pytest.raises(RankFailure, match=r"UserError: ring: .*"):
        ranks4.run(wrong)


def test_calls_keep_their_order(ranks4: Pool) -> None:
    assert ranks4.run(mixed) == [True] * 4


@pytest.mark.parametrize("inner", CARRIERS)
def test_what_is_measured_is_kept_for_the_next_run(ranks4: Pool, tmp_path: Any, inner: InnerFactory) -> None:
    results = ranks4.run(measured, str(tmp_path), inner)
    assert len({tuple(chosen) for _, chosen, _ in results}) == 1, "the ranks chose differently"
    assert len(results[0][0]) == 2, "the second run has measured again"
    assert [asked for _, _, asked in results] == [2, 0, 0, 0]
    assert all("native" in line for line in results[0][0])


def events_of_calls(context: Rank, asynchronous: bool) -> list[tuple[str, bool, list, bool]]:
    group = group_of(context.ledger, fixed())
    values, part = torch.ones(6, 4), torch.empty(8)
    dist.all_reduce(values, group=group)  # decides, outside of the trace
    REDUCE_SCATTER(part, values.view(-1)[:24], group=group)
    with torch.profiler.profile(record_shapes=True) as trace:
        work = dist.all_reduce(values, group=group, async_op=asynchronous)
        if asynchronous:
            work.wait()
        REDUCE_SCATTER(part, values.view(-1)[:24], group=group)
    found = [event for event in trace.events() if event.name.startswith("thinwire:")]
    return [(event.name, event.is_async, event.input_shapes, event.cpu_time > 0) for event in found]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_calls_that_schedules_run_are_events_of_the_profiler(ranks3: Pool, asynchronous: bool) -> None:
    expected = [("thinwire:all_reduce", True, [[6, 4]], True), ("thinwire:reduce_scatter", True, [[24]], True)]
    assert [sorted(found) for found in ranks3.run(events_of_calls, asynchronous)] == [expected] * 3


def sparse_sum(context: Rank) -> list[float]:
    group = group_of(context.ledger, fixed())
    own = torch.sparse_coo_tensor([[context.rank]], [1.0], (4,), check_invariants=False)
    dist.all_reduce(own, group=group)
    return own.to_dense().tolist()


def test_a_sparse_all_reduce_stays_with_the_inner_group(ranks3: Pool) -> None:
    assert ranks3.run(sparse_sum) == [[1.0, 1.0, 1.0, 0.0]] * 3
