"""Which averager each parameter of a bucket is assigned to, and what error feedback keeps of it."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from thinwire.collectives.ledger import Ledger
from thinwire.collectives.wire import sent_bytes
from thinwire.compress.averager import RIDE_BYTES
from thinwire.compress.exchange import make_exchange
from thinwire.compress.memory import ErrorFeedback
from thinwire.config.compress import Coded
from thinwire.errors import UserError
from thinwire.traffic import Transfer
from thinwire.workload import Parameter


def wire_bytes(transfers: Sequence[Transfer], world_size: int) -> int:
    return sum(sent_bytes(transfer.op, transfer.message_bytes, world_size, 0) for transfer in transfers)


def transfers(parameters: Sequence[Parameter], world_size: int, **options: Any) -> list[Transfer]:
    return make_exchange(Coded(**options), Ledger()).transfers("bucket 0", parameters, "data", world_size)


@given(
    st.lists(st.integers(1, 400_000), min_size=1, max_size=4), st.sampled_from([2, 3, 4, 8]), st.sampled_from(["int4", "topk"])
)
def test_auto_sends_no_more_than_any_single_averager(sizes: list[int], world_size: int, kind: str) -> None:
    """Parameter by parameter; a bucket of several is never worse than two-shot, gather or a plain all-reduce of all of it.

    But for what rides along with gathered codes instead of going by a collective of its own.
    """
    parameters = [Parameter(f"w{index}", (size, 1)) for index, size in enumerate(sizes)]
    auto = wire_bytes(transfers(parameters, world_size, kind=kind), world_size)
    ridden = len(sizes) * RIDE_BYTES
    for other in ("two-shot", "gather"):
        assert auto <= wire_bytes(transfers(parameters, world_size, kind=kind, exchange=other), world_size) + ridden
    assert auto <= 2 * (world_size - 1) / world_size * 4 * sum(sizes) + ridden


def test_two_ranks_gather_and_four_take_two_shots() -> None:
    big = [Parameter("w", (512, 512))]
    assert [transfer.op for transfer in transfers(big, 2, kind="int4")] == ["all_gather"]
    assert [transfer.op for transfer in transfers(big, 4, kind="int4")] == ["all_to_all", "all_gather"]


def test_what_would_grow_by_coding_is_sent_plainly() -> None:
    assert [transfer.label for transfer in transfers([Parameter("w", (3, 1))], 4, kind="int4")] == ["bucket 0 plain"]


@pytest.mark.parametrize(("kind", "option"), [("int4", {"rank": 4}), ("int8", {"hadamard": True}), ("sign", {"k": 8})])
def test_an_option_of_another_kind_is_refused(kind: str, option: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=rf"compress\.{next(iter(option))}: {kind} has no such option"):
        make_exchange(Coded(kind=kind, **option), Ledger())


def fed(memory: ErrorFeedback, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients in, half of what should be sent arrives: (all gradients, all that arrived)."""
    generator = torch.Generator().manual_seed(0)
    gradients, arrived = torch.zeros(700), torch.zeros(700)
    for _ in range(steps):
        gradient = torch.randn(700, generator=generator)
        wanted = memory.corrected("w", gradient)
        sent = wanted / 2
        memory.keep("w", wanted - sent)
        gradients, arrived = gradients + gradient, arrived + sent
    return gradients, arrived


def test_nothing_is_lost_but_late() -> None:
    memory = ErrorFeedback()
    gradients, arrived = fed(memory, 5)
    torch.testing.assert_close(arrived + memory.residuals()["w"], gradients)


def test_int8_storage_loses_half_a_step_at_most() -> None:
    exact, coded = ErrorFeedback(), ErrorFeedback(storage="int8")
    for memory in (exact, coded):
        fed(memory, 1)
    bound = exact.residuals()["w"].abs().max() / 127 * 0.51
    assert (exact.residuals()["w"] - coded.residuals()["w"]).abs().max() <= bound
    assert coded.memory_bytes(700) == 3 * 258 and exact.memory_bytes(700) == 2800


