"""Hybrid sharding, a second copy of the weights, every dtype, and gradients that are not finite: against stock FSDP2."""

from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
from sharded_net import batch, sharded, train, whole
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

import thinwire
from pool import Pool, Rank
from thinwire.compress.sharded.api import GRADIENT_KINDS, ShardedCompression
from thinwire.errors import UserError

pytestmark = pytest.mark.heavy

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
REPLICA_KINDS = ("none", "bf16", "int8", "int4", "sign", "topk", "powersgd", "demo")


def mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("replicate", "shard"))


class Waves(nn.Module):
    """Complex weights."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first = nn.Linear(24, 50, dtype=torch.complex64)
        self.second = nn.Linear(50, 27, dtype=torch.complex64)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        x = nn.functional.one_hot(words % 24, 24).to(torch.complex64)
        target = nn.functional.one_hot(words, 27)
        return ((self.second(self.first(x)).abs() - target) ** 2).mean()


def net(dtype: str, where: DeviceMesh | None, reshard: bool | int = True) -> nn.Module:
    if dtype != "complex64":
        return sharded(reshard, DTYPES[dtype], where)
    model = Waves()
    fully_shard(model.first, mesh=where, reshard_after_forward=reshard)
    fully_shard(model, mesh=where)
    return model


def bits(model: nn.Module) -> list[torch.Tensor]:
    """What this rank holds, as bytes."""
    return [one.to_local().detach().contiguous().view(torch.uint8).clone() for one in model.parameters()]  # type: ignore[operator]


def equal_bits(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(bits(one), bits(other), strict=True))


def same_in_replicas(model: nn.Module, where: DeviceMesh) -> bool:
    group, equal = where.get_group("replicate"), True
    for own in bits(model):
        everyone = [torch.empty_like(own) for _ in range(group.size())]
        dist.all_gather(everyone, own, group=group)
        equal &= all(torch.equal(one, own) for one in everyone)
    return equal


def far(one: nn.Module, other: nn.Module) -> float:
    a, b = whole(one), whole(other)
    return max(float((a[name] - b[name]).abs().max()) for name in a)


# -- as stock FSDP2 --------------------------------------------------------------------------------------------------------


def as_stock(context: Rank, dtype: str, reshard: bool | int, hybrid: bool, num_micro: int) -> float:
    where = mesh() if hybrid else None
    stock, mine = net(dtype, where, reshard), net(dtype, where, reshard)
    train(stock, context.rank, range(2), num_micro)
    options: dict[str, Any] = {"replicas": "none"} if hybrid else {}
    compression = thinwire.compress_sharded(mine, "float32", "float32", **options)
    train(mine, context.rank, range(2), num_micro)
    compression.detach()
    stock_again = net(dtype, where, reshard)
    train(mine, context.rank, range(1))  # with FSDP2's own collectives, which are back
    train(stock_again, context.rank, range(1))
    return far(mine, after(stock, context.rank))


def after(model: nn.Module, rank: int) -> nn.Module:
    train(model, rank, range(1))
    return model


FEW = ("float32", "bfloat16", "complex64")
"""Dtypes that are tried each time; the others are like one of them."""
ALL = [pytest.param(dtype, marks=() if dtype in FEW else pytest.mark.long) for dtype in (*DTYPES, "complex64")]
NEAR = {"float32": 1e-5, "bfloat16": 0.06, "float16": 0.01, "float64": 1e-13, "complex64": 1e-5}


@pytest.mark.parametrize("dtype", ALL)
def test_uncoded_it_is_stock_hybrid_sharding(ranks4: Pool, dtype: str) -> None:
    for micro in (1, 2) if dtype == "float32" else (1,):
        assert max(ranks4.run(as_stock, dtype, True, True, micro)) < NEAR[dtype]


@pytest.mark.parametrize("dtype", ["bfloat16", "float64", "complex64"])
@pytest.mark.long
def test_uncoded_it_is_stock_fsdp2_in_every_dtype(ranks4: Pool, dtype: str) -> None:
    assert max(ranks4.run(as_stock, dtype, True, False, 1)) < NEAR[dtype]


@pytest.mark.long
def test_a_second_copy_of_the_weights_is_stock_resharding(ranks4: Pool) -> None:
    assert max(ranks4.run(as_stock, "float32", 2, False, 2)) < 1e-5


def divided(context: Rank) -> list[float]:
    """A pass that only adds up, the user's divisor, which gloo cannot take itself, and a sum by force: largest differences."""
    where, found = mesh(), []
    for change, factor in (
        (None, 1.0),
        (lambda model: model.set_gradient_divide_factor(6.0), 4 / 6),
        (lambda model: model.set_gradient_divide_factor(2.0), 4 / 2),
        (lambda model: model.set_force_sum_reduction_for_comms(True), 1.0),
    ):
        gradients = []
        for mine in (False, True):
            model = sharded(mesh=where)
            compression = thinwire.compress_sharded(model, replicas="none") if mine else None
            for unit in (*model.blocks, model) if mine and change else ():
                change(unit)
            for micro in range(2):
                model.set_requires_all_reduce(micro == 1)
                model(batch(context.rank, micro)).backward()
                assert micro == 1 or all(parameter.grad is None for parameter in model.parameters())
            gradients.append(whole(model, lambda parameter: parameter.grad))
            if compression:
                compression.detach()
        stock, ours = gradients
        found.append(max(float((stock[name] * factor - ours[name]).abs().max()) for name in stock))
    return found


