"""Coded exchanges inside `fully_shard`: against stock FSDP2 and a model in one process, and what coding may lose and may not."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from sharded_net import HIDDEN, WIDTH, Net, batch, gradients_of, sharded, train, whole
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from vectors import short

import thinwire
from pool import Pool, Rank, RankFailure
from thinwire.compress.codecs.blockwise import Int8
from thinwire.compress.sharded.api import GRADIENT_KINDS
from thinwire.compress.sharded.residual import mean_residuals
from thinwire.errors import UserError

pytestmark = pytest.mark.heavy

# -- without coding ------------------------------------------------------------------------------------------------------


def uncoded(context: Rank, reshard: bool, num_micro: int) -> float:
    """The largest difference of any weight from stock FSDP2 after a few steps."""
    stock = sharded(reshard)
    train(stock, context.rank, range(2), num_micro)
    mine = sharded(reshard)
    compression = thinwire.compress_sharded(mine, "float32", "float32")
    train(mine, context.rank, range(2), num_micro)
    compression.detach()
    found, expected = whole(mine), whole(stock)
    return max(float((found[name] - expected[name]).abs().max()) for name in expected)


@pytest.mark.parametrize(("reshard", "num_micro"), [(True, 2), (False, 1)])
def test_uncoded_it_is_stock_fsdp2(ranks2: Pool, ranks4: Pool, reshard: bool, num_micro: int) -> None:
    assert ranks2.run(uncoded, reshard, num_micro) == [0.0] * 2  # a sum of two has one order only
    assert not reshard or max(ranks4.run(uncoded, reshard, num_micro)) < 1e-5


def readers(context: Rank) -> bool:
    """Gradients that somebody reads during the backward pass are waited for: a hook, a second backward pass."""
    model = sharded()
    compression = thinwire.compress_sharded(model, "float32", "float32")
    seen = {}
    model.head.weight.register_post_accumulate_grad_hook(lambda p: seen.update(head=p.grad.to_local().clone()))
    model(batch(context.rank, 0)).backward()
    good = torch.equal(seen["head"], model.head.weight.grad.to_local())
    once = gradients_of(model)
    model(batch(context.rank, 0)).backward()
    twice = gradients_of(model)
    with torch.inference_mode():
        first = model(batch(context.rank, 0))
    compression.detach()
    stock = model(batch(context.rank, 0))
    return good and bool(first == stock) and all(torch.equal(2 * once[name], twice[name]) for name in once)


def test_gradients_are_there_when_somebody_reads_them(ranks2: Pool) -> None:
    assert ranks2.run(readers) == [True] * 2


def divided(context: Rank) -> tuple[float, float, float]:
    """Gradients divided by the user's number by a factor and by a sum, and in bfloat16: the largest differences."""
    expected, found = gradients_after(context, lambda model: None), []
    for change, factor in ((lambda m: m.set_gradient_divide_factor(6.0), 3.0), (force_sum, 1.0)):
        changed = gradients_after(context, change)
        found.append(max(float((changed[name] * factor - expected[name]).abs().max()) for name in expected))
    rounded = gradients_after(context, lambda model: None, MixedPrecisionPolicy(reduce_dtype=torch.bfloat16))
    found.append(max(float((rounded[name] - expected[name]).abs().max()) for name in expected))
    return found[0], found[1], found[2]


def force_sum(model: Any) -> None:
    model.set_force_sum_reduction_for_comms(True)


def gradients_after(context: Rank, change: Callable[[Any], None], policy: Any = None) -> dict[str, torch.Tensor]:
    model = Net()
    fully_shard(model, mp_policy=policy or MixedPrecisionPolicy())
    change(model)
    compression = thinwire.compress_sharded(model, "float32", "float32")
    model(batch(context.rank, 0)).backward()
    compression.detach()
    return gradients_of(model)


def test_fsdp2_says_by_what_gradients_are_divided(ranks2: Pool) -> None:
    for by_factor, by_sum, in_bf16 in ranks2.run(divided):
        assert by_factor < 1e-7 and by_sum < 1e-7 and 0 < in_bf16 < 1e-2


# -- weights -------------------------------------------------------------------------------------------------------------


