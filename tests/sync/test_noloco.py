"""Replicas that exchange in pairs: equal to a one-process reference with both of the paper's terms, to the byte, resumed."""

from collections import Counter
from typing import Any

import pytest
import torch
from cases import long
from hypothesis import given
from hypothesis import strategies as st
from replica_loop import run
from replicas_reference import STEPS, Net, adamw, batch, flat
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from pool import Pool, Rank
from thinwire.collectives.ledger import Ledger
from thinwire.config.compress import Coded, NoCompression
from thinwire.config.sync import NoLoCo
from thinwire.errors import UserError
from thinwire.layout import AXES, Layout
from thinwire.sync.make import make_synchroniser
from thinwire.sync.noloco import pairs

EVERY, RATE, MU = 4, 0.7, 0.5
EVENTS = STEPS // EVERY


def compression(kind: str) -> NoCompression | Coded:
    return NoCompression() if kind == "none" else Coded(kind=kind)


def train(ranks: Pool, kind: str, data: int, first: int, last: int, states: list[dict] | None = None) -> list[dict[str, Any]]:
    """What each rank returns of steps `first` to `last`."""
    return ranks.run(run, NoLoCo(every=EVERY), compression(kind), data, first, last, states)


def reference(replicas: int) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
    """All in one process, with both terms of the formula: (fast weights, slow weights, the mean after the end)."""
    models = [Net() for _ in range(replicas)]
    optimizers = [adamw(model) for model in models]
    phi = [flat(model) for model in models]
    m = [torch.zeros_like(one) for one in phi]

    def outer(groups: list[tuple[int, ...]]) -> None:
        for group in groups:
            delta = sum(flat(models[i]) - phi[i] for i in group) / len(group)
            mean = sum(phi[i] for i in group) / len(group)
            for i in group:
                m[i] = MU * m[i] + RATE * delta + RATE * (mean - phi[i])
            for i in group:
                phi[i] = phi[i] + m[i]

    for step in range(STEPS):
        for i, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            (model(batch(step, i)) - 1).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        if (step + 1) % EVERY == 0:
            outer(pairs(replicas, (step + 1) // EVERY))
            for model, slow in zip(models, phi, strict=True):
                nn.utils.vector_to_parameters(slow.clone(), model.parameters())
    fast, slow = [flat(model) for model in models], list(phi)
    outer([(i,) for i in range(replicas)])
    return fast, slow, sum(phi) / replicas


@pytest.mark.parametrize("pool", ["ranks3", long("ranks2"), long("ranks4")])
def test_equals_the_reference_in_one_process(request: pytest.FixtureRequest, pool: str) -> None:
    ranks: Pool = request.getfixturevalue(pool)
    results = train(ranks, "none", 1, 0, STEPS)
    fast, slow, mean = reference(len(results))
    for rank, one in enumerate(results):
        torch.testing.assert_close(one["local"], fast[rank], rtol=0, atol=2e-6)
        torch.testing.assert_close(one["averaged"], slow[rank], rtol=0, atol=2e-6)
        torch.testing.assert_close(one["final"], mean, rtol=0, atol=2e-6)
        assert torch.equal(one["final"], results[0]["final"]) and one["back"]
    if len(results) > 2:
        assert any(not torch.equal(results[0]["averaged"], one["averaged"]) for one in results)


@pytest.mark.parametrize(
    ("kind", "width", "data"),
    [("none", 4, 1), ("bf16", 2, 2), long("none", 4, 2), long("bf16", 2, 1), long("fp16", 2, 1), long("fp16", 2, 2)],
)
def test_sends_what_was_predicted(ranks4: Pool, kind: str, width: int, data: int) -> None:
    results = train(ranks4, kind, data, 0, STEPS)
    numel = results[0]["local"].numel()
    assert [row for row in results[0]["predicted"] if row[3] == "outer"] == [("pair", "send", width * numel, "outer", EVERY)]
    for one in results:
        mine = {row: seen for row, seen in one["sent"].items() if row[3] == "outer"}
        assert mine.pop(("pair", "recv", width * numel, "outer")) == (EVENTS, 0)
        assert mine == {("pair", "send", width * numel, "outer"): (EVENTS, EVENTS * width * numel)}
        assert torch.equal(one["final"], results[0]["final"])
    if data == 2:
        assert torch.equal(results[0]["averaged"], results[1]["averaged"]) and torch.equal(
            results[2]["averaged"], results[3]["averaged"]
        )


def test_of_three_one_is_alone_in_each_exchange(ranks3: Pool) -> None:
    results = train(ranks3, "none", 1, 0, STEPS)
    calls = [sum(calls for row, (calls, _) in one["sent"].items() if row[1] == "send") for one in results]
    paired = Counter(rank for event in range(1, EVENTS + 1) for pair in pairs(3, event) if len(pair) == 2 for rank in pair)
    assert calls == [paired[rank] for rank in range(3)] and sum(calls) == 2 * EVENTS


@pytest.mark.parametrize(("kind", "stop"), [("none", 6), ("bf16", 4), long("none", 4), long("bf16", 6)])
def test_resumed_equals_uninterrupted_bit_for_bit(ranks3: Pool, kind: str, stop: int) -> None:
    whole = train(ranks3, kind, 1, 0, STEPS)
    cut = train(ranks3, kind, 1, 0, stop)
    resumed = train(ranks3, kind, 1, stop, STEPS, [one["state"] for one in cut])
    for one, other in zip(whole, resumed, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in ("local", "averaged", "final"))


def adopted(context: Rank, states: list[dict]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(fast, slow) weights and momentum of a replica that begins with the states of another number of replicas."""
    layout = Layout(outer=context.world_size)
    sync = make_synchroniser(NoLoCo(every=EVERY), NoCompression(), layout, context.ledger)
    model = Net(seed=7)
    sync.adopt(states)
    with sync.attached(model, adamw(model), init_device_mesh("cpu", layout.degrees, mesh_dim_names=AXES)):
        fast = flat(model)
        with sync.averaged():
            return fast, flat(model), sync.state_dict()["momentum"][0]


@pytest.mark.parametrize("older", [False, True])
def test_another_number_of_replicas_begins_from_the_mean(ranks3: Pool, ranks2: Pool, older: bool) -> None:
    """Older states have no lists, since all was float32."""
    states = [one["state"]["sync"] for one in train(ranks3, "none", 1, 0, 5)]
    mean, momentum = (sum(state[key][0] for state in states) / 3 for key in ("slow", "momentum"))
    assert momentum.norm() > 0
    if older:
        states = [state | {key: state[key][0] for key in ("slow", "momentum")} for state in states]
    for fast, slow, kept in ranks2.run(adopted, states):
        torch.testing.assert_close(fast, mean)
        torch.testing.assert_close(kept, momentum)
        assert torch.equal(fast, slow)


def drift(context: Rank, kind: str, exchanges: int) -> list[torch.Tensor]:
    """Slow weights after each exchange, without any gradient, from a beginning of each replica's own."""
    layout = Layout(outer=context.world_size)
    sync = make_synchroniser(NoLoCo(every=1), compression(kind), layout, context.ledger)
    model = Net(seed=context.rank)
    seen = [flat(model)]
    with sync.attached(model, adamw(model), init_device_mesh("cpu", layout.degrees, mesh_dim_names=AXES)):
        for step in range(exchanges):
            sync.after_step(step)
            seen.append(flat(model))
    return seen


@pytest.mark.parametrize("kind", ["none", "bf16"])
def test_without_gradients_replicas_come_together_and_their_mean_stays(ranks4: Pool, kind: str) -> None:
    results = ranks4.run(drift, kind, 30)
    means, spreads = [], []
    for stacked in map(torch.stack, zip(*results, strict=True)):
        means.append(stacked.mean(0))
        spreads.append(float(stacked.std(0).norm()))
    for mean in means[1:]:
        torch.testing.assert_close(mean, means[0], rtol=0, atol=2e-6)
    assert spreads[10] < 0.3 * spreads[0]
    assert spreads[30] < (1e-2 if kind == "none" else 3e-2) * spreads[0]


@given(st.integers(1, 33), st.integers(0, 10**6))
def test_pairs_are_disjoint_and_leave_at_most_one_alone(replicas: int, event: int) -> None:
    drawn = pairs(replicas, event)
    assert sorted(rank for pair in drawn for rank in pair) == list(range(replicas))
    assert [len(pair) for pair in drawn] == [2] * (replicas // 2) + [1] * (replicas % 2)
    assert drawn == pairs(replicas, event)


def test_every_pair_is_drawn_as_often() -> None:
    seen = Counter(tuple(sorted(pair)) for event in range(6000) for pair in pairs(5, event) if len(pair) == 2)
    assert len(seen) == 10 and all(count == pytest.approx(1200, rel=0.1) for count in seen.values())


def test_codes_that_lose_too_much_for_weights_are_refused() -> None:
    with pytest.raises(UserError, match=r"compress.kind = 'int4': noloco sends weights, which only none, bf16, fp16 keep"):
        make_synchroniser(NoLoCo(), Coded(kind="int4"), Layout(outer=2), Ledger())
