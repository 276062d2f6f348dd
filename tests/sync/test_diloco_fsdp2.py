"""`thinwire.DiLoCo` around `fully_shard`: two replicas of two ranks, each of which exchanges its shards with the like of them."""

import io
import runpy
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import long
from replicas_reference import STEPS, Net, adamw, batch, inner_step, reference
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import thinwire
from pool import Pool, Rank
from thinwire.errors import UserError
from thinwire.workload import Workload

pytestmark = pytest.mark.heavy

ROOT = Path(__file__).parents[2]
INT4 = {"kind": "int4", "exclude": (), "vectors": True}
OPTIONS: dict[str, dict[str, Any]] = {
    "diloco": {"every": 3, "outer_learning_rate": 0.7},
    "streaming": {"kind": "streaming", "every": 4, "layers_per_fragment": 1, "overlap": 2},
    "local_sgd": {"kind": "local_sgd", "every": 4},
    "muloco": {"kind": "muloco", "every": 3},
    "noloco": {"kind": "noloco", "every": 4},
    "sparseloco": {"kind": "sparseloco", "every": 3},
    "diloco int4": {"every": 3, "compress": INT4},
    "streaming int4": {"kind": "streaming", "every": 4, "layers_per_fragment": 1, "overlap": 2, "compress": INT4},
    "local_sgd bf16": {"kind": "local_sgd", "every": 4, "compress": "bf16"},
    "noloco fp16": {"kind": "noloco", "every": 4, "compress": "fp16"},
}
SHORT = ("diloco", "streaming", "noloco")
INSIDE = {"plain": None, "uncoded": ("float32", "float32"), "coded": ("int4", "int8")}
"""What compress_sharded makes of gradients and weights within a replica."""


@cache
def two_by_two() -> DeviceMesh:
    """Made once on each rank: DTensor keeps every mesh, and so its groups, for good."""
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "shard"))


def sharded(mesh: DeviceMesh, seed: int) -> Net:
    model = Net(seed)
    for block in model.blocks:
        fully_shard(block, mesh=mesh["shard"])
    fully_shard(model, mesh=mesh["shard"])
    return model


def whole(model: nn.Module) -> torch.Tensor:
    """All parameters, put together. Collective over a replica."""
    parts = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    return torch.cat([part.detach().reshape(-1) for part in parts])


class Life:
    """A user's run from its first step, or from what an earlier life has saved."""

    def __init__(self, options: dict[str, Any], inside: str, saved: bytes | None) -> None:
        mesh = two_by_two()
        self.replica = mesh["outer"].get_local_rank()
        self.model = sharded(mesh, seed=self.replica if saved is None else 9)  # the first replica's must win
        self.optimizer = adamw(self.model)
        codes = INSIDE[inside]
        self.inside = thinwire.compress_sharded(self.model, *codes) if codes else None
        self.outer = thinwire.DiLoCo(self.model, self.optimizer, group=mesh["outer"], **options)
        if saved is not None:
            state = torch.load(io.BytesIO(saved), weights_only=True)
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.outer.load_state_dict(state["outer"])
            if self.inside is not None:
                self.inside.load_state_dict(state["inside"])

    def train(self, rank: int, steps: range) -> None:
        for step in steps:
            inner_step(self.model, self.optimizer, batch(step, rank))

    def saved(self) -> bytes:
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "outer": self.outer.state_dict()}
        if self.inside is not None:
            state["inside"] = self.inside.state_dict()
        torch.save(state, file := io.BytesIO())
        return file.getvalue()

    @torch.no_grad()
    def score(self) -> torch.Tensor:
        return self.model(batch(0, 99))


