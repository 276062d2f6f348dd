"""A c10d backend that meters: gloo underneath, and each call that passes through is entered in a Ledger.

    register(ledger)
    torch.distributed.init_process_group("thinwire", ...)

DDP, FSDP2, DTensor, pipelining and DCP then run unchanged, in sub-groups too. The group returned to PyTorch is a Python
ProcessGroup that owns a ProcessGroupGloo; what it returns are gloo's own Work objects, so waiting and futures cost nothing
extra. Where gloo's Work has no future (send, receive, reduce-scatter) a small Work of ours notes when it was waited for.

torch has two sets of names for the same two calls (`_allgather_base` / `all_gather_single`); both are answered, because a
name that is missing would be served by the base class and not metered (see `self_test`).
"""
# c10d calls a Python group with lists and options, torch's type stubs describe what users call:
# mypy: disable-error-code="override,assignment,attr-defined,call-arg"

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import AllgatherOptions, AllToAllOptions

from thinwire.collectives.clock import clock_of
from thinwire.collectives.groups import timeout_of
from thinwire.collectives.ledger import Group, Ledger, axis_of
from thinwire.collectives.run.transport import InnerFactory, OverGloo, Place
from thinwire.collectives.wire import sent_bytes
from thinwire.errors import UserError

NAME = "thinwire"
ASKED_TAG = 1 << 30
"""Of messages of `asking_first`, which no user's tag should meet."""
MOST_ASKED = 16
"""Ranks: each more is two more calls of gloo's from Python, some tens of microseconds."""

# From torch 2.13 on the single forms are what FSDP2 calls, and the others warn.
ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def register(ledger: Ledger, name: str = NAME, inner: InnerFactory | None = None, devices: Sequence[str] = ("cpu",)) -> None:
    """Make `init_process_group(name)` and its sub-groups write into `ledger`. Call before init_process_group.

    inner: what carries the bytes; None: gloo. devices: types of those whose tensors it takes.
    """
    make = inner or OverGloo()

    def create(options: Any, _backend_options: Any = None) -> MeteredGroup:
        place = Place.from_options(options)
        group = MeteredGroup(ledger, make(options, place)[0], place.store)
        for device in devices[1:]:
            group._register_backend(torch.device(device), dist.ProcessGroup.BackendType.CUSTOM, None)
        return group

    dist.Backend.register_backend(name, create, extended_api=True, devices=[*devices])


def self_test(group: dist.ProcessGroup, ledger: Ledger) -> None:
    """Prove that the calls FSDP2 makes are metered on this torch. Collective: every rank of `group`. UserError if not."""
    part = torch.zeros(1)
    whole = torch.zeros(group.size())
    with ledger.label("self-test"):
        for _ in range(2):  # the first calls may choose how they are run, which sends bytes too
            before = ledger.sent_bytes
            ALL_GATHER(whole, part, group=group)
            REDUCE_SCATTER(part, whole, group=group)
    p, rank = group.size(), group.rank()
    sent = group.wire_bytes if isinstance(group, MeteredGroup) else lambda op, size: sent_bytes(op, size, p, rank)
    expected = sent("all_gather", 4) + sent("reduce_scatter", 4 * p)
    if ledger.sent_bytes - before != expected:
        raise UserError(
            f"torch {torch.__version__} sends FSDP2's bytes past the meter ({ledger.sent_bytes - before} B metered, "
            f"{expected} B sent); use torch 2.11 to 2.15, on which it was tested"
        )


def bytes_of(tensors: Any) -> int:
    """Of a tensor or of a list of tensors, however nested."""
    if not isinstance(tensors, torch.Tensor):
        return sum(map(bytes_of, tensors))
    return tensors._indices().nbytes + tensors._values().nbytes if tensors.is_sparse else tensors.nbytes


