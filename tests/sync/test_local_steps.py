"""Replicas that go alone: equal to a one-process reference of ten lines, to the byte as predicted, resumed as uninterrupted."""

from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from cases import long
from hypothesis import given
from hypothesis import strategies as st
from replica_loop import run
from replicas_reference import STEPS, Net, adamw, batch, flat, reference
from torch.distributed.device_mesh import init_device_mesh

from pool import Pool, Rank
from thinwire.config.compress import Coded, NoCompression
from thinwire.config.sync import DiLoCo, LocalSGD, MuLoCo, SparseLoCo, Streaming
from thinwire.layout import AXES, Layout
from thinwire.sync.local_steps import due, fragments
from thinwire.sync.make import make_synchroniser, method
from thinwire.sync.outer import published_learning_rate

KINDS = {
    "diloco": DiLoCo(every=3, outer_learning_rate=0.7),
    "streaming": Streaming(every=4, layers_per_fragment=1, overlap=2, mixing=0.5),
    "added": Streaming(every=4, layers_per_fragment=1, overlap=3, arrival="add", outer_learning_rate=1.0, outer_momentum=0.0),
    "sparseloco": SparseLoCo(every=3),
    "muloco": MuLoCo(every=3),
    "local_sgd": LocalSGD(every=4),
}
CODES = {"none": NoCompression(), "int4": Coded(kind="int4", exclude=(), vectors=True), "bf16": Coded(kind="bf16")}


@pytest.mark.parametrize("kind", ["diloco", "streaming", "added", "local_sgd", "muloco"])
@pytest.mark.parametrize("pool", ["ranks3", long("ranks2")])
def test_equals_the_reference_in_one_process(request: pytest.FixtureRequest, pool: str, kind: str) -> None:
    ranks: Pool = request.getfixturevalue(pool)
    results = ranks.run(run, KINDS[kind], CODES["none"], 1, 0, STEPS, None)
    local, anchor = reference(kind, len(results))
    for rank, one in enumerate(results):
        torch.testing.assert_close(one["local"], local[rank], rtol=0, atol=2e-6)
        torch.testing.assert_close(one["final"], anchor, rtol=0, atol=2e-6)
        assert torch.equal(one["final"], results[0]["final"])