def gathered(context: Rank) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Weights as the forward pass saw them, and as the shards hold them."""
    model = sharded(reshard=False)
    masters = whole(model)
    compression = thinwire.compress_sharded(model, None, "int8", prefetch_units=1)
    model(batch(context.rank, 0)).detach()
    seen = {}
    for name, parameter in model.named_parameters():
        assert not isinstance(parameter, DTensor)
        seen[name] = parameter.detach().clone()
    compression.detach()
    return seen, masters


def test_all_ranks_compute_with_the_same_weights(ranks4: Pool) -> None:
    results = ranks4.run(gathered)
    masters = results[0][1]
    for name, seen in results[0][0].items():
        assert all(torch.equal(seen, other[0][name]) for other in results)
        lost = (seen - masters[name]).abs().max()
        if name == "embed.weight" or masters[name].dim() == 1:
            assert lost == 0
        else:
            assert 0 < lost <= masters[name].abs().max() * 0.51 / 127


# -- gradients -----------------------------------------------------------------------------------------------------------


def two_steps(context: Rank, kind: str, storage: str) -> list[tuple[Any, Any, Any]]:
    """Twice: this rank's own gradients by a plain model, what came out, the state."""
    plain = Net()
    model = sharded()
    compression = thinwire.compress_sharded(model, kind, None, feedback=storage)
    found = []
    for step in range(2):
        plain.zero_grad()
        plain(batch(context.rank, step)).backward()
        model.zero_grad()
        model(batch(context.rank, step)).backward()
        own = {name: parameter.grad for name, parameter in plain.named_parameters()}
        found.append((own, gradients_of(model), compression.state_dict()))
    memory = sum(unit["owed"].nbytes for unit in compression.state_dict()["units"].values())
    compression.detach()
    assert compression.memory_bytes == memory
    return found


@pytest.mark.parametrize(
    ("kind", "storage"),
    short(
        [("int4", "int8"), *((kind, "float32") for kind in GRADIENT_KINDS[1:])],
        lambda kind, storage: kind in ("int4", "sign"),
    ),
)
def test_nothing_is_lost_to_the_average(ranks4: Pool, kind: str, storage: str) -> None:
    ranks = ranks4.run(two_steps, kind, storage)
    before: dict[str, torch.Tensor] = {}
    for step in range(2):
        states = [rank[step][2] for rank in ranks]
        after = mean_residuals(states)
        for name, reduced in ranks[0][step][1].items():
            mean = sum(rank[step][0][name] for rank in ranks) / 4
            flat = (mean - reduced).reshape(-1)
            if name not in after:
                assert name == "embed.weight" or mean.dim() == 1
                assert flat.abs().max() < 1e-6
                continue
            assert after[name].abs().max() > 1e-6  # coding does lose
            missing = (flat + before.get(name, 0) - after[name]).abs()
            assert missing.max() < (1e-6 if storage == "float32" else bound(ranks, step, name))
        before = after


def bound(ranks: list[Any], step: int, name: str) -> float:
    """Half a step of int8 blocks, where a block may hold the largest value that any rank keeps for the unit."""
    unit = name.rpartition(".")[0].rpartition(".")[0] if name.startswith("blocks") else ""
    largest = 0.0
    for rank in ranks:
        rows = rank[step][2]["units"][unit]["owed"]
        numel = rows.shape[1] // 258 * 256
        largest = max(largest, *(float(Int8().decode(row, numel).abs().max()) for row in rows))
    return largest * 0.51 / 127


# -- training ------------------------------------------------------------------------------------------------------------


def learned(context: Rank) -> tuple[float, float, float]:
    stock = train(sharded(), context.rank, range(25))
    model = sharded()
    compression = thinwire.compress_sharded(model, "int4", "int8")
    mine = train(model, context.rank, range(25))
    compression.detach()
    return mine[0], sum(mine[-5:]) / 5, sum(stock[-5:]) / 5


@pytest.mark.long
def test_training_learns(ranks2: Pool) -> None:
    for first, last, stock in ranks2.run(learned):
        assert last < first / 2
        assert last == pytest.approx(stock, rel=0.1)