class WaitedWork(dist._Work):
    """For gloo's Work that has no future (send, receive, reduce-scatter), and for several calls that PyTorch takes for one:
    notes the time when somebody has waited. gloo copies some results out in `wait`, so each inner one must be waited for.
    """

    def __init__(self, inner: Sequence[dist.Work], done: Callable[[], None] | None = None) -> None:
        super().__init__()
        self._inner, self._done = inner, done

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        result = all([work.wait(timeout) if timeout else work.wait() for work in self._inner])
        if self._done is not None:
            self._done()
            self._done = None  # a second wait is not a second exchange
        return result

    def is_completed(self) -> bool:
        return all(work.is_completed() for work in self._inner)


Begins = Sequence[Callable[[], dist.Work | None]]


def asked_first(receive: Begins, send: Begins) -> WaitedWork:
    """Begins messages of gloo's, receives first: gloo asks for them over the same connection, and behind what is sent there the
    asking would come when that is over, so that the two directions between two ranks would follow one another."""
    return WaitedWork([work for one in [*receive, *send] if (work := one()) is not None])


class _Barrier(WaitedWork):
    """A barrier whose failure names the ranks that have not come to it."""

    def __init__(self, inner: dist.Work, explained: Callable[[Exception], Exception]) -> None:
        super().__init__([inner])
        self._explained = explained

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        try:
            return super().wait(timeout)
        except RuntimeError as error:
            raise self._explained(error) from None

    def get_future(self) -> Any:
        return self._inner[0].get_future()


