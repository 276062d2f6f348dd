"""Whatever is used when: what was delivered and the residuals are together the sum of the true gradients.

    sum over steps of the result  +  mean over ranks of the residuals  =  sum over steps of the mean true gradient

for every codec with error feedback, every pattern of use, on 1, 2 and 4 ranks; and replicas get the same bits.
"""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from vectors import short

import thinwire
from pool import Pool, Rank
from thinwire.compress.base import CODECS
from thinwire.compress.coded import CodedExchange
from thinwire.config.compress import BLOCKED, SUMMABLE

KINDS = [*sorted(CODECS.keys() - SUMMABLE), "topk_global", "svd", "powersgd", "randomk"]
SHAPES = {"wide": (24, 40), "tall": (40, 12), "bias": (40,), "embed": (30, 20), "cube": (6, 10, 10)}
OPTIONS: dict[str, dict[str, Any]] = {"randomk": {"fraction": 0.1}, "topk_global": {"fraction": 0.1}}


class Parts(nn.Module):
    """Of which each step uses some; `base` always, so that there is a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Parameter(torch.ones(8, 8))
        self.parts = nn.ParameterDict({name: nn.Parameter(torch.zeros(shape)) for name, shape in SHAPES.items()})

    def forward(self, factors: dict[str, torch.Tensor]) -> torch.Tensor:
        total = self.base.sum()
        for name, factor in factors.items():
            total = total + (self.parts[name] * factor).sum()
        return total


def factor(name: str, *seeds: int) -> torch.Tensor:
    """The gradient of a part that is used."""
    seed = sum(100**place * one for place, one in enumerate((list(SHAPES).index(name), *seeds)))
    return torch.randn(SHAPES[name], generator=torch.Generator().manual_seed(seed))


def delivered(
    context: Rank, kind: str, ddp: dict[str, Any], use: list[list[set[str]]], micro: int, adam: bool = False
) -> dict[str, Any]:
    """use[step][rank]: the parts that the rank uses in the step; of several micro-batches the first uses one less. adam: in units
    of an optimizer, which makes steps."""
    replica = DistributedDataParallel(Parts(), bucket_cap_mb=0.004, **ddp)
    optimizer = torch.optim.AdamW(replica.parameters()) if adam else None
    exchange = thinwire.compress_gradients(replica, kind, optimizer=optimizer, **OPTIONS.get(kind, {}))
    assert isinstance(exchange, CodedExchange)
    sums = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    true = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    for step, by_rank in enumerate(use):
        replica.zero_grad(set_to_none=step % 2 == 0)
        names = sorted(by_rank[context.rank])
        for number in range(micro):
            factors = {name: factor(name, step, context.rank, number) for name in names[number : number + len(names)]}
            for name, one in factors.items():
                true[name] += one
            if number < micro - 1:
                with replica.no_sync():
                    replica(factors).backward()
            else:
                replica(factors).backward()
        for name, parameter in replica.module.parts.items():
            if parameter.grad is not None:
                sums[name] += parameter.grad
        if optimizer is not None:
            optimizer.step()
    residuals = {name.removeprefix("parts."): values.clone() for name, values in exchange.residuals().items()}
    exchange.detach()
    return {"delivered": sums, "true": true, "residuals": residuals}


def check(reports: list[dict[str, Any]]) -> None:
    for name, shape in SHAPES.items():
        assert all(torch.equal(reports[0]["delivered"][name], one["delivered"][name]) for one in reports)
        true = torch.stack([one["true"][name] for one in reports]).mean(0)
        zero = torch.zeros(shape)
        residuals = torch.stack([one["residuals"].get(name, zero).view(shape) for one in reports]).double().mean(0)
        torch.testing.assert_close(reports[0]["delivered"][name].double() + residuals, true, rtol=0, atol=2e-4)


@st.composite
def uses(draw: st.DrawFn, ranks: int) -> list[list[set[str]]]:
    """Which rank uses which parts in which of some steps."""
    some = st.sets(st.sampled_from(sorted(SHAPES)))
    return draw(st.lists(st.lists(some, min_size=ranks, max_size=ranks), min_size=2, max_size=5))


@pytest.mark.parametrize("number", [1, 2, 4])
@settings(max_examples=8)
@given(data=st.data())
def test_delivered_and_residuals_are_the_true_gradients(request: pytest.FixtureRequest, number: int, data: st.DataObject) -> None:
    ranks: Pool = request.getfixturevalue(f"ranks{number}")
    kind = data.draw(st.sampled_from(KINDS))
    view = data.draw(st.booleans())
    micro = data.draw(st.sampled_from([1, 2]))
    ddp = {"find_unused_parameters": True, "gradient_as_bucket_view": view}
    check(ranks.run(delivered, kind, ddp, data.draw(uses(number)), micro))


@pytest.mark.parametrize(
    ("number", "kind"),
    short(((number, kind) for number in (1, 2, 4) for kind in KINDS), lambda number, kind: number == 2 or kind == "int4"),
)
def test_heads_that_take_turns_lose_nothing(request: pytest.FixtureRequest, kind: str, number: int) -> None:
    """Every part in one step of three, on all ranks; and once more on the first rank only."""
    ranks: Pool = request.getfixturevalue(f"ranks{number}")
    names = list(SHAPES)
    turns = [[{name for place, name in enumerate(names) if place % 3 == step % 3}] * number for step in range(6)]
    alone = [[set(names) if rank == 0 else set() for rank in range(number)] for _ in range(2)]
    check(ranks.run(delivered, kind, {"find_unused_parameters": True}, turns + alone, 1))


@pytest.mark.parametrize(("number", "kind"), [(2, kind) for kind in sorted(BLOCKED)] + [(4, "int4")])
def test_in_units_of_an_optimizer_nothing_is_lost(request: pytest.FixtureRequest, kind: str, number: int) -> None:
    """Its second moments are what has arrived; every part in two steps of three."""
    ranks: Pool = request.getfixturevalue(f"ranks{number}")
    turns = [[{name for place, name in enumerate(SHAPES) if place % 3 != step % 3}] * number for step in range(6)]
    check(ranks.run(delivered, kind, {"find_unused_parameters": True}, turns, 1, True))


@pytest.mark.parametrize("kind", ["int4", "powersgd"])
def test_a_static_graph_loses_nothing(ranks2: Pool, kind: str) -> None:
    """What is not used in its first step is never used."""
    check(ranks2.run(delivered, kind, {"static_graph": True}, [[{"wide", "bias"}, {"tall"}]] * 4, 1))


def sent(context: Rank, kind: str) -> tuple[dict, dict]:
    """(what was sent in a step with unused parameters, what was predicted)."""
    replica = DistributedDataParallel(Parts(), find_unused_parameters=True)
    exchange = thinwire.compress_gradients(replica, kind, **OPTIONS.get(kind, {}))
    from thinwire.sync.buckets import assign_buckets
    from thinwire.workload import Workload

    workload = Workload.of_parameters([(name, tuple(p.shape)) for name, p in replica.module.named_parameters()], 1)
    for _ in range(2):
        replica.zero_grad()
        before = context.ledger.snapshot()
        replica({"wide": factor("wide", context.rank)}).backward()
    from thinwire.collectives.ledger import difference

    made = {}
    for call, total in difference(context.ledger.snapshot(), before).items():
        made[call.op, call.message_bytes] = total.calls
    (bucket,) = assign_buckets(workload.parameters, 0)
    predicted: dict[Any, int] = {}
    for transfer in exchange.transfers("bucket 0", bucket, "data", context.world_size):
        predicted[transfer.op, transfer.message_bytes] = predicted.get((transfer.op, transfer.message_bytes), 0) + 1
    exchange.detach()
    return made, predicted


@pytest.mark.parametrize("kind", ["int4", "powersgd", "randomk", "dgc"])
@pytest.mark.parametrize("pool", ["ranks2", pytest.param("ranks4", marks=pytest.mark.long)])
def test_flags_of_use_are_predicted(request: pytest.FixtureRequest, pool: str, kind: str) -> None:
    ranks: Pool = request.getfixturevalue(pool)
    for made, predicted in ranks.run(sent, kind):
        assert {row: calls for row, calls in made.items() if row in predicted} == predicted
        flags = {
            row: calls for row, calls in made.items() if row not in predicted
        }  # DistributedDataParallel's own, of used parameters
        assert list(flags) == [("all_reduce", 4 * 6)]


class Spectral(nn.Module):
    """With complex parameters: a matrix and a vector."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(16, 24, dtype=torch.complex64, generator=generator))
        self.bias = nn.Parameter(torch.zeros(24, dtype=torch.complex64))
        self.gain = nn.Parameter(torch.ones(24))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ((x.to(torch.complex64) @ self.weight + self.bias).abs() * self.gain).square().sum()


