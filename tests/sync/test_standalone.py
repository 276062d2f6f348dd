"""`thinwire.DiLoCo` in a loop of the user's own: equal to a reference of ten lines, metered, resumed, and it leaves no hang."""

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import thinwire
from pool import LOOPBACK, Pool, Rank
from thinwire.errors import UserError
from thinwire.sync.local_steps import due
from thinwire.workload import Workload
from warm import SOCKET, Warm, server

ROOT = Path(__file__).parents[2]
STEPS = 8
OPTIONS: dict[str, dict[str, Any]] = {
    "diloco": {"every": 3, "outer_learning_rate": 0.7},
    "streaming": {"kind": "streaming", "every": 3, "layers_per_fragment": 1, "overlap": 2, "mixing": 0.5, "compress": "int4"},
    "sparseloco": {"kind": "sparseloco", "every": 3},
    "muloco": {"kind": "muloco", "every": 3, "compress": {"kind": "int8", "vectors": True}},
    "local_sgd": {"kind": "local_sgd", "every": 3, "compress": "bf16"},
    "noloco": {"kind": "noloco", "every": 3},
}


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(8, 16, bias=False), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4)
    )


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.02)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, replica: int, steps: range) -> None:
    """The user's loop, which knows nothing of us."""
    for step in steps:
        batch = torch.randn(4, 8, generator=torch.Generator().manual_seed(1000 * replica + step))
        (model(batch) - 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def loop(context: Rank, options: dict, cut: int | None = None) -> dict[str, Any]:
    """All steps, perhaps in two lives. Each replica begins with parameters of its own; the first one's must win."""
    model = net(seed=context.rank)
    optimizer = adamw(model)
    with thinwire.DiLoCo(model, optimizer, **options) as outer:
        train(model, optimizer, context.rank, range(cut or STEPS))
        if cut:
            saved = {"outer": outer.state_dict(), "model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(saved, file := io.BytesIO())
        own = flat(model)
        with outer.averaged():
            averaged = flat(model)
        back = torch.equal(own, flat(model))
    if cut:
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        model = net(seed=9)
        optimizer = adamw(model)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        outer = thinwire.DiLoCo(model, optimizer, **options)
        outer.load_state_dict(saved["outer"])
        with outer:
            train(model, optimizer, context.rank, range(cut, STEPS))
            own = flat(model)
    rows = {(c.label, c.axis, c.op, c.message_bytes): t for c, t in outer.ledger.snapshot().items() if t.last_step >= 0}
    workload = Workload.of_parameters([(name, tuple(p.shape)) for name, p in model.named_parameters()], 4)
    return {
        "own": own,
        "averaged": averaged,
        "back": back,
        "final": flat(model),
        "steps": outer.steps,
        "rows": {row: total.calls for row, total in rows.items()},
        "predicted": outer.traffic(workload),
        "sent_bytes": outer.sent_bytes,
        "by_row": sum(total.wire_bytes for total in outer.ledger.snapshot().values()),
        "users": sum(total.wire_bytes for call, total in context.recorded().items() if call.op == "all_reduce"),
        "hooks": len(optimizer._optimizer_step_post_hooks),
    }


def sends(fragment: int, count: int, every: int) -> int:
    """How often fragment number `fragment` of `count` is sent in STEPS steps."""
    return sum(due(fragment, count, every, done) for done in range(1, STEPS + 1))


def reference(replicas: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """DiLoCo in one process: (each replica's parameters before the end, the model)."""
    models = [net() for _ in range(replicas)]
    optimizers = [adamw(model) for model in models]
    anchor, u = flat(models[0]), torch.zeros_like(flat(models[0]))
    for step in range(STEPS):
        for replica, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            train(model, optimizer, replica, range(step, step + 1))
        own = [flat(model) for model in models]
        if (step + 1) % 3 == 0 or step == STEPS - 1:
            delta = anchor - sum(flat(model) for model in models) / replicas
            u = 0.9 * u + delta
            anchor = anchor - 0.7 * (delta + 0.9 * u)
            for model in models:
                nn.utils.vector_to_parameters(anchor.clone(), model.parameters())
    return own, anchor


@pytest.mark.parametrize("pool", ["ranks2", "ranks3"])
def test_equals_the_reference_in_one_process(request: pytest.FixtureRequest, pool: str) -> None:
    ranks: Pool = request.getfixturevalue(pool)
    results = ranks.run(loop, OPTIONS["diloco"])
    own, anchor = reference(len(results))
    for rank, one in enumerate(results):
        torch.testing.assert_close(one["own"], own[rank], rtol=0, atol=5e-6)
        torch.testing.assert_close(one["final"], anchor, rtol=0, atol=5e-6)
        assert torch.equal(one["final"], results[0]["final"])


@pytest.mark.parametrize("kind", OPTIONS)
def test_every_kind_sends_what_it_said_and_ends_in_one_model(ranks2: Pool, kind: str) -> None:
    results = ranks2.run(loop, OPTIONS[kind])
    for one in results:
        assert torch.equal(one["final"], results[0]["final"]) and one["back"]
        assert one["steps"] == STEPS and one["hooks"] == 0
        assert one["sent_bytes"] == one["by_row"] and one["users"] == 0
        seen = {row: calls for row, calls in one["rows"].items() if row[2] != "recv" and "final" not in row[0]}
        events = sorted({t.event for t in one["predicted"]})
        assert len(events) == (4 if kind == "streaming" else 1)
        predicted = {
            (t.label, t.axis, t.op, t.message_bytes): sends(events.index(t.event), len(events), t.every) for t in one["predicted"]
        }
        assert seen == predicted
    if kind != "noloco":
        assert torch.equal(results[0]["averaged"], results[1]["averaged"])
    assert not torch.equal(results[0]["own"], results[1]["own"])


@pytest.mark.parametrize("kind", ["diloco", "streaming", "sparseloco", "noloco"])
def test_a_second_life_equals_one_bit_for_bit(ranks2: Pool, kind: str) -> None:
    whole = ranks2.run(loop, OPTIONS[kind])
    resumed = ranks2.run(loop, OPTIONS[kind], 5)
    for one, other in zip(whole, resumed, strict=True):
        assert torch.equal(one["own"], other["own"]) and torch.equal(one["final"], other["final"])
        assert other["steps"] == STEPS


def inside_ddp(context: Rank) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Two replicas of two ranks each: DistributedDataParallel within, DiLoCo over the ranks at the same place."""
    near = [dist.new_group([0, 1]), dist.new_group([2, 3])][context.rank // 2]
    far = [dist.new_group([0, 2]), dist.new_group([1, 3])][context.rank % 2]
    replica = DistributedDataParallel(net(seed=context.rank), process_group=near, broadcast_buffers=False)
    optimizer = adamw(replica)
    with thinwire.DiLoCo(replica, optimizer, every=3, group=far) as outer:
        train(replica, optimizer, context.rank, range(STEPS))
        own = flat(replica)
    return own, flat(replica), outer.sent_bytes


def test_replicas_may_be_several_ranks(ranks4: Pool) -> None:
    results = ranks4.run(inside_ddp)
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[2][0], results[3][0])
    assert not torch.equal(results[0][0], results[2][0])
    assert all(torch.equal(final, results[0][1]) for _, final, _ in results)


def refused(context: Rank) -> list[str]:
    model = net()
    optimizer = adamw(model)
    wrong: list[Any] = [
        lambda: thinwire.DiLoCo(model, optimizer, kind="dilocoo"),
        lambda: thinwire.DiLoCo(model, optimizer, every=0),
        lambda: thinwire.DiLoCo(model, optimizer, overlap=1),
        lambda: thinwire.DiLoCo(model, optimizer, accumulate=2),
        lambda: thinwire.DiLoCo(model, optimizer, compress="int3"),
        lambda: thinwire.DiLoCo(model, optimizer, kind="noloco", compress="int4"),
        lambda: thinwire.DiLoCo(net().to("meta"), optimizer),
        lambda: thinwire.DiLoCo(net().to(torch.float8_e5m2), optimizer),
    ]
    messages = []
    for one in wrong:
        with pytest.raises(UserError) as caught:
            one()
        messages.append(str(caught.value))
    with thinwire.DiLoCo(model, optimizer), pytest.raises(UserError) as caught:
        thinwire.DiLoCo(model, optimizer).__enter__()
    messages.append(str(caught.value))
    with pytest.raises(ZeroDivisionError), thinwire.DiLoCo(model, optimizer, every=3, kind="streaming", overlap=2):
        train(model, optimizer, context.rank, range(4))  # something is under way
        before = flat(model)
        _ = 1 / 0
    assert torch.equal(flat(model), before)
    with thinwire.DiLoCo(model, optimizer, every=3):  # and a new one works
        train(model, optimizer, context.rank, range(3))
    return messages


def test_what_is_wrong_is_said_and_leaves_nothing_behind(ranks2: Pool) -> None:
    kind, every, overlap, accumulate, code, noloco, device, dtype, second = ranks2.run(refused)[0]
    assert "kind = 'dilocoo' does not exist; there are diloco, streaming" in kind
    assert "DiLoCo: every = 0" in every
    assert "unknown key overlap; allowed: " in overlap
    assert "accumulate is about what happens within a replica" in accumulate
    assert "DiLoCo: compress: kind = 'int3'" in code
    assert "noloco sends weights" in noloco
    assert "parameters are on meta, and the group serves cpu:thinwire" in device
    assert "0.weight is float8_e5m2; replicas exchange float32, bfloat16, float16, float64 and complex numbers of these" in dtype
    assert "another one is at work on this optimizer" in second


def test_without_a_process_group_it_says_so() -> None:
    model = net()
    with pytest.raises(UserError, match="there is no process group; call"):
        thinwire.DiLoCo(model, adamw(model))


def start(*arguments: str) -> "subprocess.Popen[str]":
    environment = os.environ | {SOCKET: server(), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": LOOPBACK}
    return Warm([sys.executable, *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(processes: list["subprocess.Popen[str]"]) -> list[tuple[int, str, str]]:
    """(exit code, output, errors) of each; none is left running."""
    try:
        results = [process.communicate(timeout=45) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, out, errors) for process, (out, errors) in zip(processes, results, strict=True)]


@pytest.mark.long
def test_the_example_runs_under_torchrun_on_stock_gloo() -> None:
    script = str(ROOT / "examples" / "diloco_plain_pytorch.py")
    ((code, out, errors),) = ended([start("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script)])
    assert code == 0, errors
    loss, traffic = out.splitlines()
    assert float(loss.split()[2]) < 2.6
    sent, averaging = float(traffic.split()[4]), float(traffic.split()[-2])
    assert sent < averaging / 50


FAILS_ON_ONE = """
import sys, torch, torch.distributed as dist, thinwire
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
model = torch.nn.Linear(4, 4)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
with thinwire.DiLoCo(model, optimizer, every=2, compress={"kind": "int8", "vectors": True}):
    for step in range(10):
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
        if step == 4 and rank == 0:
            raise ValueError("the first rank has had enough")
"""


@pytest.mark.long
def test_a_rank_that_fails_lets_nobody_wait(tmp_path: Path) -> None:
    (tmp_path / "fails.py").write_text(FAILS_ON_ONE)
    first, second = ended([start(str(tmp_path / "fails.py"), str(rank), str(tmp_path / "store")) for rank in range(2)])
    assert first[0] == 1 and "the first rank has had enough" in first[2]
    assert second[0] == 1 and "RuntimeError" in second[2]