@pytest.mark.parametrize(
    ("kind", "code", "data"),
    [
        ("diloco", "none", 1),
        ("streaming", "int4", 2),
        ("sparseloco", "int4", 1),
        ("muloco", "bf16", 2),
        *(long(kind, code, data) for kind in KINDS for code, data in [("none", 1), ("int4", 1), ("bf16", 2), ("int4", 2)]),
    ],
)
def test_sends_what_was_predicted_and_ends_bit_equal(ranks4: Pool, kind: str, code: str, data: int) -> None:
    results = ranks4.run(run, KINDS[kind], CODES[code], data, 0, STEPS, None)
    every = KINDS[kind].every
    rare = {row for row in results[0]["predicted"] if row[3] == "outer"}
    assert {row[4] for row in rare} == {every}
    measured = {row: calls for row, (calls, _) in results[0]["sent"].items() if row[3] == "outer"}
    assert set(measured) == {row[:4] for row in rare}
    assert all(STEPS // every <= calls <= STEPS // every + 1 for calls in measured.values())
    each_step = {row[:4] for row in results[0]["predicted"] if row[3] == "data"}
    assert {row for row in results[0]["sent"] if row[3] == "data"} == each_step and bool(each_step) == (data > 1)
    for one in results:
        assert torch.equal(one["final"], results[0]["final"])
    if data == 2:
        assert torch.equal(results[0]["local"], results[1]["local"])


@pytest.mark.parametrize("kind", ["streaming", "added", "sparseloco"])
@pytest.mark.parametrize("stop", [5, 6])
def test_resumed_equals_uninterrupted_bit_for_bit(ranks2: Pool, kind: str, stop: int) -> None:
    """Also with a fragment under way (streaming, after 5 steps)."""
    whole = ranks2.run(run, KINDS[kind], CODES["int4"], 1, 0, STEPS, None)
    cut = ranks2.run(run, KINDS[kind], CODES["int4"], 1, 0, stop, None)
    resumed = ranks2.run(run, KINDS[kind], CODES["int4"], 1, stop, STEPS, [one["state"] for one in cut])
    if kind == "streaming" and stop == 5:
        assert any(fragment["under_way"] is not None for fragment in cut[0]["state"]["sync"]["fragments"])
    for one, other in zip(whole, resumed, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in ("local", "final"))


def moved(context: Rank, code: Coded) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Replicas that move by what is drawn, three times: (by how much x moved, what this one still owes, what it moved)."""
    layout = Layout(outer=context.world_size)
    sync = make_synchroniser(SparseLoCo(every=1), code, layout, context.ledger)
    model = torch.nn.Linear(40, 60, bias=False)
    torch.nn.init.zeros_(model.weight)
    draws, total = torch.Generator().manual_seed(context.rank), torch.zeros(60, 40, dtype=torch.float64)
    with sync.attached(model, adamw(model), init_device_mesh("cpu", layout.degrees, mesh_dim_names=AXES)):
        for step in range(3):
            move = torch.randn(60, 40, generator=draws)
            total += move
            model.weight.data += move
            sync.after_step(step)
        owed = sync.state_dict()["exchange"]["memory"]["owed"]["kept"]["weight"]
        return model.weight.detach().double(), -owed.view(60, 40).double(), total


@pytest.mark.parametrize("method", ["two-shot", "gather", "powersgd"])
def test_what_codes_lose_on_the_way_there_and_back_is_owed(ranks3: Pool, method: str) -> None:
    """Two shots also code the average that comes back; what that loses is fed back by the rank that made it."""
    code = Coded(kind="powersgd") if method == "powersgd" else Coded(kind="int4", exchange=method)
    moves, owed, wanted = (torch.stack(several) for several in zip(*ranks3.run(moved, code), strict=True))
    assert torch.equal(moves[0], moves[1]) and torch.equal(moves[0], moves[2])
    assert owed.mean(0).norm() > 0.01 * wanted.mean(0).norm()
    torch.testing.assert_close(moves[0] + owed.mean(0), wanted.mean(0), rtol=0, atol=1e-5)


def test_hierarchical_averages_near_ranks_more_often(ranks4: Pool) -> None:
    results = ranks4.run(hierarchical)
    for rank, spreads in enumerate(results):
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
            mine = flat(model)
            everybody = [torch.empty_like(mine) for _ in range(4)]
            dist.all_gather(everybody, mine)
            spreads["near"].append(float((mine - everybody[context.rank ^ 1]).abs().max()))
            spreads["far"].append(max(float((mine - other).abs().max()) for other in everybody))
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


def test_layers_of_a_plain_sequential_are_fragments() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Tanh(), torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    names = [name for name, _ in model.named_parameters()]
    assert fragments(names, 1) == [["0.weight", "0.bias"], ["2.weight", "2.bias"], ["3.weight", "3.bias"]]
    assert fragments(["stem.0.w", "blocks.0.a.1.w", "blocks.1.a.0.w", "head.w"], 1) == [
        *(["stem.0.w"], ["blocks.0.a.1.w"], ["blocks.1.a.0.w"], ["head.w"])
    ]


def test_the_published_learning_rates() -> None:
    assert [published_learning_rate(replicas) for replicas in (1, 2, 4, 8, 64)] == pytest.approx([0.4, 0.6, 0.6, 0.8, 0.8])
    assert 0.6 < published_learning_rate(6) < 0.8


@given(st.integers(1, 300), st.integers(1, 1000))
def test_the_learning_rate_is_the_published_one_unless_set(replicas: int, every: int) -> None:
    """It does not fall with the number of replicas, and is the same for any H: nobody has published how it depends on that."""
    _, outer = method(DiLoCo(every=every), replicas)
    assert outer.learning_rate == published_learning_rate(replicas) == method(DiLoCo(), replicas)[1].learning_rate
    assert 0.4 <= outer.learning_rate <= published_learning_rate(replicas + 1) <= 0.8
    assert method(DiLoCo(every=every, outer_learning_rate=0.31), replicas)[1].learning_rate == 0.31
    assert method(Streaming(every=every, overlap=0), replicas)[1].learning_rate == 0.4
    assert method(Streaming(outer_learning_rate=0.31), replicas)[1].learning_rate == 0.31
    assert method(MuLoCo(every=every), replicas)[1].learning_rate == 0.7
