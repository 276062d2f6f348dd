"""Replicas that go alone: equal to a one-process reference of ten lines, to the byte as predicted, resumed as uninterrupted."""

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from pool import Pool, Rank
from thinwire.collectives.ledger import difference
from thinwire.config.compress import Coded, NoCompression
from thinwire.config.sync import DiLoCo, LocalSGD, MuLoCo, SparseLoCo, Streaming
from thinwire.layout import AXES, Layout
from thinwire.sync.fragments import due, fragments
from thinwire.sync.make import make_synchroniser
from thinwire.sync.outer import published_learning_rate
from thinwire.workload import Workload

STEPS = 9
KINDS = {
    "diloco": DiLoCo(every=3, outer_learning_rate=0.7),
    "streaming": Streaming(every=4, layers_per_fragment=1, overlap=2, mixing=0.5),
    "sparseloco": SparseLoCo(every=3),
    "muloco": MuLoCo(every=3),
    "local_sgd": LocalSGD(every=4),
}
CODES = {"none": NoCompression(), "int4": Coded(kind="int4", exclude=(), vectors=True), "bf16": Coded(kind="bf16")}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(8, 16)
        self.blocks = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return x


def batch(step: int, rank: int) -> torch.Tensor:
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(1000 * rank + step))


def inner_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> None:
    (model(x) - 1).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.02)


def run(context: Rank, kind: str, code: str, data: int, first: int, last: int, state: dict | None) -> dict[str, Any]:
    """Steps `first` to `last`, resumed from `state`, and the end of training if last is STEPS."""
    layout = Layout(outer=context.world_size // data, data=data)
    sync = make_synchroniser(KINDS[kind], CODES[code], layout, context.ledger)
    model = Net()
    optimizer = adamw(model)
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        sync.load_state_dict(state["sync"])
    mesh = init_device_mesh("cpu", layout.degrees, mesh_dim_names=AXES)
    with sync.attached(model, optimizer, mesh) as module:
        with sync.rehearsal():
            for _ in range(2):
                module(batch(0, 0)).sum().backward()
        optimizer.zero_grad(set_to_none=False)
        before = context.ledger.snapshot()
        for step in range(first, last):
            with sync.microbatch(last=True):
                (module(batch(step, context.rank)) - 1).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
            sync.after_step(step)
        saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "sync": sync.state_dict()}
        saved = {key: {k: v.clone() if torch.is_tensor(v) else v for k, v in value.items()} for key, value in saved.items()}
        local = [p.detach().clone() for p in model.parameters()]
        sent = difference(context.ledger.snapshot(), before)
        if last == STEPS:
            sync.finish()
        with sync.averaged():
            final = [p.detach().clone() for p in model.parameters()]
    workload = Workload.of_parameters([(name, tuple(p.shape)) for name, p in model.named_parameters()], 4)
    predicted = {(t.label, t.op, t.message_bytes, t.axis, t.every) for t in sync.traffic(workload, layout)}
    rows = {(c.label, c.op, c.message_bytes, c.axis): t.calls for c, t in sent.items()}
    return {"state": saved, "local": local, "final": final, "sent": rows, "predicted": predicted}


def reference(kind: str, workers: int) -> tuple[list[list[torch.Tensor]], list[torch.Tensor]]:
    """All replicas in one process, by the papers' formulas: (each one's parameters after STEPS, the final anchor)."""
    models = [Net() for _ in range(workers)]
    optimizers = [adamw(model) for model in models]
    names = [name for name, _ in models[0].named_parameters()]
    rate, mu, every, tau, alpha = {
        "diloco": (0.7, 0.9, 3, 0, 0.0), "local_sgd": (1.0, 0.0, 4, 0, 0.0), "muloco": (0.7, 0.6, 3, 0, 0.0),
        "streaming": (0.4, 0.9, 4, 2, 0.5),
    }[kind]  # fmt: skip
    groups = [[n for n in names if f"blocks.{b}." in n] for b in range(3)] + [[n for n in names if "embed" in n]]
    groups = groups if kind == "streaming" else [names]
    anchor = {name: p.detach().clone() for name, p in models[0].named_parameters()}
    u = {name: torch.zeros_like(p) for name, p in anchor.items()}
    waiting: dict[int, dict[str, torch.Tensor]] = {}

    def send(group: list[str]) -> dict[str, torch.Tensor]:
        return {n: torch.stack([anchor[n] - dict(m.named_parameters())[n].detach() for m in models]).mean(0) for n in group}

    def apply(deltas: dict[str, torch.Tensor]) -> None:
        for n, d in deltas.items():
            u[n] = mu * u[n] + d
            anchor[n] = anchor[n] - rate * (d + mu * u[n] if mu else d)
            for m in models:
                p = dict(m.named_parameters())[n].data
                p.copy_(alpha * p + (1 - alpha) * anchor[n])

    sent = dict.fromkeys(range(len(groups)), 0)
    for step in range(STEPS):
        for rank, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            inner_step(model, optimizer, batch(step, rank))
        for index, group in enumerate(groups):
            if index in waiting and step + 1 == sent[index] + tau:
                apply(waiting.pop(index))
            if (step + 1) % every == (index + 1) * every // len(groups) % every:
                waiting[index], sent[index] = send(group), step + 1
                if not tau:
                    apply(waiting.pop(index))
    local = [[p.detach().clone() for p in model.parameters()] for model in models]
    for index in list(waiting):
        apply(waiting.pop(index))
    late = [index for index in range(len(groups)) if sent[index] != STEPS]
    deltas = [send(groups[index]) for index in late]
    for each in deltas:
        apply(each)
    return local, [anchor[name] for name in names]


