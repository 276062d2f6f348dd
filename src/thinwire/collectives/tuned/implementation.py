"""How a collective is run: by a schedule, by the backend's own collective, or by that on ranks in another order."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import AllgatherOptions, AllToAllOptions

from thinwire.collectives.choose.native import ORDERED
from thinwire.collectives.run.compiler import in_place
from thinwire.collectives.run.engine import Engine
from thinwire.collectives.run.runner import COMBINE
from thinwire.collectives.schedules import ops
from thinwire.collectives.schedules.schedule import Schedule
from thinwire.collectives.schedules.table import from_json, to_json
from thinwire.collectives.schedules.verify import verify
from thinwire.collectives.wire import sent_bytes
from thinwire.errors import UserError

REDUCTIONS: Mapping[str, Any] = {name: getattr(dist.ReduceOp, name.upper()) for name in COMBINE}


@dataclass(frozen=True, slots=True)
class Implementation:
    """schedule: over positions in the group; order: of the ranks of a private group; neither: native."""

    name: str
    schedule: Schedule | None = None
    order: tuple[int, ...] | None = None

    @property
    def native(self) -> bool:
        """The backend's own collective as it is."""
        return self.schedule is None and self.order is None

    def check(self, call: "Call", p: int) -> None:
        """UserError unless it can run `call` among p ranks: schedules are proven before they may run."""
        schedule, root = self.schedule, call.root if ops.rooted(call.op) else None
        if schedule is not None:
            if (schedule.op, schedule.p, schedule.root) != (call.op, p, root):
                raise UserError(
                    f"{self.name} is a schedule for {schedule.op} among {schedule.p} ranks with root {schedule.root}, "
                    f"not for {call.op} among {p} with root {root}"
                )
            verify(schedule)
        if self.order is not None and (call.op not in ORDERED or sorted(self.order) != list(range(p))):
            raise UserError(f"{self.name}: {call.op} among {p} ranks cannot run in the order {list(self.order)}")

    def to_plain(self) -> dict[str, Any]:
        """For JSON."""
        return {"name": self.name, "schedule": self.schedule and to_json(self.schedule), "order": self.order and list(self.order)}

    @staticmethod
    def from_plain(plain: Mapping[str, Any]) -> "Implementation":
        """What `to_plain` made. UserError for anything else."""
        try:
            name, schedule, order = plain["name"], plain["schedule"], plain["order"]
        except (KeyError, TypeError):
            raise UserError(f"this is no stored implementation of a collective: {str(plain)[:80]}") from None
        return Implementation(str(name), schedule and from_json(schedule), order and tuple(order))


NATIVE = Implementation("native")


@dataclass(frozen=True, slots=True)
class Call:
    """One call on one rank. given, got: flat and contiguous, as for `Runner.run`; root: a position in the group.

    back: brings the results from `got` to where they belong, if that is a copy.
    """

    op: str
    given: torch.Tensor
    got: torch.Tensor
    reduction: str = "sum"
    root: int = 0
    back: Callable[[], None] | None = None

    @property
    def elements(self) -> int:
        """Of the message, see `ops.block_sizes`."""
        return self.got.numel() if self.op in ("all_reduce", "broadcast") else self.given.numel()

    @property
    def message_bytes(self) -> int:
        return self.elements * self.given.element_size()


def perform(implementation: Implementation, call: Call, engine: Engine) -> None:
    """In a job of `engine`: collective, waits until the results are there."""
    if implementation.schedule is not None:
        sizes = ops.block_sizes(call.op, engine.place.size, call.elements)
        engine.runner.run(implementation.schedule, sizes, call.given, call.got, call.reduction)
    elif implementation.order is not None:
        _native(engine.reordered(implementation.order), call, implementation.order.index(call.root))
    else:
        _native(engine.private, call, call.root)
    if call.back is not None:
        call.back()


def wire_bytes(implementation: Implementation, call: Call, engine: Engine) -> int:
    """Payload bytes that this rank sends."""
    rank, p = engine.place.rank, engine.place.size
    if implementation.schedule is not None:
        sizes = ops.block_sizes(call.op, p, call.elements)
        return engine.runner.sent_elements(implementation.schedule, sizes) * call.given.element_size()
    order = implementation.order or tuple(range(p))
    return sent_bytes(call.op, call.message_bytes, p, order.index(rank), order.index(call.root))


def example(op: str, message_bytes: int, engine: Engine, root: int = 0) -> Call:
    """A call to be timed, on float32 zeros where the engine's group has its tensors."""
    rank, p, device = engine.place.rank, engine.place.size, engine.transport.device
    n = max(1, message_bytes // 4)
    n = -(-n // p) * p if ops.message_blocks(op, p) > 1 else n
    sizes = ops.block_sizes(op, p, n)
    of = root if ops.rooted(op) else None
    got = torch.zeros(sum(sizes[block] for block in ops.outputs(op, p, of, rank)), device=device)
    given = torch.zeros(sum(sizes[block] for block in ops.inputs(op, p, of, rank)), device=device)
    return Call(op, got if in_place(op, of, rank) else given, got, root=root)


_NATIVE = {
    "all_reduce": ("allreduce", dist.AllreduceOptions),
    "broadcast": ("broadcast", dist.BroadcastOptions),
    "reduce": ("reduce", dist.ReduceOptions),
    "all_gather": ("_allgather_base", AllgatherOptions),
    "reduce_scatter": ("_reduce_scatter_base", dist.ReduceScatterOptions),
    "all_to_all": ("alltoall_base", AllToAllOptions),
}
"""c10d's method and the class of its options."""


def _native(group: Any, call: Call, root: int) -> None:
    """On any group that has c10d's calls."""
    method, options_class = _NATIVE[call.op]
    options: Any = options_class()
    if hasattr(options, "reduceOp"):
        options.reduceOp = REDUCTIONS[call.reduction]
    if hasattr(options, "rootRank"):
        options.rootRank = root
    match call.op:
        case "all_reduce" | "broadcast":
            tensors: tuple[Any, ...] = ([call.got],)
        case "reduce":  # gloo adds up in the tensor that it is given, on all ranks
            tensors = ([call.got if len(call.got) else call.given.clone()],)
        case "all_to_all":
            tensors = (call.got, call.given, [], [])
        case _:
            tensors = (call.got, call.given)
    getattr(group, method)(*tensors, options).wait()