def run(context: Rank, kind: str, inside: str = "plain", cut: int = 0) -> dict[str, Any]:
    life = Life(OPTIONS[kind], inside, None)
    if cut:
        with life.outer:
            life.train(context.rank, range(cut))
            saved = life.saved()
        if life.inside is not None:
            life.inside.detach()
        life = Life(OPTIONS[kind], inside, saved)
    model, outer = life.model, life.outer
    with outer:
        life.train(context.rank, range(cut, STEPS))
        own, own_score = whole(model), life.score()
        with outer.averaged():
            averaged, averaged_score = whole(model), life.score()
        back = torch.equal(own, whole(model)) and torch.equal(own_score, life.score())
    final = whole(model)
    if life.inside is not None:
        life.inside.detach()
    rows = {(c.label, c.axis, c.op, c.message_bytes): t for c, t in outer.ledger.snapshot().items() if t.last_step >= 0}
    workload = Workload.of_parameters([(name, tuple(p.shape)) for name, p in model.named_parameters()], 4)
    return {
        "own": own,
        "averaged": averaged,
        "averaged_score": averaged_score,
        "back": back,
        "final": final,
        "rows": {row: total.calls for row, total in rows.items()},
        "predicted": {(t.label, t.axis, t.op, t.message_bytes): t.every for t in outer.traffic(workload)},
        "held": sum(p.to_local().numel() for p in model.parameters()),
    }


Results = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="module")
def results_of(ranks4: Pool) -> Results:
    """(kind, inside) -> what each rank returns of a run in one life. Each is made once."""
    return cache(lambda kind, inside="plain": ranks4.run(run, kind, inside))