class MeteredGroup(dist.ProcessGroup):
    """gloo, or a group that takes the same calls, behind a meter. Each method: note the bytes, pass on, note the completion."""

    def __init__(self, ledger: Ledger, inner: Any, store: dist.Store | None = None, device_type: str = "cpu") -> None:
        """store: of this group alone, where ranks write down which barrier they have come to. device_type: of the tensors."""
        super().__init__(inner.rank(), inner.size())
        self._ledger, self._inner = ledger, inner
        self._clock = clock_of(torch.device(device_type))
        self._store, self._barriers = store, 0
        self._desc = ""
        self._over_gloo = isinstance(inner, dist.ProcessGroupGloo)
        self.coalesces = device_type != "cpu"
        """Whether messages that wait for each other must begin as one (`together`)."""
        native = inner if self._over_gloo else None  # the others are no Backend to torch
        self._register_backend(torch.device(device_type), dist.ProcessGroup.BackendType.CUSTOM, native)
        self._set_default_backend(dist.ProcessGroup.BackendType.CUSTOM)
        self._group = Group("", inner.rank(), inner.size())

    @property
    def timeout(self) -> timedelta:
        return timeout_of(self._inner)

    @property
    def ledger(self) -> Ledger:
        """Into which it enters its calls."""
        return self._ledger

    def wire_bytes(self, op: str, message_bytes: int, root: int = 0) -> int:
        """Payload bytes that this rank sends in one call of `op`."""
        return sent_bytes(op, message_bytes, self._group.size, self._group.rank, root)

    def getBackendName(self) -> str:
        return NAME

    def _set_group_name(self, name: str) -> None:
        self._group = replace(self._group, name=name)

    @property
    def group_name(self) -> str:  # type: ignore[override]
        return self._group.name

    def _set_group_desc(self, desc: str) -> None:
        self._desc = desc
        self._group = replace(self._group, axis=axis_of(desc))

    @property
    def group_desc(self) -> str:  # type: ignore[override]
        return self._desc

    def _entered(
        self, op: str, tensors: Any, issue: Callable[..., dist.Work | None], arguments: Sequence[Any], opts: Any, peer: int = 0
    ) -> dist.Work:
        """The Work of `issue`, which is called with `arguments` and `opts` (if any). tensors: what the message consists of."""
        clock, issued = self._clock, self._clock.now()
        total = self._ledger.enter(op, bytes_of(tensors), self._group, getattr(opts, "rootRank", peer))
        work: Any = issue(*arguments) if opts is None else issue(*arguments, opts)
        if not getattr(opts, "asyncOp", True):  # the caller will wait at once: here no other thread need wake up to note it
            work = work or WaitedWork([])  # NCCL gives None: the call is on the caller's stream, and so before what follows
            work.wait()
            self._ledger.completed(total, clock, issued)
            return work
        # On a device the callback runs at once, on a stream that waits for the call; so the event it records is the call's end.
        # Holds the ledger only: gloo's thread drops it, late, and as the last holder of a group would have to join itself.
        done = partial(self._ledger.completed, total, clock, issued)
        if op in ("send", "recv") or (op == "reduce_scatter" and self._over_gloo):  # which gloo gives no future
            return WaitedWork([work], done)
        try:
            work.get_future().add_done_callback(done)
        except RuntimeError:
            return WaitedWork([work], done)
        return work

    @property
    def asks(self) -> bool:
        """Over gloo, among so few ranks that `asking_first` makes calls faster."""
        return self._over_gloo and self._group.size <= MOST_ASKED

    def asking_first(
        self, op: str, message: torch.Tensor, theirs: Mapping[int, torch.Tensor], own: Mapping[int, torch.Tensor]
    ) -> dist.Work:
        """`op`, in which a rank gets `theirs` and sends `own`, by ranks in the group; message: what the op was handed."""
        receive = [partial(self._inner.recv, [one], peer, ASKED_TAG) for peer, one in theirs.items()]
        send = [partial(self._inner.send, [one], peer, ASKED_TAG) for peer, one in own.items()]
        return self._entered(op, message, partial(asked_first, receive, send), (), None)

    def together(self, messages: Sequence[dist.P2POp]) -> list[dist.Work]:
        """As dist.batch_isend_irecv, which begins messages one by one in a group that is none of torch's own: on NCCL one of two
        ranks that both send first would wait for ever."""
        if not self.coalesces:
            return dist.batch_isend_irecv(list(messages))
        inner, device, totals = self._inner, messages[0].tensor.device, []
        clock, issued = self._clock, self._clock.now()
        inner._start_coalescing(device)
        for one in messages:
            op, peer = ("send" if one.op is dist.isend else "recv"), one.group_peer
            totals.append(self._ledger.enter(op, one.tensor.nbytes, self._group, peer))
            getattr(inner, op)([one.tensor], peer, 0)
        work = inner._end_coalescing(device)

        def done() -> None:
            for total in totals:
                self._ledger.completed(total, clock, issued)

        return [WaitedWork([work], done)]

    def allreduce(self, tensors: Any, opts: Any = None) -> dist.Work:
        op = "all_gather" if tensors[0].is_sparse else "all_reduce"  # gloo sends every rank's indices and values to all
        return self._entered(op, tensors, self._inner.allreduce, (tensors,), opts or dist.AllreduceOptions())

    def allreduce_coalesced(self, tensors: Any, opts: Any = None) -> dist.Work:
        opts = opts or dist.AllreduceCoalescedOptions()
        return self._entered("all_reduce", tensors, self._inner.allreduce_coalesced, (tensors,), opts)

    def broadcast(self, tensors: Any, opts: Any) -> dist.Work:
        return self._entered("broadcast", tensors, self._inner.broadcast, (tensors,), opts)

    def reduce(self, tensors: Any, opts: Any) -> dist.Work:
        return self._entered("reduce", tensors, self._inner.reduce, (tensors,), opts)

    def allgather(self, outputs: Any, inputs: Any, opts: Any = None) -> dist.Work:
        return self._entered("all_gather", inputs, self._inner.allgather, (outputs, inputs), opts or AllgatherOptions())

    def _allgather_base(self, output: torch.Tensor, input: torch.Tensor, opts: Any = None) -> dist.Work:
        return self._entered("all_gather", input, self._inner._allgather_base, (output, input), opts or AllgatherOptions())

    all_gather_single = _allgather_base

    def allgather_coalesced(self, outputs: Any, inputs: Any, opts: Any = None) -> dist.Work:
        return self._entered("all_gather", inputs, self._inner.allgather_coalesced, (outputs, inputs), opts or AllgatherOptions())

    def allgather_into_tensor_coalesced(self, outputs: Any, inputs: Any, opts: Any = None) -> dist.Work:
        return WaitedWork([self._allgather_base(o, i, opts) for o, i in zip(outputs, inputs, strict=True)])

    all_gather_single_coalesced = allgather_into_tensor_coalesced

    def reduce_scatter(self, outputs: Any, inputs: Any, opts: Any = None) -> dist.Work:
        opts = opts or dist.ReduceScatterOptions()
        return self._entered("reduce_scatter", inputs, self._inner.reduce_scatter, (outputs, inputs), opts)

    def _reduce_scatter_base(self, output: torch.Tensor, input: torch.Tensor, opts: Any = None) -> dist.Work:
        opts = opts or dist.ReduceScatterOptions()
        return self._entered("reduce_scatter", input, self._inner._reduce_scatter_base, (output, input), opts)

    reduce_scatter_single = _reduce_scatter_base

    def reduce_scatter_tensor_coalesced(self, outputs: Any, inputs: Any, opts: Any = None) -> dist.Work:
        return WaitedWork([self._reduce_scatter_base(o, i, opts) for o, i in zip(outputs, inputs, strict=True)])

    reduce_scatter_single_coalesced = reduce_scatter_tensor_coalesced

    def alltoall_base(self, output: Any, input: Any, output_sizes: Any, input_sizes: Any, opts: Any = None) -> dist.Work:
        arguments = output, input, output_sizes, input_sizes
        return self._entered("all_to_all", input, self._inner.alltoall_base, arguments, opts or AllToAllOptions())

    all_to_all_single = alltoall_base

    def alltoall(self, outputs: Any, inputs: Any, opts: Any = None) -> dist.Work:
        return self._entered("all_to_all", inputs, self._inner.alltoall, (outputs, inputs), opts or AllToAllOptions())

    def gather(self, outputs: Any, inputs: Any, opts: Any) -> dist.Work:
        return self._entered("gather", inputs, self._inner.gather, (outputs, inputs), opts)

    def scatter(self, outputs: Any, inputs: Any, opts: Any) -> dist.Work:
        return self._entered("scatter", outputs, self._inner.scatter, (outputs, inputs), opts)

    def barrier(self, opts: Any = None) -> dist.Work:
        self._barriers += 1
        number, begun_s = self._barriers, time.monotonic()
        if self._store is not None:
            self._store.set(f"barrier/{self._group.rank}", str(number))

        def explained(error: Exception) -> Exception:
            missing = self._not_come_to(number)
            if not missing:
                return error
            return UserError(
                f"barrier {number} of this group failed after {time.monotonic() - begun_s:.1f} s, with a timeout of "
                f"{self.timeout.total_seconds():g} s: {len(missing)} of its {self._group.size} ranks have not come: "
                f"{', '.join(f'rank {rank}' for rank in missing)}; are they alive, and does each call it?"
            )

        def issue(options: Any) -> dist.Work | None:
            work = self._inner.barrier(options)
            return None if work is None else _Barrier(work, explained)

        return self._entered("barrier", (), issue, (), opts or dist.BarrierOptions())

    def _not_come_to(self, barrier: int) -> list[int]:
        """Ranks of this group, as far as the store can be asked."""
        if self._store is None:
            return []

        def come(rank: int, store: dist.Store) -> bool:
            key = f"barrier/{rank}"
            return store.check([key]) and int(store.get(key)) >= barrier

        try:
            return [rank for rank in range(self._group.size) if not come(rank, self._store)]
        except RuntimeError:  # whoever kept the store is gone
            return []

    def send(self, tensors: Any, peer: int, tag: int) -> dist.Work:
        return self._entered("send", tensors, self._inner.send, (tensors, peer, tag), None, peer)

    def recv(self, tensors: Any, peer: int, tag: int) -> dist.Work:
        return self._entered("recv", tensors, self._inner.recv, (tensors, peer, tag), None, peer)

    def recv_anysource(self, tensors: Any, tag: int) -> dist.Work:
        self._ledger.enter("recv", bytes_of(tensors), self._group)  # no seconds: only gloo's own Work knows the source
        return self._inner.recv_anysource(tensors, tag)


def ledger_of(group: dist.ProcessGroup | None) -> Ledger | None:
    """Into which a metered group enters its calls; None for a group of another kind."""
    return group.ledger if isinstance(group, MeteredGroup) else None
