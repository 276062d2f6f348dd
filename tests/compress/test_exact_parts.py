"""What is not coded is exact: all on one rank, vectors and what is excluded, the first steps; and what a state must fit."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import thinwire
from pool import Pool, Rank
from thinwire.compress.coded import CodedExchange
from thinwire.config.compress import SUMMABLE, Coded
from thinwire.errors import UserError

KINDS = Coded.model_fields["kind"].annotation.__args__


class Odd(nn.Module):
    """With a parameter of no dims and an empty matrix."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.scale = nn.Linear(48, 32), nn.Parameter(torch.tensor(2.0))
        self.empty = nn.Parameter(torch.zeros(0, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.linear(x) * self.scale).square().sum() + self.empty.sum()


def gradients(context: Rank, kind: str, options: dict[str, Any]) -> dict[str, torch.Tensor]:
    model = Odd()
    replica = DistributedDataParallel(model)
    exchange = thinwire.compress_gradients(replica, kind, **options) if kind != "none" else None
    replica(torch.randn(4, 48, generator=torch.Generator().manual_seed(context.rank))).backward()
    if exchange:
        exchange.detach()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("kind", KINDS)
def test_one_rank_is_exact(ranks1: Pool, kind: str) -> None:
    options = {"vectors": True} if kind != "powersgd" else {}
    (exact,), (ours,) = ranks1.run(gradients, "none", {}), ranks1.run(gradients, kind, options)
    assert all(torch.equal(ours[name], exact[name]) for name in exact)


@pytest.mark.parametrize("method", ["two-shot", "gather"])
@pytest.mark.parametrize("number", [2, pytest.param(1, marks=pytest.mark.long), pytest.param(4, marks=pytest.mark.long)])
def test_parameters_of_no_dims_and_without_values_are_averaged(request: pytest.FixtureRequest, number: int, method: str) -> None:
    ranks: Pool = request.getfixturevalue(f"ranks{number}")
    exact, ours = ranks.run(gradients, "none", {}), ranks.run(gradients, "int8", {"vectors": True, "exchange": method})
    for one in ours:
        assert all(torch.equal(one[name], ours[0][name]) for name in one)
        for name, true in exact[0].items():
            assert one[name].shape == true.shape and (one[name] - true).norm() <= 0.02 * true.norm()


@pytest.mark.parametrize("kind", [pytest.param("bf16", marks=pytest.mark.long), "fp16", "int8"])
@pytest.mark.parametrize("number", [1, 2, pytest.param(4, marks=pytest.mark.long)])
def test_excluded_parameters_vectors_and_first_steps_are_exact(request: pytest.FixtureRequest, kind: str, number: int) -> None:
    ranks: Pool = request.getfixturevalue(f"ranks{number}")
    exact = ranks.run(gradients, "none", {})
    for options, parts in (
        ({"exclude": "*"}, {"linear.weight", "linear.bias", "scale", "empty"}),
        ({"after_steps": 9}, {"linear.weight", "linear.bias", "scale", "empty"}),
        ({"vectors": False}, {"linear.bias", "scale", "empty"}),
        ({"exclude": ("*weight",)}, {"linear.weight"}),
    ):
        for ours, true in zip(ranks.run(gradients, kind, options), exact, strict=True):
            assert all((ours[name] - true[name]).norm() <= 1e-6 * true[name].norm() for name in parts), (options, kind)


def small(context: Rank, kind: str) -> float:
    """The largest gradient where true ones are about 1e-9, which float16 does not have."""
    model = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16))
    replica = DistributedDataParallel(model)
    thinwire.compress_gradients(replica, kind, exclude=("*",), after_steps=1000)
    (replica(torch.randn(4, 16)) * 1e-9).square().sum().backward()
    return min(float(parameter.grad.abs().max()) for parameter in model.parameters())


def test_casts_exclude_what_is_named(ranks1: Pool) -> None:
    assert ranks1.run(small, "fp16")[0] > 0


def went(context: Rank, options: dict[str, Any], momentum: float) -> dict[str, torch.Tensor]:
    """How far 15 steps of SGD go, with dgc or with momentum of its own."""
    torch.manual_seed(0)
    model = nn.Linear(64, 64)
    before = copy.deepcopy(model)
    replica = DistributedDataParallel(model)
    exchange = thinwire.compress_gradients(replica, **options) if options else None
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=momentum)
    generator = torch.Generator().manual_seed(context.rank)
    for _ in range(15):
        optimizer.zero_grad()
        x, t = torch.randn(8, 64, generator=generator), torch.randn(8, 64, generator=generator)
        (replica(x) * t).sum().backward()
        optimizer.step()
    if exchange:
        exchange.detach()
    return {name: (getattr(model, name) - getattr(before, name)).detach() for name in ("weight", "bias")}