def resumed(context: Rank, storage: str) -> bool:
    straight = sharded()
    compression = thinwire.compress_sharded(straight, "int4", "int8", feedback=storage)
    train(straight, context.rank, range(4))
    compression.detach()
    first = sharded()
    compression = thinwire.compress_sharded(first, "int4", "int8", feedback=storage)
    train(first, context.rank, range(2))
    state, weights = compression.state_dict(), first.state_dict()
    second = sharded()
    second.load_state_dict(weights)
    compression.detach()
    compression = thinwire.compress_sharded(second, "int4", "int8", feedback=storage)
    compression.load_state_dict(state)
    train(second, context.rank, range(2, 4))
    compression.detach()
    return all(torch.equal(a.to_local(), b.to_local()) for a, b in zip(straight.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("storage", ["int8", pytest.param("float32", marks=pytest.mark.long)])
def test_resuming_is_bit_for_bit(ranks2: Pool, storage: str) -> None:
    assert ranks2.run(resumed, storage) == [True] * 2


def states_of(context: Rank, storage: str) -> dict[str, Any]:
    model = sharded()
    compression = thinwire.compress_sharded(model, "int4", "int8", feedback=storage)
    train(model, context.rank, range(2))
    compression.detach()
    return compression.state_dict()


def adopted(context: Rank, states: list[Any], storage: str) -> dict[str, Any]:
    model = sharded()
    compression = thinwire.compress_sharded(model, "int4", "int8", feedback=storage)
    compression.adopt(states)
    state = compression.state_dict()
    train(model, context.rank, range(1))
    compression.detach()
    return state


@pytest.mark.long
@pytest.mark.parametrize("storage", ["float32", "int8"])
def test_another_number_of_ranks_keeps_the_mean_residual(ranks2: Pool, ranks4: Pool, storage: str) -> None:
    for old, new in ((ranks4, ranks2), (ranks2, ranks4))[: 2 if storage == "int8" else 1]:
        states = old.run(states_of, storage)
        before, after = mean_residuals(states), mean_residuals(new.run(adopted, states, storage))
        assert set(before) == set(after)
        for name, residual in before.items():
            error = (after[name] - residual).abs().max()
            whole_unit = max(float(vector.abs().max()) for vector in before.values())
            assert residual.abs().max() > 0
            assert error < (1e-7 if storage == "float32" else 2 * whole_unit * 0.51 / 127)


# -- predictions ---------------------------------------------------------------------------------------------------------


def sent(context: Rank, kinds: tuple[str | None, str | None], reshard: bool, num_micro: int) -> tuple[Any, Any]:
    model = sharded(reshard)
    model.blocks[2].up.requires_grad_(False)
    compression = thinwire.compress_sharded(model, *kinds, ledger=context.ledger)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = Rank(context.rank, context.world_size, context.ledger, context.ledger.snapshot())
    for micro in range(num_micro):
        model.set_requires_gradient_sync(micro == num_micro - 1)  # type: ignore[operator]
        model(batch(context.rank, micro)).backward()
    optimizer.step()
    recorded: dict[Any, int] = {}
    for call, total in before.recorded().items():
        recorded[call.label, call.axis, call.op, call.message_bytes] = total.calls
    predicted: dict[Any, int] = {}
    for transfer in compression.transfers(num_micro):
        key = (transfer.label, transfer.axis, transfer.op, transfer.message_bytes)
        predicted[key] = predicted.get(key, 0) + transfer.calls
    compression.detach()
    return predicted, recorded


@pytest.mark.parametrize(
    ("kinds", "reshard", "num_micro"), [(("int4", "int8"), True, 1), (("int8", None), True, 2), ((None, "float32"), False, 1)]
)
def test_what_is_predicted_is_sent(ranks2: Pool, ranks4: Pool, kinds: Any, reshard: bool, num_micro: int) -> None:
    for ranks in (ranks2, ranks4):
        for predicted, recorded in ranks.run(sent, kinds, reshard, num_micro):
            assert predicted == recorded
            assert kinds != ("int4", "int8") or predicted["unit blocks.1 weights", "world", "all_gather", _row(ranks)] == 2


def _row(ranks: Pool) -> int:
    """Of a block: two norms and a bias as they are, two matrices in int8 blocks of 256 with two bytes each."""
    p = ranks.world_size
    exact = 4 * (2 * -(-WIDTH // p) + -(-HIDDEN // p))
    blocks = -(-(-(-HIDDEN // p) * WIDTH) // 256) + -(-(-(-WIDTH // p) * HIDDEN) // 256)
    return exact + -(-blocks * 258 // 4) * 4


# -- what a user can get wrong -------------------------------------------------------------------------------------------


def refused(context: Rank) -> list[str]:
    found = []

    def expect(call: Callable[[], object]) -> None:
        try:
            call()
        except UserError as error:
            found.append(str(error))

    expect(lambda: thinwire.compress_sharded(Net()))
    expect(lambda: thinwire.compress_sharded(sharded(), None, None))
    expect(lambda: thinwire.compress_sharded(sharded(), "int5"))
    expect(lambda: thinwire.compress_sharded(sharded(), feedback="int4"))
    model = sharded()
    compression = thinwire.compress_sharded(model, nonfinite="raise")
    train(model, context.rank, range(1))
    state = compression.state_dict()
    expect(lambda: compression.load_state_dict({**state, "world_size": 3}))
    expect(lambda: compression.load_state_dict({**state, "storage": "float32"}))
    expect(lambda: compression.adopt([state]))
    with torch.no_grad():
        model.blocks[1].up.weight.to_local().fill_(torch.nan)
    expect(lambda: model(batch(context.rank, 0)).backward())
    return found


def test_refusals_say_what_to_do(ranks2: Pool) -> None:
    wanted = ["fully_shard was applied", "both None", "'int5'", "feedback = 'int4'"]
    wanted += ["rank 0 of 3", "this run 'int8'", "states of all 2 ranks", "is not finite on ranks 0, 1, in step 2"]
    for rank, found in enumerate(ranks2.run(refused)):
        assert len(found) == len(wanted), found
        for part, line in zip(wanted, found, strict=True):
            assert part.replace("rank 0", f"rank {rank}") in line


def unused(context: Rank) -> None:
    model = sharded()
    model.blocks[0].down.weight.requires_grad_(False)
    thinwire.compress_sharded(model)
    model.blocks[0].down.weight.requires_grad_(True)
    model(batch(context.rank, 0)).backward()


def test_a_parameter_without_gradient_is_reported(ranks2: Pool) -> None:
    with pytest.raises(RankFailure, match=r"unit blocks\.0 hands over"):
        ranks2.run(unused)