@pytest.mark.parametrize("kind", ["diloco", "streaming", "local_sgd", "muloco"])
@pytest.mark.parametrize("pool", ["ranks2", "ranks3"])
def test_equals_the_reference_in_one_process(request: pytest.FixtureRequest, pool: str, kind: str) -> None:
    ranks: Pool = request.getfixturevalue(pool)
    told = ranks.run(run, kind, "none", 1, 0, STEPS, None)
    local, anchor = reference(kind, len(told))
    for rank, one in enumerate(told):
        torch.testing.assert_close(one["local"], local[rank], rtol=0, atol=2e-6)
        torch.testing.assert_close(one["final"], anchor, rtol=0, atol=2e-6)
        assert all(torch.equal(a, b) for a, b in zip(one["final"], told[0]["final"], strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("code", "data"), [("none", 1), ("int4", 1), ("bf16", 2), ("int4", 2)])
def test_sends_what_was_predicted_and_ends_bit_equal(ranks4: Pool, kind: str, code: str, data: int) -> None:
    told = ranks4.run(run, kind, code, data, 0, STEPS, None)
    every = KINDS[kind].every
    rare = {row for row in told[0]["predicted"] if row[3] == "outer"}
    assert {row[4] for row in rare} == {every}
    measured = {row: calls for row, calls in told[0]["sent"].items() if row[3] == "outer"}
    assert set(measured) == {row[:4] for row in rare}
    assert all(STEPS // every <= calls <= STEPS // every + 1 for calls in measured.values())
    each_step = {row[:4] for row in told[0]["predicted"] if row[3] == "data"}
    assert {row for row in told[0]["sent"] if row[3] == "data"} == each_step and bool(each_step) == (data > 1)
    for one in told:
        assert all(torch.equal(a, b) for a, b in zip(one["final"], told[0]["final"], strict=True))
    if data == 2:
        assert all(torch.equal(a, b) for a, b in zip(told[0]["local"], told[1]["local"], strict=True))


@pytest.mark.parametrize("kind", ["streaming", "sparseloco"])
@pytest.mark.parametrize("stop", [5, 6])
def test_resumed_equals_uninterrupted_bit_for_bit(ranks2: Pool, kind: str, stop: int) -> None:
    """Also with a fragment under way (streaming, after 5 steps)."""
    whole = ranks2.run(run, kind, "int4", 1, 0, STEPS, None)
    cut = ranks2.run(run, kind, "int4", 1, 0, stop, None)
    resumed = ranks2.run(resume, kind, [one["state"] for one in cut], stop)
    if kind == "streaming" and stop == 5:
        assert any(fragment["under_way"] is not None for fragment in cut[0]["state"]["sync"]["fragments"])
    for one, other in zip(whole, resumed, strict=True):
        for key in ("local", "final"):
            assert all(torch.equal(a, b) for a, b in zip(one[key], other[key], strict=True))


def resume(context: Rank, kind: str, states: list[dict], stop: int) -> dict[str, Any]:
    return run(context, kind, "int4", 1, stop, STEPS, states[context.rank])


def test_hierarchical_averages_near_ranks_more_often(ranks4: Pool) -> None:
    told = ranks4.run(hierarchical)
    for rank, spreads in enumerate(told):
        near, far = spreads["near"], spreads["far"]
        assert [spread == 0 for spread in near] == [step % 2 == 1 for step in range(8)], rank
        assert [spread == 0 for spread in far] == [step % 4 == 3 for step in range(8)], rank


def hierarchical(context: Rank) -> dict[str, list[float]]:
    """After each of 8 steps: how far this rank's parameters are from the near one's, and from any."""
    layout = Layout(outer=2, data=2)
    sync = make_synchroniser(LocalSGD(every=4, every_inside=2), NoCompression(), layout, context.ledger)
    model = Net()
    optimizer = adamw(model)
    spreads: dict[str, list[float]] = {"near": [], "far": []}
    with sync.attached(model, optimizer, init_device_mesh("cpu", layout.degrees, mesh_dim_names=AXES)):
        for step in range(8):
            with sync.microbatch(last=True):
                (model(batch(step, context.rank)) - 1).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            sync.after_step(step)
            flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
            everybody = [torch.empty_like(flat) for _ in range(4)]
            dist.all_gather(everybody, flat)
            spreads["near"].append(float((flat - everybody[context.rank ^ 1]).abs().max()))
            spreads["far"].append(max(float((flat - other).abs().max()) for other in everybody))
    return spreads


NAMES = st.lists(st.sampled_from([*(f"blocks.{i}.{p}.weight" for i in range(7) for p in "ab"), "embed.weight", "norm.weight"]))


@given(NAMES.map(lambda names: list(dict.fromkeys(names))), st.integers(0, 5))
def test_no_parameter_is_skipped(names: list[str], layers: int) -> None:
    found = fragments(names, layers)
    assert sorted(name for fragment in found for name in fragment) == sorted(names)


@given(st.integers(1, 9), st.integers(1, 40), st.integers(1, 5))
def test_each_fragment_is_sent_once_in_a_period(count: int, every: int, periods: int) -> None:
    for fragment in range(count):
        times = [done for done in range(1, periods * every + 1) if due(fragment, count, every, done)]
        assert len(times) == periods and all(b - a == every for a, b in pairwise(times))
    assert due(count - 1, count, every, every)


def test_the_published_learning_rates() -> None:
    assert [published_learning_rate(replicas) for replicas in (1, 2, 4, 8, 64)] == pytest.approx([0.4, 0.6, 0.6, 0.8, 0.8])
    assert 0.6 < published_learning_rate(6) < 0.8