@pytest.mark.parametrize("number", [1, 2, pytest.param(4, marks=pytest.mark.long)])
def test_what_dgc_does_not_code_moves_as_by_sgd_with_momentum(request: pytest.FixtureRequest, number: int) -> None:
    ranks: Pool = request.getfixturevalue(f"ranks{number}")
    wanted = ranks.run(went, {}, 0.9)[0]
    coded = ranks.run(went, {"kind": "dgc", "fraction": 0.01}, 0.0)
    whole = ranks.run(went, {"kind": "dgc", "exclude": "*"}, 0.0)
    later = ranks.run(went, {"kind": "dgc", "after_steps": 99}, 0.0)
    for reports, names in (
        (coded, ["bias", "weight"] if number == 1 else ["bias"]),
        (whole, ["weight", "bias"]),
        (later, ["weight", "bias"]),
    ):
        for one in reports:
            assert all(torch.equal(one[name], reports[0][name]) for name in one)
            for name in names:
                torch.testing.assert_close(one[name], wanted[name], rtol=1e-4, atol=1e-5)


def switched(context: Rank, kind: str) -> tuple[torch.Tensor, bool]:
    """Coded at first, then excluded: the residual goes along once. (delivered + residual - true, any left)."""
    torch.manual_seed(0)
    total, true, state = torch.zeros(32, 48), torch.zeros(32, 48), None
    for exclude in ("*embed*", "*"):
        model = nn.Linear(48, 32, bias=False)
        replica = DistributedDataParallel(model)
        exchange = thinwire.compress_gradients(replica, kind, exclude=exclude)
        assert isinstance(exchange, CodedExchange)
        if state is not None:
            exchange.load_state_dict(state)
        for step in range(3):
            replica.zero_grad()
            x = torch.randn(4, 48, generator=torch.Generator().manual_seed(10 * step + context.rank))
            replica(x).sum().backward()
            total += model.weight.grad
            alone = nn.Linear(48, 32, bias=False)
            alone(x).sum().backward()
            true += alone.weight.grad
        state = exchange.state_dict()
        exchange.detach()
    torch.distributed.all_reduce(true.div_(context.world_size))
    return total - true, bool(exchange.residuals())


@pytest.mark.parametrize("kind", ["int4", "topk", "powersgd"])
def test_the_residual_of_a_parameter_that_is_not_coded_any_more_goes_along(ranks2: Pool, kind: str) -> None:
    for off, left in ranks2.run(switched, kind):
        assert not left and off.abs().max() < 1e-4


def exact_steps(context: Rank) -> list[bool]:
    """Whether each of four steps was exact, with a new exchange from the state of the old one after the first."""
    torch.manual_seed(0)
    found, state = [], None
    for steps in (1, 3):
        replica = DistributedDataParallel(nn.Linear(48, 32, bias=False))
        exchange = thinwire.compress_gradients(replica, "sign", after_steps=2, feedback=False)
        if state is not None:
            exchange.load_state_dict(state)
        for _ in range(steps):
            replica.zero_grad()
            replica(torch.ones(1, 48) * torch.arange(48)).sum().backward()
            found.append(bool((replica.module.weight.grad == torch.arange(48)).all()))
        state = exchange.state_dict()
        exchange.detach()
    return found


def test_a_resumed_run_goes_on_counting_its_exact_steps(ranks2: Pool) -> None:
    assert ranks2.run(exact_steps) == [[True, True, False, False]] * 2