@pytest.mark.long
def test_gradients_are_divided_and_added_up_as_in_stock(ranks4: Pool) -> None:
    for found in ranks4.run(divided):
        assert max(found) < 1e-6, found


# -- in codes ------------------------------------------------------------------------------------------------------------


def biases_alone(context: Rank, hybrid: bool) -> dict[str, float]:
    """By name: how far the gradient in codes is from that of stock."""
    where, gradients = mesh() if hybrid else None, []
    options: dict[str, Any] = {"replicas": "int4"} if hybrid else {}
    for mine in (False, True):
        model = net("complex64", where)
        compression = thinwire.compress_sharded(model, "int4", "float32", **options) if mine else None
        model(batch(context.rank, 0)).backward()
        gradients.append(whole(model, lambda parameter: parameter.grad))
        if compression:
            compression.detach()
    stock, ours = gradients
    return {name: float((stock[name] - ours[name]).abs().max() / stock[name].abs().max()) for name in stock}


@pytest.mark.parametrize("hybrid", [True, False])
def test_complex_vectors_go_as_they_are(ranks4: Pool, hybrid: bool) -> None:
    for off in ranks4.run(biases_alone, hybrid):
        assert all((far < 1e-5) == name.endswith("bias") for name, far in off.items()), off


def coded(
    context: Rank, dtype: str, gradients: str, replicas: str | None, reshard: bool | int
) -> tuple[bool, Counter[Any], Counter[Any]]:
    """Replicas equal to the bit after steps, predicted, recorded."""
    where = mesh() if replicas else None
    model = net(dtype, where, reshard)
    options: dict[str, Any] = {"replicas": replicas} if replicas else {}
    compression = thinwire.compress_sharded(model, gradients, "float32", ledger=context.ledger, **options)
    train(model, context.rank, range(2))
    before = Rank(context.rank, context.world_size, context.ledger, context.ledger.snapshot())
    train_one(model, context.rank)
    predicted, recorded = Counter[Any](), Counter[Any]()
    for call, total in before.recorded().items():
        recorded[call.label, call.axis, call.op, call.message_bytes] += total.calls
    for transfer in compression.transfers():
        predicted[transfer.label, transfer.axis, transfer.op, transfer.message_bytes] += transfer.calls
    compression.detach()
    return where is None or same_in_replicas(model, where), predicted, recorded


