"""What is done over MPI and over gloo alike, to be compared."""

import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from thinwire.collectives.backend import ALL_GATHER, REDUCE_SCATTER
from thinwire.collectives.ledger import Ledger, difference


def refused(call: Callable[[], object]) -> str:
    """The line with which `call` fails on this rank."""
    try:
        call()
    except Exception as error:
        assert "\n" not in str(error) or "running the callback" in str(error), error
        return f"{type(error).__name__}: {error}"
    raise AssertionError("it was not refused")


def every_call(ledger: Ledger) -> dict[Any, tuple[int, int]]:
    """Each collective once. What the ledger has entered: {(op, world size, bytes, axis): (calls, wire bytes)}."""
    p, rank = dist.get_world_size(), dist.get_rank()
    pair = dist.new_group([0, 1])
    before = ledger.snapshot()
    part, whole = torch.ones(3), torch.ones(3 * p)
    parts = [torch.ones(3) for _ in range(p)]
    with ledger.label("calls"):
        dist.all_reduce(part)
        dist.broadcast(part, 1)
        dist.reduce(part, 2)
        dist.all_gather(parts, part)
        ALL_GATHER(whole, part)
        dist.reduce_scatter(part, parts)
        REDUCE_SCATTER(part, whole)
        dist.all_to_all(parts, [torch.ones(3) for _ in range(p)])
        dist.all_to_all_single(torch.ones(3 * p), whole)
        dist.gather(part, parts if rank == 0 else None)
        dist.scatter(part, parts if rank == 0 else None)
        dist.barrier()
        if rank < 2:
            dist.all_reduce(part.bfloat16(), group=pair)
            dist.send(part, 1) if rank == 0 else dist.recv(part, 0)
    entered = difference(ledger.snapshot(), before)
    return {(c.op, c.world_size, c.message_bytes, c.axis): (t.calls, t.wire_bytes) for c, t in entered.items()}


def train(ledger: Ledger, folder: Path) -> tuple[list[float], list[float]]:
    """A small run to its end, with checkpoints. Its losses and its scores."""
    from command import TINY_RUN
    from thinwire.config.run import RunConfig
    from thinwire.environment import Environment
    from thinwire.record import RunFolder
    from thinwire.train.runtime import StopRequest
    from thinwire.train.worker import Rank, train_as

    content = tomllib.loads(TINY_RUN)
    content["data"] = {"source": str(folder / "text.txt"), "cache": str(folder / "cache")}
    content["train"] |= {"steps": 12, "eval_every": 4, "checkpoint_every": 5, "dtype": "float32", "run": str(folder / "run")}
    config = RunConfig.model_validate(content)
    if dist.get_rank() == 0:
        (folder / "text.txt").write_text("a slow link between two ranks is no reason to wait for it; " * 500, encoding="utf-8")
    ledger.step = -1
    rank = Rank(
        config=config,
        environment=Environment(place=None, lab=None, error_file=None, cache_folder=Path("/nonexistent"), results=None),
        layout=config.layout.resolve(dist.get_world_size(), rare=config.sync.rare),
        ledger=ledger,
        device=torch.device("cpu"),
        stop=StopRequest(),
    )
    run = RunFolder.open(train_as(rank, None).folder)
    dist.barrier()
    return [event.loss for event in run.steps()], [event.loss for event in run.evals()]