def loaded(context: Rank) -> dict[str, str]:
    messages = {}

    def states(names: str, world: int = 0) -> dict[str, Any]:
        model: Any = nn.ModuleDict({names: nn.Linear(32, 32)})
        replica = DistributedDataParallel(model[names])
        exchange = thinwire.compress_gradients(replica, "int4")
        replica(torch.randn(2, 32)).sum().backward()
        state = exchange.state_dict()
        exchange.detach()
        return state | ({"ranks": world} if world else {})

    def load(state: dict[str, Any], module: nn.Module, kind: str = "int4") -> Any:
        exchange = thinwire.compress_gradients(DistributedDataParallel(module), kind)
        try:
            exchange.load_state_dict(state)
        finally:
            exchange.detach()

    good = states("a")
    compiled = copy.deepcopy(good)
    compiled["memory"]["owed"]["kept"] = {f"_orig_mod.{name}": one for name, one in good["memory"]["owed"]["kept"].items()}
    compiled["memory"]["owed"]["numels"] = {f"_orig_mod.{name}": one for name, one in good["memory"]["owed"]["numels"].items()}
    load(good, nn.Linear(32, 32))
    load(compiled, nn.Linear(32, 32))  # the same parameters, compiled or not
    load(good, torch.compile(nn.Linear(32, 32)))
    for name, call in {
        "names": lambda: load(good, nn.Sequential(nn.Linear(32, 32))),
        "shape": lambda: load(good, nn.Linear(32, 16)),
        "ranks": lambda: load(states("a", 4), nn.Linear(32, 32)),
        "kind": lambda: load(good, nn.Linear(32, 32), "int8"),
        "feedback": lambda: thinwire.compress_gradients(
            DistributedDataParallel(nn.Linear(32, 32)), "int4", feedback=False
        ).load_state_dict(good),
    }.items():
        with pytest.raises(UserError) as caught:
            call()
        messages[name] = str(caught.value)
    return messages


@pytest.mark.long
def test_a_state_that_would_not_be_used_is_refused(ranks2: Pool) -> None:
    messages = ranks2.run(loaded)[0]
    assert "a residual of 'weight', and the model has no such parameter but 2 others, first '0.weight'" in messages["names"]
    assert "1024 values of 'weight', which has 512" in messages["shape"]
    assert "one of 4 ranks, and there are 2" in messages["ranks"] and "adopt()" in messages["ranks"]
    assert "compress.kind = 'int4', not 'int8'" in messages["kind"]
    assert "the checkpoint holds owed, steps, which nothing here would use" in messages["feedback"]


def refused(context: Rank) -> list[str]:
    used, twice = DistributedDataParallel(nn.Linear(4, 4)), DistributedDataParallel(nn.Linear(4, 4))
    for _ in range(2):
        used(torch.ones(1, 4)).sum().backward()
    thinwire.compress_gradients(twice, "int4")
    cases = [(nn.Linear(4, 4), {}), (used, {}), (twice, {}), (DistributedDataParallel(nn.Linear(4, 4)), {"nonfinite": "skip"})]
    messages = []
    for model, options in cases:
        with pytest.raises(UserError) as caught:
            thinwire.compress_gradients(model, "int4", **options)
        messages.append(str(caught.value))
    return messages


def test_calls_that_cannot_work_are_refused_in_one_line(ranks2: Pool) -> None:
    bare, used, twice, option = ranks2.run(refused)[0]
    assert "takes a DistributedDataParallel, not Linear; for FSDP2 there is compress_sharded" in bare
    assert "1 forward passes are over; call it before the first" in used
    assert "call it once, before the first backward pass" in twice
    assert "nonfinite = 'skip'; there are 'average', 'raise'" in option


def sharded(context: Rank) -> tuple[bool, int]:
    """(exact on one rank, values coded with a pattern that names nothing)."""

    def net() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(*(nn.Linear(64, 64) for _ in range(3)))

    mine, stock = net(), net()
    for one in mine:
        fully_shard(one)
    fully_shard(mine)
    x = torch.randn(4, 64)
    with torch.no_grad():
        mine(x)  # as an evaluation before training
    compression = thinwire.compress_sharded(mine, exclude="*head*")
    rows = [compression._coding.gradients_row(unit, 2) for unit in compression.units]
    mine(x).square().sum().backward()
    stock(x).square().sum().backward()
    whole = [one.grad.full_tensor() for one in mine.parameters()]
    exact = all(torch.equal(ours, other.grad) for ours, other in zip(whole, stock.parameters(), strict=True))
    compression.detach()
    return exact, sum(row.coded_values for row in rows)


@pytest.mark.parametrize("number", [1, 2, 4])
def test_shards_after_an_evaluation_and_on_one_rank(request: pytest.FixtureRequest, number: int) -> None:
    ranks: Pool = request.getfixturevalue(f"ranks{number}")
    for exact, coded in ranks.run(sharded):
        assert exact == (number == 1)
        assert coded == 3 * 64 * 64 // 2


def test_every_kind_is_either_a_cast_or_feeds_back() -> None:
    assert {kind for kind in KINDS if not Coded(kind=kind).feeds_back} == SUMMABLE