@pytest.mark.parametrize("storage", ["float32", "int8"])
def test_a_memory_goes_on_bit_for_bit(storage: Any) -> None:
    whole, first, second = (ErrorFeedback(storage=storage, average=0.8, reset_steps=4) for _ in range(3))
    fed(first, 3)
    second.load_state_dict(first.state_dict())
    fed(second, 3)
    fed(whole, 3)
    fed(whole, 3)
    assert torch.equal(second.residuals()["w"], whole.residuals()["w"])


def test_loco_averages_and_forgets() -> None:
    """e <- 0.2 e + 0.8 l, and nothing is kept in each third step."""
    memory = ErrorFeedback(average=0.8, reset_steps=3)
    fed(memory, 1)
    first = memory.residuals()["w"].clone()
    memory.corrected("w", torch.zeros(700))
    memory.keep("w", torch.ones(700))
    torch.testing.assert_close(memory.residuals()["w"], 0.2 * first + 0.8)
    memory.keep("w", torch.ones(700))
    assert torch.equal(memory.residuals()["w"], torch.zeros(700))


def test_demo_keeps_a_momentum_of_which_a_part_is_removed() -> None:
    """m <- d m + g; m <- m - r (what was sent)."""
    memory = ErrorFeedback(decay=0.9, removal=0.25)
    momentum = torch.zeros(700)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        gradient = torch.randn(700, generator=generator)
        momentum = 0.9 * momentum + gradient
        wanted = memory.corrected("w", gradient)
        torch.testing.assert_close(wanted, momentum)
        sent = wanted.clone()
        sent[::2] = 0
        memory.keep("w", wanted - sent)
        momentum = momentum - 0.25 * sent
        torch.testing.assert_close(memory.residuals()["w"], momentum)


@given(st.integers(1, 8), st.integers(1, 8))
def test_another_number_of_ranks_keeps_the_mean_residual(before: int, after: int) -> None:
    olds = []
    for rank in range(before):
        olds.append(ErrorFeedback())
        olds[-1].keep("w", torch.randn(50, generator=torch.Generator().manual_seed(rank)))
    news = [ErrorFeedback() for _ in range(after)]
    for new in news:
        new.adopt([old.state_dict() for old in olds])
    mean_before = torch.stack([old.residuals()["w"] for old in olds]).double().mean(0)
    mean_after = torch.stack([new.residuals()["w"] for new in news]).double().mean(0)
    torch.testing.assert_close(mean_after, mean_before, rtol=0, atol=1e-6)


def test_a_rank_without_a_residual_counts_as_zero() -> None:
    olds = [ErrorFeedback(), ErrorFeedback()]
    olds[0].keep("w", torch.ones(5))
    new = ErrorFeedback()
    new.adopt([old.state_dict() for old in olds])
    assert new.residuals()["w"].tolist() == [0.5] * 5


@pytest.mark.parametrize(
    "options",
    [{}, {"decay": 0.5}, {"average": 0.8, "reset_steps": 3}, {"decay": 0.9, "removal": 0.25}, {"storage": "int8", "decay": 0.5}],
    ids=str,
)
@pytest.mark.parametrize("numel", [700, 12, 3])
def test_shards_are_fed_back_as_the_vector_is(options: dict[str, Any], numel: int) -> None:
    """Whole rows, a row that is filled in part, empty rows; zeros behind the end, whatever the coding left there."""
    whole, cut = ErrorFeedback(**options), ErrorFeedback(**options)
    generator = torch.Generator().manual_seed(numel)
    for _ in range(4):
        gradient = torch.randn(numel, generator=generator)
        rows = torch.full((3, 256), torch.nan)
        cut.corrected_rows("w", gradient, rows)
        wanted = whole.corrected("w", gradient)
        assert torch.equal(rows.view(-1)[:numel], wanted) and not rows.view(-1)[numel:].any()
        whole.keep("w", wanted / 2)
        cut.keep_rows("w", rows / 2 + torch.arange(768).view(3, 256).ge(numel), numel)
        assert torch.equal(cut.residuals()["w"], whole.residuals()["w"])