@pytest.mark.parametrize("inside", ["plain", long("uncoded")])
@pytest.mark.parametrize("kind", ["diloco", "streaming", long("local_sgd"), long("muloco")])
def test_equals_the_reference_in_one_process(results_of: Results, kind: str, inside: str) -> None:
    local, anchor = reference(kind, 2, ranks_of_each=2)
    for rank, one in enumerate(results_of(kind, inside)):
        torch.testing.assert_close(one["own"], local[rank // 2], rtol=0, atol=2e-6)
        torch.testing.assert_close(one["final"], anchor, rtol=0, atol=2e-6)


def inside_ddp(context: Rank, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    mesh = two_by_two()
    replica = DistributedDataParallel(Net(), process_group=mesh.get_group("shard"))
    optimizer = adamw(replica)
    with thinwire.DiLoCo(replica, optimizer, group=mesh["outer"], **OPTIONS[kind]):
        for step in range(STEPS):
            inner_step(replica, optimizer, batch(step, context.rank))
        own = whole(replica)
    return own, whole(replica)


@pytest.mark.parametrize("kind", ["noloco", long("streaming"), long("noloco fp16")])
@pytest.mark.long
def test_is_the_same_as_around_ddp(ranks4: Pool, results_of: Results, kind: str) -> None:
    for one, (own, final) in zip(results_of(kind), ranks4.run(inside_ddp, kind), strict=True):
        torch.testing.assert_close(one["own"], own, rtol=0, atol=2e-6)
        torch.testing.assert_close(one["final"], final, rtol=0, atol=2e-6)


@pytest.mark.parametrize("kind", [kind if kind in SHORT else long(kind) for kind in OPTIONS])
def test_shards_are_sent_as_predicted_and_replicas_end_bit_equal(results_of: Results, kind: str) -> None:
    results = results_of(kind)
    for one in results:
        assert torch.equal(one["final"], results[0]["final"]) and one["back"]
        seen = {row: calls for row, calls in one["rows"].items() if row[2] != "recv" and "final" not in row[0]}
        assert one["predicted"] and set(seen) == set(one["predicted"])
        assert all(STEPS // every <= seen[row] <= -(-STEPS // every) for row, every in one["predicted"].items())
    assert not torch.equal(results[0]["own"], results[2]["own"])
    if "noloco" not in kind:
        assert torch.equal(results[0]["averaged"], results[2]["averaged"])
        assert torch.equal(results[0]["averaged_score"], results[2]["averaged_score"])
    first, second = results[0]["held"], results[1]["held"]
    assert second < first and first + second == sum(p.numel() for p in Net().parameters())
    if kind == "streaming":  # of the last block the second rank holds nothing
        assert {row[0] for row in results[0]["predicted"]} - {row[0] for row in results[1]["predicted"]} == {"fragment 3"}
        assert sum(row[3] for one in results[:2] for row in one["predicted"]) == 4 * (first + second)


@pytest.mark.parametrize(
    ("kind", "inside"),
    [("streaming int4", "coded"), long("streaming int4", "plain"), long("diloco int4", "coded"), long("noloco", "plain")],
)
@pytest.mark.long
def test_a_second_life_equals_one_bit_for_bit(ranks4: Pool, results_of: Results, kind: str, inside: str) -> None:
    """After 5 steps fragments are under way, and there are residuals outside and inside."""
    once = results_of(kind, inside)
    for one, other in zip(once, ranks4.run(run, kind, inside, 5), strict=True):
        assert all(torch.equal(one[key], other[key]) for key in ("own", "averaged", "final"))
    assert all(torch.equal(one["final"], once[0]["final"]) for one in once)


def one_row(context: Rank, options: dict[str, Any]) -> tuple[torch.Tensor, list[int]]:
    """All of the model is on the first rank of each replica."""
    mesh = two_by_two()
    model = nn.Linear(8, 1)
    fully_shard(model, mesh=mesh["shard"])
    optimizer = adamw(model)
    with thinwire.DiLoCo(model, optimizer, group=mesh["outer"], **options) as outer:
        for step in range(4):
            inner_step(model, optimizer, batch(step, context.rank))
    sent = [total.wire_bytes for total in outer.ledger.snapshot().values() if total.last_step >= 0]
    return whole(model), sent


@pytest.mark.parametrize("kind", ["noloco", "diloco int4", long("local_sgd bf16")])
def test_a_rank_that_holds_nothing_sends_nothing(ranks4: Pool, kind: str) -> None:
    results = ranks4.run(one_row, OPTIONS[kind])
    assert all(torch.equal(final, results[0][0]) for final, _ in results)
    assert [bool(sum(sent)) for _, sent in results] == [True, False] * 2


def refused(context: Rank) -> list[str]:
    mesh = two_by_two()
    model = sharded(mesh, 0)
    optimizer = adamw(model)
    crossed = [dist.new_group([0, 3]), dist.new_group([1, 2])][context.rank in (1, 2)]
    fitting = thinwire.DiLoCo(model, optimizer, group=mesh["outer"])
    other = Workload.of_parameters([("other", (3, 3))], 1)
    wrong: list[Callable[[], Any]] = [
        lambda: thinwire.DiLoCo(model, optimizer),
        lambda: thinwire.DiLoCo(model, optimizer, group=mesh),
        lambda: thinwire.DiLoCo(model, optimizer, group=crossed).__enter__(),
        lambda: fitting.traffic(other),
    ]
    messages = []
    for one in wrong:
        with pytest.raises(UserError) as caught:
            one()
        messages.append(str(caught.value))
    with fitting:
        inner_step(model, optimizer, batch(0, 0))
        state = fitting.state_dict()
    state["sync"]["fragments"][0]["anchor"] = torch.zeros(3)
    again = thinwire.DiLoCo(model, optimizer, group=mesh["outer"])
    again.load_state_dict(state)
    with pytest.raises(UserError) as caught:
        again.__enter__()
    return [*messages, str(caught.value)]


def test_groups_that_would_mix_shards_are_refused(ranks4: Pool) -> None:
    for default, mesh, crossed, workload, state in ranks4.run(refused):
        assert 'has several; hand over those with the same shard in each replica: group=mesh["outer"]' in default
        assert "group is a mesh of 2 axes, ('outer', 'shard')" in mesh
        assert "the ranks [0, 3] of a group do not hold parameters, or shards, of the same names, shapes, dtypes" in crossed
        assert "the model has no parameter 'other'" in workload
        assert "that of the checkpoint held 3 values (float32) in 1; resume with the same model, fragments and shards" in state


def example(context: Rank) -> str:
    return runpy.run_path(str(ROOT / "examples" / "diloco_fsdp2.py"))["train"](steps=40)


@pytest.mark.long
def test_the_example_learns_and_sends_little(ranks4: Pool) -> None:
    results = ranks4.run(example)
    losses = [one.split()[2] for one in results]
    assert float(losses[0]) < 3.3 and losses == [losses[0]] * 4
    for one in results:
        sent, averaging = (float(part.split()[-2]) for part in one.splitlines()[1].split(";"))
        assert 0 < sent < averaging / 20
