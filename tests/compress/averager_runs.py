"""Averagers that are more than a codec, run on real ranks: what tests of each of them share."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from pool import Rank
from thinwire.collectives.ledger import difference
from thinwire.compress.averager import Averager, Piece, Share
from thinwire.compress.exchange import make_averagers, make_exchange, make_memory
from thinwire.compress.memory import NoMemory
from thinwire.config.compress import Coded
from thinwire.config.run import EveryStep
from thinwire.layout import Layout
from thinwire.sync.every_step import EveryStepSync
from thinwire.workload import Parameter, Workload

SHAPES = {"a": (40, 25), "b": (5, 10, 100), "c": (40, 25), "d": (30, 50)}
ONE_BUCKET = (("a", "b", "c", "d"),)
THREE_BUCKETS = (("a",), ("b", "d"), ("c",))

Buckets = tuple[tuple[str, ...], ...]


def gradient(name: str, step: int, rank: int) -> torch.Tensor:
    seed = 1000 * step + 10 * rank + list(SHAPES).index(name)
    return torch.randn(SHAPES[name], generator=torch.Generator().manual_seed(seed))


def mean_gradient(name: str, step: int, world_size: int) -> torch.Tensor:
    return torch.stack([gradient(name, step, rank) for rank in range(world_size)]).double().mean(0)


def averaged(
    context: Rank, options: dict[str, Any], steps: int, buckets: Buckets, resume_after: int = -1, predicts: bool = False
) -> dict[str, Any]:
    """What every step gave, the residuals after it, and what was sent. resume_after: goes on with new objects from their state.

    predicts: also what was predicted, which times the coding.
    """
    config = Coded(**options)

    def make() -> tuple[Any, Any]:
        memory = make_memory(config)
        (averager,) = make_averagers(config, memory, context.ledger)
        averager.attach(dist.group.WORLD, dist.group.WORLD)
        return memory, averager

    memory, averager = make()
    results, residuals = [], []
    for step in range(steps):
        if step == resume_after:
            state = memory.state_dict(), averager.state_dict()
            memory, averager = make()
            memory.load_state_dict(state[0])
            averager.load_state_dict(state[1])
        got = {}
        for index, bucket in enumerate(buckets):
            parts = [gradient(name, step, context.rank).view(-1) for name in bucket]
            firsts = [sum(len(part) for part in parts[:i]) for i in range(len(parts))]
            pieces = [Piece(name, first, SHAPES[name]) for name, first in zip(bucket, firsts, strict=True)]
            buffer = torch.cat(parts)
            average(averager, buffer, pieces, f"bucket {index}")
            got |= {piece.name: piece.of(buffer).view(piece.shape).clone() for piece in pieces}
        results.append(got)
        residuals.append({name: values.view(SHAPES[name]).clone() for name, values in memory.residuals().items()})
    predicted = [
        transfer
        for index, bucket in enumerate(buckets if predicts else ())
        for transfer in averager.transfers(
            f"bucket {index}", [Parameter(name, SHAPES[name]) for name in bucket], [], "world", context.world_size
        )
    ]
    return {
        "results": results,
        "residuals": residuals,
        "sent": {(call.label, call.op, call.message_bytes): total.calls for call, total in context.recorded().items()},
        "predicted": {(t.label, t.op, t.message_bytes): steps for t in predicted},
        "work_s": [t.work_s for t in predicted],
    }


def average(averager: Averager, buffer: torch.Tensor, pieces: Sequence[Piece], label: str, exact: Sequence[Piece] = ()) -> None:
    """All stages, one after the other."""
    for _ in averager.average(Share(buffer=buffer, pieces=pieces, exact=exact, label=label, memory=NoMemory())):
        pass


def check_equal_on_all_ranks(reports: list[dict[str, Any]]) -> None:
    for other in reports[1:]:
        for ours, theirs in zip(reports[0]["results"], other["results"], strict=True):
            assert all(torch.equal(ours[name], theirs[name]) for name in SHAPES)


def check_conserved(reports: list[dict[str, Any]]) -> None:
    """Mean of (gradient + residual before) = result + mean of residual after, at every step."""
    for step, results in enumerate(reports[0]["results"]):
        for name in SHAPES:
            wanted = mean_gradient(name, step, len(reports))
            if step:
                wanted += torch.stack([rank["residuals"][step - 1][name] for rank in reports]).double().mean(0)
            after = torch.stack([rank["residuals"][step][name] for rank in reports]).double().mean(0)
            torch.testing.assert_close(results[name].double() + after, wanted, rtol=0, atol=1e-5)


def check_resumed(uninterrupted: list[dict[str, Any]], resumed: list[dict[str, Any]]) -> None:
    for whole, again in zip(uninterrupted, resumed, strict=True):
        for part in ("results", "residuals"):
            for ours, theirs in zip(whole[part], again[part], strict=True):
                assert all(torch.equal(ours[name], theirs[name]) for name in SHAPES)


def train(context: Rank, options: dict[str, Any], steps: int) -> dict[str, Any]:
    """A small model with several buckets: what it sent, and what was predicted for the settled run."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 36), nn.LayerNorm(36), nn.Linear(36, 24), nn.Linear(24, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    exchange = make_exchange(Coded(**options), context.ledger)
    sync = EveryStepSync(EveryStep(bucket_bytes=4000), "data", context.ledger, exchange)
    mesh = init_device_mesh("cpu", (context.world_size,), mesh_dim_names=("data",))
    inputs = torch.randn(16, 24, generator=torch.Generator().manual_seed(context.rank))
    losses = []
    with sync.attached(model, optimizer, mesh) as replica:
        with sync.rehearsal():
            for _ in range(2):
                replica(inputs).square().mean().backward()
        optimizer.zero_grad(set_to_none=False)
        before = context.ledger.snapshot()
        for step in range(steps + sync.settled_after):
            if step == sync.settled_after:
                before = context.ledger.snapshot()
            with sync.microbatch(last=True):
                loss = (replica(inputs) - 1).square().mean()
                loss.backward()
            losses.append(float(loss))
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
    workload = Workload.of_parameters([(name, tuple(p.shape)) for name, p in model.named_parameters()], 16)
    made = difference(context.ledger.snapshot(), before)
    return {
        "weights": [parameter.detach() for parameter in model.parameters()],
        "losses": losses,
        "sent": {(call.label, call.op, call.message_bytes): (total.calls, call.axis) for call, total in made.items()},
        "predicted": {
            (t.label, t.op, t.message_bytes): (steps, "data") for t in sync.traffic(workload, Layout(data=context.world_size))
        },
        "settled_after": sync.settled_after,
        "residuals": sorted(exchange.residuals()),
    }


def check_trained(reports: list[dict[str, Any]]) -> None:
    first, *others = reports
    assert first["sent"] == first["predicted"] and len(first["predicted"]) >= 3
    assert first["losses"][-1] < 0.7 * first["losses"][0]
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first["weights"], other["weights"], strict=True))
