"""The metered backend with schedules of ours behind the calls that frameworks make, where they are faster than the inner group's.

all_reduce, reduce, broadcast, all_gather and reduce_scatter of one tensor, and all_to_all in equal parts, of numbers on the
group's device. Everything else is the inner group's, over gloo, MPI or NCCL. The first call of an op in a class of sizes decides
for the class (`tuned.tuner`); each size is agreed upon by all ranks when it is first used, and from then on a call costs no
agreement. Calls that schedules run are events of torch.profiler (`run.traced`).
"""
# mypy: disable-error-code="override,assignment,attr-defined,call-arg"

import time
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from thinwire.collectives.backend import NAME, MeteredGroup
from thinwire.collectives.ledger import Ledger
from thinwire.collectives.run.compiler import in_place
from thinwire.collectives.run.engine import Engine
from thinwire.collectives.run.links import Inner, Links, Place, over_gloo
from thinwire.collectives.run.traced import traced
from thinwire.collectives.tuned.tuner import Tuner, size_class
from thinwire.collectives.tuned.way import REDUCTIONS, Call, Way, example, perform, wire_bytes

CHOOSING = "choosing collectives"
"""The label of what ranks send to agree and to measure."""
TYPES = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int8,
    torch.uint8,
    torch.int32,
    torch.int64,
)


def register_scheduled(ledger: Ledger, tuner: Tuner, name: str = NAME, inner: Inner = over_gloo) -> None:
    """Like `backend.register`, with collectives chosen by `tuner`. Call before init_process_group."""

    def create(told: Any, _options: Any = None) -> ScheduledGroup:
        place = Place.told(told)
        group, links = inner(told, place)
        return ScheduledGroup(ledger, group, place, links, tuner)

    dist.Backend.register_backend(name, create, extended_api=True, devices=["cpu"])


