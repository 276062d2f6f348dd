"""The metered backend with schedules of ours behind the calls that frameworks make, where they are faster than the inner group's.

all_reduce, reduce, broadcast, all_gather and reduce_scatter of one tensor, and all_to_all in equal parts, of numbers on the
group's device. Everything else is the inner group's, over gloo, MPI or NCCL. The first call of an op in a class of sizes decides
for the class (`tuned.tuner`); each size is agreed upon by all ranks when it is first used, and from then on a call costs no
agreement. Calls that schedules run are events of torch.profiler, as gloo and NCCL enter
theirs themselves: "thinwire:OP", with the shapes of its tensors where the profiler asks for them, from the call until its results
are there. They are entered only while somebody profiles, so that they cost nothing otherwise.
"""
# mypy: disable-error-code="override,assignment,attr-defined,call-arg"

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from thinwire.collectives.backend import NAME, MeteredGroup, register
from thinwire.collectives.ledger import Ledger
from thinwire.collectives.run.compiler import in_place
from thinwire.collectives.run.engine import Engine
from thinwire.collectives.run.transport import InnerFactory, OverGloo, Place, Transport
from thinwire.collectives.tuned.implementation import REDUCTIONS, Call, Implementation, example, perform, wire_bytes
from thinwire.collectives.tuned.tuner import Tuner, size_class

CHOOSING = "choosing collectives"
"""The label of what ranks send to agree and to measure."""
TYPES = {torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.int32, torch.int64}


def register_scheduled(ledger: Ledger, tuner: Tuner | None, name: str = NAME, inner: InnerFactory | None = None) -> None:
    """Like `backend.register`, with collectives chosen by `tuner`, if there is one. Call before init_process_group."""
    if tuner is None:
        return register(ledger, name, inner)
    make = inner or OverGloo()

    def create(options: Any, _backend_options: Any = None) -> ScheduledGroup:
        place = Place.from_options(options)
        return ScheduledGroup(ledger, *make(options, place), place, tuner)

    dist.Backend.register_backend(name, create, extended_api=True, devices=["cpu"])