def complex_gradients(context: Rank, kind: str) -> dict[str, Any]:
    model = Spectral()
    replica = DistributedDataParallel(model)
    exchange = thinwire.compress_gradients(replica, kind) if kind != "none" else None
    inputs = torch.randn(4, 16, generator=torch.Generator().manual_seed(context.rank))
    replica(inputs).backward()
    residuals = (
        {name: values.clone() for name, values in exchange.residuals().items()} if isinstance(exchange, CodedExchange) else {}
    )
    if exchange:
        exchange.detach()
    return {
        "got": {name: torch.view_as_real(p.grad) if p.is_complex() else p.grad for name, p in model.named_parameters()},
        "residuals": residuals,
    }


@pytest.mark.parametrize(
    ("number", "kind"),
    short(
        ((number, kind) for number in (1, 2, 4) for kind in ("int8", "int4", "topk", "svd", "powersgd", "bf16", "fp16")),
        lambda number, kind: number == 2 or kind == "int8",
    ),
)
def test_complex_parameters_are_averaged_whole(request: pytest.FixtureRequest, kind: str, number: int) -> None:
    ranks: Pool = request.getfixturevalue(f"ranks{number}")
    exact, reports = ranks.run(complex_gradients, "none"), ranks.run(complex_gradients, kind)
    for name, values in reports[0]["got"].items():
        assert all(torch.equal(values, one["got"][name]) for one in reports)
        true = exact[0]["got"][name]
        residuals = torch.stack([one["residuals"].get(name, torch.zeros(true.numel())).view_as(true) for one in reports]).mean(0)
        tolerance = 1e-2 if kind in SUMMABLE else 1e-5
        assert (values + residuals - true).norm() <= tolerance * true.norm()
        if name == "bias" and kind not in SUMMABLE:  # a vector stays one
            assert (values - true).norm() <= 1e-6 * true.norm()
