"""DGC on real ranks: momentum kept where the choice is made, a warm-up that sends more, nothing lost."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from averager_runs import (
    ONE_BUCKET,
    SHAPES,
    THREE_BUCKETS,
    average,
    averaged,
    check_equal_on_all_ranks,
    check_resumed,
    check_trained,
    gradient,
    train,
)

from pool import Pool, Rank
from thinwire.collectives.ledger import Ledger
from thinwire.compress.averager import Piece
from thinwire.compress.dgc import DGC, MomentumCorrection, warmup_fractions
from thinwire.compress.exchange import make_exchange
from thinwire.config.compress import Coded
from thinwire.errors import UserError

LONGER = [pytest.param(pool, marks=pytest.mark.long) for pool in ("ranks2", "ranks4")]
OPTIONS = {"kind": "dgc", "fraction": 0.02, "momentum": 0.5}


def reference(name: str, steps: int, world_size: int) -> list[torch.Tensor]:
    """All ranks in one process, after the paper's algorithm; float32, because the choice is discrete."""
    speeds = [torch.zeros(SHAPES[name]).view(-1) for _ in range(world_size)]
    sums = [speed.clone() for speed in speeds]
    found = []
    for step in range(steps):
        result = torch.zeros_like(sums[0])
        for rank in range(world_size):
            speeds[rank] = gradient(name, step, rank).view(-1) + 0.5 * speeds[rank]
            sums[rank] = sums[rank] + speeds[rank]
            chosen = sums[rank].abs().topk(-(-len(result) // 50)).indices
            sent = torch.zeros_like(result)
            sent[chosen] = sums[rank][chosen].bfloat16().float()
            sums[rank] = sums[rank] - sent
            speeds[rank][chosen] = 0
            result += sent / world_size
        found.append(result.view(SHAPES[name]))
    return found


@pytest.mark.parametrize("pool", ["ranks3", *LONGER])
def test_it_is_the_algorithm_of_the_paper(request: pytest.FixtureRequest, pool: str) -> None:
    ranks: Pool = request.getfixturevalue(pool)
    reports = ranks.run(averaged, OPTIONS, 5, ONE_BUCKET, -1, True)
    check_equal_on_all_ranks(reports)
    for name in SHAPES:
        for ours, wanted in zip(reports[0]["results"], reference(name, 5, len(reports)), strict=True):
            torch.testing.assert_close(ours[name], wanted, rtol=0, atol=1e-5)
    assert reports[0]["sent"] == reports[0]["predicted"]
    assert len(reports[0]["sent"]) == 1 and min(reports[0]["work_s"]) > 0


@pytest.mark.parametrize("pool", ["ranks2", "ranks4"])
def test_without_momentum_what_is_not_sent_is_kept(request: pytest.FixtureRequest, pool: str) -> None:
    """All gradients so far = all results so far + what waits."""
    ranks: Pool = request.getfixturevalue(pool)
    reports = ranks.run(averaged, {**OPTIONS, "momentum": 0.0}, 3, ONE_BUCKET)
    for name in SHAPES:
        given = torch.stack([gradient(name, step, rank) for step in range(3) for rank in range(len(reports))]).double()
        waiting = torch.stack([rank["residuals"][2][name] for rank in reports]).double().mean(0)
        arrived = torch.stack([results[name] for results in reports[0]["results"]]).double().sum(0)
        torch.testing.assert_close(arrived + waiting, given.sum(0) / len(reports), rtol=0, atol=1e-5)


def test_where_all_is_sent_the_momentum_is_cut_off(ranks2: Pool) -> None:
    """With fraction 1 the momentum is cut off everywhere in each step, so the gradient arrives, but for bfloat16's rounding."""
    reports = ranks2.run(averaged, {**OPTIONS, "fraction": 1.0}, 2, ONE_BUCKET)
    for name in SHAPES:
        wanted = torch.stack([gradient(name, 1, rank) for rank in range(2)]).mean(0)
        torch.testing.assert_close(reports[0]["results"][1][name], wanted, rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize("pool", ["ranks2", "ranks4"])
def test_any_buckets_give_the_same_bits(request: pytest.FixtureRequest, pool: str) -> None:
    ranks: Pool = request.getfixturevalue(pool)
    check_resumed(ranks.run(averaged, OPTIONS, 3, ONE_BUCKET), ranks.run(averaged, OPTIONS, 3, THREE_BUCKETS))


@pytest.mark.parametrize("storage", ["float32", "int8"])
def test_a_run_that_is_resumed_in_its_warm_up_goes_on_bit_for_bit(ranks2: Pool, storage: str) -> None:
    options = {**OPTIONS, "warmup_steps": 2, "feedback_storage": storage}
    whole = ranks2.run(averaged, options, 6, THREE_BUCKETS)
    check_resumed(whole, ranks2.run(averaged, options, 6, THREE_BUCKETS, 3))


@pytest.mark.parametrize(
    ("fraction", "before"),
    [(0.001, [0.25, 0.0625, 0.015625, 0.00390625]), (0.01, [0.25, 0.0625, 0.015625]), (0.25, []), (1.0, [])],
)
def test_stages_of_the_warm_up_are_the_paper_s(fraction: float, before: list[float]) -> None:
    assert warmup_fractions(fraction) == before


def warmed(context: Rank, steps: int) -> list[tuple[int, int]]:
    """Values that arrive in each step, and bytes of its message."""
    averager = DGC(MomentumCorrection(), context.ledger, fraction=0.01, warmup_steps=2)
    averager.attach(dist.group.WORLD, dist.group.WORLD)
    found = []
    for step in range(steps):
        before = {call.message_bytes: total.calls for call, total in context.recorded().items()}
        buffer = torch.randn(6400, generator=torch.Generator().manual_seed(step))
        average(averager, buffer, [Piece("weight", 0, (80, 80))], "bucket 0")
        (size,) = [c.message_bytes for c, t in context.recorded().items() if t.calls > before.get(c.message_bytes, 0)]
        found.append((int((buffer != 0).sum()), size))
    return found


def test_warm_up_sends_less_and_less(ranks2: Pool) -> None:
    """Both ranks have the same gradients, so as many values arrive as each sends; behind them is a flag of 4 bytes."""
    sent = [1600, 1600, 400, 400, 100, 100, 64, 64]
    assert ranks2.run(warmed, 8)[0] == [(count, 6 * count + 4) for count in sent]


@pytest.mark.parametrize("pool", ["ranks3", *LONGER])
def test_training_sends_what_was_predicted_after_its_warm_up(request: pytest.FixtureRequest, pool: str) -> None:
    ranks: Pool = request.getfixturevalue(pool)
    reports = ranks.run(train, {"kind": "dgc", "fraction": 0.05, "warmup_steps": 3}, 20)
    check_trained(reports)
    assert reports[0]["settled_after"] == 6


def test_a_new_rank_takes_the_mean_of_momentum_and_sum() -> None:
    olds = [MomentumCorrection(0.5), MomentumCorrection(0.5)]
    for old, value in zip(olds, [1.0, 3.0], strict=True):
        old.keep("weight", old.corrected("weight", torch.tensor([value, 0.0])))
    new = MomentumCorrection(0.5)
    new.adopt([old.state_dict() for old in olds])
    assert new.corrected("weight", torch.zeros(2)).tolist() == [3.0, 0.0]  # v 2 + 0.5 u 2
    assert new.memory_bytes(10) == 80


def test_what_arrives_exactly_waits_no_more_and_its_momentum_goes_on() -> None:
    memory = MomentumCorrection(0.5)
    memory.keep("weight", memory.corrected("weight", torch.tensor([4.0])))  # nothing of it arrives: u 4, v 4
    assert memory.corrected("weight", torch.tensor([1.0])).tolist() == [7.0]  # u 3, v 4 + 3
    memory.clear("weight")
    assert memory.residuals() == {}
    assert memory.corrected("weight", torch.tensor([0.0])).tolist() == [1.5]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "dgc", "feedback": False}, r"compress\.feedback = False: dgc keeps a momentum"),
        ({"kind": "dgc", "feedback_decay": 0.95}, r"compress\.feedback_decay = 0\.95: dgc keeps a momentum"),
        ({"kind": "dgc", "rank": 2}, r"compress\.rank: dgc has no such option"),
        ({"kind": "topk", "momentum": 0.9}, r"compress\.momentum: topk has no such option"),
        ({"kind": "randomk", "warmup_steps": 9}, r"compress\.warmup_steps: randomk has no such option"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_exchange(Coded(**options), Ledger())


def test_a_checkpoint_of_another_memory_is_refused() -> None:
    with pytest.raises(UserError, match=r"no momentum of compress\.kind = 'dgc'"):
        MomentumCorrection().load_state_dict({"owed": {}, "steps": {}})