class ScheduledGroup(MeteredGroup):
    """See the top of the file."""

    def __init__(self, ledger: Ledger, inner: Any, transport: Transport, place: Place, tuner: Tuner) -> None:
        super().__init__(ledger, inner, place.store, transport.device.type)
        group = self._group

        def record(op: str, message_bytes: int, sent: int | None) -> None:
            with ledger.label(CHOOSING):
                ledger.enter(op, message_bytes, group, 0, sent)

        self._engine, self._tuner = Engine(place, record, transport), tuner
        self._known: dict[tuple[str, int, int], Implementation] = {}
        self._round = tuner.round
        self._agreed: dict[_Kind, str] = {}
        weakref.finalize(self, self._engine.close)

    @property
    def _decided(self) -> dict[tuple[str, int, int], Implementation]:
        """In the tuner's present round."""
        if self._round != self._tuner.round:
            self._round, self._known = self._tuner.round, {}
        return self._known

    @property
    def asks(self) -> bool:
        """Here the tuner chooses."""
        return False

    def prepare(self, op: str, message_bytes: int) -> None:
        """Decide how such calls are run before the first of them. Collective, and waits."""
        self._implementation(example(op, message_bytes, self._engine))

    def wire_bytes(self, op: str, message_bytes: int, root: int = 0) -> int:
        """As the base class says; of float32."""
        chosen = self._decided.get((op, size_class(message_bytes), root))
        if chosen is None or chosen.native:
            return super().wire_bytes(op, message_bytes, root)
        return wire_bytes(chosen, example(op, message_bytes, self._engine, root), self._engine)

    def allreduce(self, tensors: Any, opts: Any = None) -> dist.Work:
        return self._choose("all_reduce", tensors[0], tensors[0], partial(super().allreduce, tensors, opts), opts)

    def broadcast(self, tensors: Any, opts: Any) -> dist.Work:
        return self._choose("broadcast", tensors[0], tensors[0], partial(super().broadcast, tensors, opts), opts)

    def reduce(self, tensors: Any, opts: Any) -> dist.Work:
        return self._choose("reduce", tensors[0], tensors[0], partial(super().reduce, tensors, opts), opts)

    def _allgather_base(self, output: torch.Tensor, input: torch.Tensor, opts: Any = None) -> dist.Work:
        return self._choose("all_gather", input, output, partial(super()._allgather_base, output, input, opts), opts)

    all_gather_single = _allgather_base

    def _reduce_scatter_base(self, output: torch.Tensor, input: torch.Tensor, opts: Any = None) -> dist.Work:
        return self._choose("reduce_scatter", input, output, partial(super()._reduce_scatter_base, output, input, opts), opts)

    reduce_scatter_single = _reduce_scatter_base

    def alltoall_base(self, output: Any, input: Any, output_sizes: Any, input_sizes: Any, opts: Any = None) -> dist.Work:
        native = partial(super().alltoall_base, output, input, output_sizes, input_sizes, opts)
        even = not output_sizes and not input_sizes and input.numel() % self._engine.place.size == 0
        return self._choose("all_to_all", input, output, native, opts) if even else native()

    all_to_all_single = alltoall_base

    def _choose(self, op: str, given: torch.Tensor, got: torch.Tensor, native: Callable[[], dist.Work], opts: Any) -> dist.Work:
        """Run the call by what was chosen for such, or by `native`. given, got: one tensor for ops of one tensor."""
        place, root, reduction = self._engine.place, getattr(opts, "rootRank", 0), _reduction(opts)
        parts = {"all_gather": (place.size, 1), "reduce_scatter": (1, place.size)}.get(op, (1, 1))
        fits = parts[0] * given.numel() == parts[1] * got.numel()
        if reduction is None or not fits or not self._may_schedule(op, given, got, root):
            return native()
        flat, back = _flat(got)
        if given is not got:
            call = Call(op, _flat(given)[0], flat, reduction, root, back)
        elif in_place(op, root, place.rank):
            call = Call(op, flat, flat, reduction, root, back)
        else:  # a reduce, elsewhere than at the root
            call = Call(op, flat, flat[:0], reduction, root)
        chosen = self._implementation(call)
        if chosen.native:
            return native()
        engine, ledger, clock, issued = self._engine, self._ledger, self._clock, self._clock.now()
        total = ledger.enter(call.op, call.message_bytes, self._group, call.root, wire_bytes(chosen, call, engine))
        end_of_event = _traced(f"{NAME}:{call.op}", given)

        def job() -> None:  # knows nothing of `self`: a group must not end on the thread that ends with it
            try:
                perform(chosen, call, engine)
            finally:
                if end_of_event is not None:
                    end_of_event()
            ledger.completed(total, clock, issued)  # on a device on the stream of the job

        # An event that ends on the thread where it began would be taken for one that kept this thread busy.
        blocking = not getattr(opts, "asyncOp", True) and end_of_event is None
        return self._submit(self._agreed[_kind(call)], job, [got], blocking)

    def _submit(self, what: str, job: Callable[[], None], tensors: list[torch.Tensor], blocking: bool) -> dist.Work:
        return self._engine.submit(what, job, tensors, blocking=blocking)

    def _may_schedule(self, op: str, given: torch.Tensor, got: torch.Tensor, root: int) -> bool:
        """Whether a schedule may run the call: schedules know such, and it is not decided that it stays with the inner group."""
        known = given.dtype in TYPES and got.dtype == given.dtype and given.layout == got.layout == torch.strided
        if not known or given.device.type != self._engine.transport.device.type or given.numel() == 0:
            return False
        chosen = self._decided.get((op, size_class(given.nbytes), root))
        return chosen is None or not chosen.native

    def _implementation(self, call: Call) -> Implementation:
        """Decided upon when first asked for: collective, and waits for it."""
        key = call.op, size_class(call.message_bytes), call.root
        chosen = self._decided.get(key)
        if chosen is not None and chosen.native:
            return chosen
        kind = _kind(call)
        if kind not in self._agreed:
            what = _words(call)
            self._engine.ask(what, partial(self._engine.agree, what))
            self._agreed[kind] = what
        if chosen is None:
            decide = partial(self._tuner.decide, self._engine, call)
            chosen = self._decided[key] = self._engine.ask(self._agreed[kind], decide)
        return chosen


_Kind = tuple[str, str, int, torch.dtype, int]


def _kind(call: Call) -> _Kind:
    """What must be the same on all ranks; `_words` mean the same and take longer to make."""
    return call.op, call.reduction, call.elements, call.given.dtype, call.root


def _words(call: Call) -> str:
    reduction = f" ({call.reduction})" if call.op in ("all_reduce", "reduce", "reduce_scatter") else ""
    direction = {"broadcast": "from", "reduce": "to"}.get(call.op)
    root = f" {direction} rank {call.root} of the group" if direction else ""
    return f"{call.op}{reduction} of {call.elements} {str(call.given.dtype).removeprefix('torch.')}{root}"


def _traced(name: str, tensor: torch.Tensor) -> Callable[[], None] | None:
    """Begin an event on this thread; what ends it, on any thread, once. None while nobody profiles."""
    if not torch.autograd._profiler_enabled():
        return None
    event = torch.autograd._record_function_with_args_enter(name, tensor)
    return lambda: torch.autograd._record_function_with_args_exit(event)


def _reduction(opts: Any) -> str | None:
    """By name; None for one that schedules do not know."""
    if not hasattr(opts, "reduceOp"):
        return "sum"
    return next((name for name, op in REDUCTIONS.items() if opts.reduceOp == op), None)


def _flat(tensor: torch.Tensor) -> tuple[torch.Tensor, Callable[[], None] | None]:
    """One dimension, contiguous; and what brings values back where that is a copy."""
    tensor = tensor.detach()
    if tensor.is_contiguous():
        return tensor.view(-1), None
    copy = tensor.contiguous().view(-1)

    def back() -> None:
        tensor.copy_(copy.view(tensor.shape))

    return copy, back