def train_one(model: nn.Module, rank: int) -> None:
    """Without clipping, which sends a norm."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(batch(rank, 7)).backward()
    optimizer.step()


def check_coded(ranks4: Pool, *case: Any) -> None:
    for equal, predicted, recorded in ranks4.run(coded, *case):
        assert equal
        assert predicted == recorded


@pytest.mark.parametrize("dtype", ALL)
@pytest.mark.parametrize("replicas", [pytest.param("none", marks=pytest.mark.long), "int4"])
def test_replicas_are_equal_and_what_is_predicted_is_sent(ranks4: Pool, dtype: str, replicas: str) -> None:
    check_coded(ranks4, dtype, "int8" if replicas == "int4" else "float32", replicas, True)


@pytest.mark.long
@pytest.mark.parametrize("dtype", NEAR)
@pytest.mark.parametrize("replicas", REPLICA_KINDS)
def test_replicas_are_equal_in_every_code(ranks4: Pool, dtype: str, replicas: str) -> None:
    check_coded(ranks4, dtype, "float32", replicas, False)


@pytest.mark.long
@pytest.mark.parametrize("dtype", NEAR)
@pytest.mark.parametrize("gradients", GRADIENT_KINDS)
def test_what_is_predicted_is_sent_in_every_dtype(ranks4: Pool, dtype: str, gradients: str) -> None:
    check_coded(ranks4, dtype, gradients, None, True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_gathered_again_inside_the_host(ranks4: Pool, dtype: str) -> None:
    for equal, predicted, recorded in ranks4.run(coded, dtype, "int4", None, 2):
        assert equal
        assert predicted == recorded
        assert sum(calls for (_, axis, _, _), calls in recorded.items() if axis == "world secondary") == 3


def owed(context: Rank, dtype: str) -> list[tuple[Any, Any, Any]]:
    """For two steps: what the chunk should have been, what it became and the residual before and after, on this rank."""
    where = mesh()
    model, exact = net(dtype, where), net(dtype, where)
    compression = thinwire.compress_sharded(model, replicas="int4")
    found, before = [], dict[str, torch.Tensor]()
    for step in range(2):
        for one in (model, exact):
            one.zero_grad()
            one(batch(context.rank, step)).backward()
        after = {name: values.clone() for name, values in compression.residuals().items()}
        group = where.get_group("replicate")
        for (name, got), wanted in zip(model.named_parameters(), exact.parameters(), strict=True):
            if name not in after:
                continue
            values = got.grad.to_local().float().flatten()
            sums = [after[name] - before.get(name, torch.zeros_like(after[name]))]
            dist.all_reduce(sums[0], group=group)
            lost = sums[0][: values.numel()] / group.size()
            found.append((values + lost, wanted.grad.to_local().float().flatten(), values))
        before = after
    compression.detach()
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nothing_is_lost_to_the_mean_over_replicas(ranks4: Pool, dtype: str) -> None:
    near = 1e-6 if dtype == "float32" else 2e-3
    for found in ranks4.run(owed, dtype):
        assert len(found) == 2 * 7
        assert all((kept - wanted).abs().max() < near for kept, wanted, _ in found)
        assert any((got - wanted).abs().max() > near for _, wanted, got in found)


def resumed(context: Rank) -> tuple[bool, Any, dict[str, torch.Tensor]]:
    where = mesh()
    straight, first, second = net("bfloat16", where), net("bfloat16", where), net("bfloat16", where)
    compression = thinwire.compress_sharded(straight, "int4", "int8", replicas="int4")
    train(straight, context.rank, range(4))
    compression.detach()
    compression = thinwire.compress_sharded(first, "int4", "int8", replicas="int4")
    train(first, context.rank, range(2))
    state, residuals = compression.state_dict(), compression.residuals()
    compression.detach()
    second.load_state_dict(first.state_dict())
    compression = thinwire.compress_sharded(second, "int4", "int8", replicas="int4")
    compression.load_state_dict(state)
    train(second, context.rank, range(2, 4))
    compression.detach()
    return equal_bits(straight, second), state, residuals


def adopted(context: Rank, states: list[Any]) -> dict[str, torch.Tensor]:
    model = net("bfloat16", init_device_mesh("cpu", (context.world_size // 2, 2), mesh_dim_names=("replicate", "shard")))
    compression = thinwire.compress_sharded(model, "int4", "int8", replicas="int4")
    compression.adopt(states)
    found = {name: values.clone() for name, values in compression.residuals().items()}
    train(model, context.rank, range(1))
    compression.detach()
    return found


@pytest.mark.long
def test_resuming_is_bit_for_bit_and_more_replicas_take_the_mean(ranks4: Pool, ranks8: Pool) -> None:
    results = ranks4.run(resumed)
    assert all(equal for equal, _, _ in results)
    found = ranks8.run(adopted, [state for _, state, _ in results])
    for rank, residuals in enumerate(found):
        one, other = (results[replica * 2 + rank % 2][2] for replica in range(2))
        assert residuals.keys() == one.keys()
        assert all(torch.allclose(values, (one[name] + other[name]) / 2, atol=1e-7) for name, values in residuals.items())


# -- what is not finite --------------------------------------------------------------------------------------------------


def scaled(context: Rank, gradients: str, replicas: str | None, broken: bool) -> tuple[list[float], bool, bool]:
    """Scales, whether the step with an inf on one rank changed the weights anywhere, and whether any residual."""
    where = mesh() if replicas else None
    model = net("float32", where)
    options: dict[str, Any] = {"replicas": replicas} if replicas else {}
    compression = thinwire.compress_sharded(model, gradients, "float32", **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scales, moved, changed = [], False, False
    for step in range(4):
        weights, state = bits(model), flat(compression)
        optimizer.zero_grad()
        loss = scaler.scale(model(batch(context.rank, step)))
        if broken and step == 2 and context.rank == 1:
            loss = loss * torch.inf
        loss.backward()
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
        if step == 2:
            moved = any(not torch.equal(a, b) for a, b in zip(weights, bits(model), strict=True))
            changed = any(not torch.equal(a, b) for a, b in zip(state, flat(compression), strict=True))
    compression.detach()
    return scales, moved, changed and bool(state)


def flat(compression: ShardedCompression) -> list[torch.Tensor]:
    owed = [unit["owed"] for unit in compression.state_dict()["units"].values()]
    return [one.clone() for one in [*owed, *compression.residuals().values()] if one is not None]


@pytest.mark.parametrize(
    ("gradients", "replicas"),
    [
        ("int4", None),
        ("float32", "int4"),
        *(pytest.param(*case, marks=pytest.mark.long) for case in (("int8", "none"), ("int8", "topk"))),
        *(pytest.param(kind, None, marks=pytest.mark.long) for kind in ("int8", "fp4", "sign", "bf16", "fp16")),
    ],
)
def test_a_step_that_a_scaler_leaves_out_changes_nothing(ranks4: Pool, gradients: str, replicas: str | None) -> None:
    for scales, moved, changed in ranks4.run(scaled, gradients, replicas, True):
        assert (scales, moved, changed) == ([8, 8, 4, 4], False, False)
    for scales, moved, changed in ranks4.run(scaled, gradients, replicas, False):
        assert (scales, moved, changed) == ([8] * 4, True, True)


def raised(context: Rank, hybrid: bool, adds_up: bool) -> str:
    model = sharded(mesh=mesh() if hybrid else None)
    compression = thinwire.compress_sharded(model, "int4", nonfinite="raise")
    model(batch(context.rank, 0)).backward()
    try:
        for micro in range(2):
            model.set_requires_all_reduce(not adds_up or micro == 1)
            loss = model(batch(context.rank, 1))
            if context.rank == 1 and micro == 0:
                loss = loss * torch.nan
            loss.backward()
    except UserError as error:
        return str(error)
    finally:
        compression.detach()
    return ""


@pytest.mark.parametrize(("hybrid", "adds_up"), [(False, False), pytest.param(True, False, marks=pytest.mark.long), (True, True)])
def test_all_ranks_name_what_is_not_finite(ranks4: Pool, hybrid: bool, adds_up: bool) -> None:
    lines = ranks4.run(raised, hybrid, adds_up)
    assert len(set(lines)) == 1
    assert "blocks." in lines[0] and "is not finite on rank 1, in step 2" in lines[0]


def refused(context: Rank) -> list[str]:
    found = []
    one, two = mesh(), init_device_mesh("cpu", (4, 1), mesh_dim_names=("replicate", "shard"))
    for where, options in (
        (None, {"replicas": "int4"}),
        (one, {"gradients": None}),
        (one, {"replicas": {"kind": "int4", "rank": 3}}),
        (two, {}),
    ):
        try:
            thinwire.compress_sharded(sharded(mesh=where), **options)
        except UserError as error:
            found.append(str(error))
    return found


def test_refusals_say_what_to_do(ranks4: Pool) -> None:
    for found in ranks4.run(refused):
        wanted = ["on a mesh of one axis", "say 'float32'", "rank: int4 has no such option", "is replicated and not sharded"]
        assert all(part in line for part, line in zip(wanted, found, strict=True)), found
