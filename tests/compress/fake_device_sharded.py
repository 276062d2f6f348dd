"""The two coded collectives of a unit of FSDP2 on fake tensors of `meta`, which stands for a device (FSDP2 itself takes no such).

python fake_device_sharded.py
"""

from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

import thinwire.compress.coded
import thinwire.compress.passes
from on_device import DEVICE, FromTheDevice
from thinwire.collectives.ledger import Ledger
from thinwire.compress.exchange import make_exchange
from thinwire.compress.passes import Found
from thinwire.compress.sharded.api import GRADIENT_KINDS, WEIGHT_KINDS, _codec
from thinwire.compress.sharded.backward import BackwardPass
from thinwire.compress.sharded.layout import Coding, UnitShape
from thinwire.compress.sharded.replicas import Replicas
from thinwire.compress.sharded.residual import Residual
from thinwire.compress.sharded.wire import CodedAllGather, CodedReduceScatter, Lane
from thinwire.config.compress import Coded
from thinwire.workload import Parameter

RANKS = 4


def unit_of(dtype: str) -> Any:
    parameters = (Parameter("up", (50, 24), dtype=dtype), Parameter("norm", (50,), dtype=dtype))
    return SimpleNamespace(
        name="blocks.0",
        shape=UnitShape("blocks.0", parameters),
        device=DEVICE,
        factor=lambda op, replicas=1: 1 / RANKS,
        may_wait_for_gradients=lambda: False,
        averages=True,
        secondary_group=None,
    )


def gather(kind: str, dtype: str) -> None:
    unit, lane = unit_of(dtype), Lane(dist.group.WORLD, Ledger(), None)
    row = Coding(None, _codec(kind, "weights", WEIGHT_KINDS)).weights_row(unit.shape, RANKS)
    all_gather = CodedAllGather(unit, row, lane)
    for asynchronous in (False, True):
        output = all_gather.allocate((RANKS * row.chunk,), dtype=getattr(torch, dtype), device=DEVICE)
        work = all_gather(output, output[: row.chunk], lane.group, asynchronous)
        assert (work is not None) == asynchronous
        if work is not None:
            work.wait()


def reduce(kind: str, dtype: str, storage: str, hybrid: bool) -> None:
    unit, lane = unit_of(dtype), Lane(dist.group.WORLD, Ledger(), None)
    replicas = None
    if hybrid:
        exchange = make_exchange(Coded(kind="int4"), Ledger(), "average")
        replicas = Replicas([unit], RANKS, exchange, dist.group.WORLD, "replicas")
    row = Coding(_codec(kind, "gradients", GRADIENT_KINDS), None).gradients_row(unit.shape, RANKS)
    residual = Residual(row, 1, storage, DEVICE) if row.codec is not None else None
    residuals = {} if residual is None else {unit.name: residual}
    backward = BackwardPass(residuals, replicas, "raise", DEVICE)
    reduce_scatter = CodedReduceScatter(unit, row, lane, residual, backward, replicas)
    for _ in range(3):  # outside of a backward pass each settles at once
        rows = torch.empty(RANKS * row.chunk, dtype=getattr(torch, dtype), device=DEVICE)
        output = torch.empty(row.chunk, dtype=getattr(torch, dtype), device=DEVICE)
        assert reduce_scatter(output, rows, lane.group, dist.ReduceOp.AVG) is None
    assert residual is None or residual.state_dict()["owed"].device == DEVICE


def fetched(step: int, number: int, names: list[str], spoiled: torch.Tensor, bad: torch.Tensor) -> Found:
    """What comes to the host by itself."""
    assert spoiled.device == bad.device == DEVICE
    return Found(step, number, names, False, bad, None)  # type: ignore[arg-type]


def main() -> None:
    dist.init_process_group("fake", rank=1, world_size=RANKS, store=FakeStore())
    thinwire.compress.coded.private_copy = lambda group, *_: group
    thinwire.compress.coded.backend_of = lambda *_: "fake"
    thinwire.compress.passes._fetched = fetched
    with FakeTensorMode(), FromTheDevice():
        for kind in WEIGHT_KINDS:
            for dtype in ("float32", "bfloat16", "float64"):
                gather(kind, dtype)
            print("all on the device")
        for kind in GRADIENT_KINDS:
            for dtype, storage, hybrid in (
                ("float32", "int8", False),
                ("bfloat16", "float32", True),
                ("float64", "float32", False),
            ):
                reduce(kind, dtype, storage, hybrid)
            print("all on the device")


if __name__ == "__main__":
    main()