class ScheduledGroup(MeteredGroup):
    """See the top of the file."""

    def __init__(self, ledger: Ledger, inner: Any, place: Place, links: Links, tuner: Tuner) -> None:
        super().__init__(ledger, inner, place.store)
        group = self._group

        def note(op: str, message_bytes: int, sent: int | None) -> None:
            with ledger.label(CHOOSING):
                ledger.enter(op, message_bytes, group, 0, sent)

        self._engine, self._tuner = Engine(place, note, links), tuner
        self._ways: dict[tuple[str, int, int], Way] = {}
        self._agreed: dict[_Kind, str] = {}
        weakref.finalize(self, self._engine.close)

    def prepare(self, op: str, message_bytes: int) -> None:
        """Decide how such calls are run before the first of them. Collective, and waits."""
        self._way(example(op, message_bytes, self._engine))

    def wire_bytes(self, op: str, message_bytes: int, root: int = 0) -> int:
        """As the base class says; of float32."""
        way = self._ways.get((op, size_class(message_bytes), root))
        if way is None or way.native:
            return super().wire_bytes(op, message_bytes, root)
        call = example(op, message_bytes, self._engine, root)
        return wire_bytes(way, call, self._engine)

    def allreduce(self, tensors: Any, opts: Any = None) -> dist.Work:
        native = partial(super().allreduce, tensors, opts)
        reduction = _reduction(opts)
        if reduction is None or not self._takes("all_reduce", tensors):
            return native()
        flat, back = _flat(tensors[0])
        return self._run(Call("all_reduce", flat, flat, reduction, back=back), tensors, native, opts)

    def broadcast(self, tensors: Any, opts: Any) -> dist.Work:
        native = partial(super().broadcast, tensors, opts)
        if not self._takes("broadcast", tensors, opts.rootRank):
            return native()
        flat, back = _flat(tensors[0])
        return self._run(Call("broadcast", flat, flat, root=opts.rootRank, back=back), tensors, native, opts)

    def reduce(self, tensors: Any, opts: Any) -> dist.Work:
        native = partial(super().reduce, tensors, opts)
        reduction = _reduction(opts)
        if reduction is None or not self._takes("reduce", tensors, opts.rootRank):
            return native()
        flat, back = _flat(tensors[0])
        mine = in_place("reduce", opts.rootRank, self._engine.place.rank)
        call = Call("reduce", flat, flat if mine else flat[:0], reduction, opts.rootRank, back if mine else None)
        return self._run(call, tensors, native, opts)

    def _allgather_base(self, output: torch.Tensor, input: torch.Tensor, opts: Any = None) -> dist.Work:
        native = partial(super()._allgather_base, output, input, opts)
        if not self._takes("all_gather", [input, output]) or output.numel() != self._engine.place.size * input.numel():
            return native()
        flat, back = _flat(output)
        return self._run(Call("all_gather", _flat(input)[0], flat, back=back), [input], native, opts, results=[output])

    all_gather_single = _allgather_base

    def _reduce_scatter_base(self, output: torch.Tensor, input: torch.Tensor, opts: Any = None) -> dist.Work:
        native = partial(super()._reduce_scatter_base, output, input, opts)
        reduction = _reduction(opts)
        if (
            reduction is None
            or not self._takes("reduce_scatter", [input, output])
            or input.numel() != self._engine.place.size * output.numel()
        ):
            return native()
        flat, back = _flat(output)
        return self._run(
            Call("reduce_scatter", _flat(input)[0], flat, reduction, back=back), [input], native, opts, results=[output]
        )

    reduce_scatter_single = _reduce_scatter_base

    def alltoall_base(self, output: Any, input: Any, output_sizes: Any, input_sizes: Any, opts: Any = None) -> dist.Work:
        native = partial(super().alltoall_base, output, input, output_sizes, input_sizes, opts)
        even = not output_sizes and not input_sizes and input.numel() % self._engine.place.size == 0
        if not even or not self._takes("all_to_all", [input, output]) or input.numel() != output.numel():
            return native()
        flat, back = _flat(output)
        return self._run(Call("all_to_all", _flat(input)[0], flat, back=back), [input], native, opts, results=[output])

    all_to_all_single = alltoall_base

    def _run(self, call: Call, given: Any, native: Callable[[], dist.Work], opts: Any, *, results: Any = None) -> dist.Work:
        """given: tensors of the call, as the caller has shaped them; results: where results will be, if not there."""
        way = self._way(call)
        if way.native:
            return native()
        engine, ledger, issued = self._engine, self._ledger, time.perf_counter()
        total = ledger.enter(call.op, call.message_bytes, self._group, call.root, wire_bytes(way, call, engine))
        end_of_event = traced(call.op, given)

        def job() -> None:  # knows nothing of `self`: a group must not end on the thread that ends with it
            try:
                perform(way, call, engine)
            finally:
                if end_of_event is not None:
                    end_of_event()
            ledger.completed(total, issued)

        # An event that ends on the thread where it began would be taken for one that kept this thread busy.
        blocking = not getattr(opts, "asyncOp", True) and end_of_event is None
        return self._submit(self._agreed[_kind(call)], job, given if results is None else results, blocking)

    def _submit(self, what: str, job: Callable[[], None], tensors: list[torch.Tensor], blocking: bool) -> dist.Work:
        return self._engine.submit(what, job, tensors, blocking=blocking)

    def _takes(self, op: str, tensors: Any, root: int = 0) -> bool:
        """Whether a schedule may run the call: it is one that they know, and not known to stay with the inner group.

        tensors[0]: what is handed in.
        """
        first = tensors[0]
        way = self._ways.get((op, size_class(first.numel() * first.element_size()), root))
        if way is not None and way.native:
            return False
        known = all(one.dtype in TYPES and one.dtype == first.dtype and one.layout == torch.strided for one in tensors)
        return known and first.device.type == self.device_type and first.numel() > 0

    def _way(self, call: Call) -> Way:
        """Decided upon when first asked for: collective, and waits for it."""
        key = call.op, size_class(call.message_bytes), call.root
        way = self._ways.get(key)
        if way is not None and way.native:
            return way
        kind = _kind(call)
        if kind not in self._agreed:
            what = _words(call)
            self._engine.ask(what, partial(self._engine.agree, what))
            self._agreed[kind] = what
        if way is None:
            way = self._ways[key] = self._engine.ask(self._agreed[kind], partial(self._tuner.decide, self._engine, call))
        return way


_Kind = tuple[str, str, int, torch.dtype, int]


def _kind(call: Call) -> _Kind:
    """What all ranks must call alike, made faster than `_words`, which say the same."""
    return call.op, call.reduction, call.elements, call.given.dtype, call.root


def _words(call: Call) -> str:
    dtype = str(call.given.dtype).removeprefix("torch.")
    of = f" from rank {call.root} of the group" if call.op == "broadcast" else f" to rank {call.root} of the group"
    how = f" ({call.reduction})" if call.op in ("all_reduce", "reduce", "reduce_scatter") else ""
    return f"{call.op}{how} of {call.elements} {dtype}{of if call.op in ('broadcast', 'reduce') else ''}"


def _reduction(opts: Any) -> str | None:
    """By name; None for one that schedules do not know."""
    if opts is None:
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
