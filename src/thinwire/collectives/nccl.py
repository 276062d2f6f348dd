"""The backend on CUDA tensors: NCCL behind the meter, and between hosts schedules of ours over its send and receive.

    thinwire.init("cluster.toml", inner="nccl")

A group whose ranks are all on one host has NCCL's own collectives: in there NCCL knows the links better. In a group over several
hosts they are chosen as on CPUs; NCCL's own are among what is measured, and stay unless a schedule is faster.

The host only enqueues work on the device. A schedule runs on a stream of the group's own, behind all that the caller's stream had
been given before; whoever waits makes his own stream wait. Seconds in the ledger lie between events on these streams. NCCL's
messages have no tags (`run.compiler`); agreements go over gloo.

Ranks whose calls differ are found as on CPUs where they have not agreed yet, and else by NCCL's watchdog, after the time-out.
"""
# mypy: disable-error-code="override,attr-defined,no-untyped-call"

import socket
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from thinwire.collectives.address import GlooDevices
from thinwire.collectives.backend import NAME, MeteredGroup
from thinwire.collectives.ledger import Ledger
from thinwire.collectives.run.transport import Place, Transport
from thinwire.collectives.scheduled import ScheduledGroup
from thinwire.collectives.tuned.tuner import Tuner
from thinwire.errors import UserError


def register_nccl(ledger: Ledger, tuner: Tuner | None, name: str = NAME) -> None:
    """Make `init_process_group(name)` and its sub-groups go over NCCL, and be chosen by `tuner` between hosts.

    Call before init_process_group, with this rank's device set. UserError without CUDA.
    """
    if not (torch.cuda.is_available() and dist.is_nccl_available()):
        raise UserError(f"inner = 'nccl': torch {torch.__version__} has no CUDA device or no NCCL here; use inner = 'gloo'")

    def create(options: Any, _backend_options: Any = None) -> MeteredGroup:
        place = Place.from_options(options)
        inner = _with_cpu(_group(options.store, place.rank, place), place)
        if tuner is None or on_one_host(place):
            return MeteredGroup(ledger, inner, device_type="cuda")
        return ScheduledNccl(ledger, inner, NcclTransport(place), place, tuner)

    dist.Backend.register_backend(name, create, extended_api=True, devices=["cuda"])


def on_one_host(place: Place, host: str = "") -> bool:
    """Whether all ranks of the group are. Each of them calls. host: of this rank."""
    place.store.set(f"host/{place.rank}", host or socket.gethostname())
    return len({place.store.get(f"host/{rank}") for rank in range(place.size)}) == 1


class NcclTransport(Transport):
    """On the current CUDA device."""

    most_tag = 0

    def __init__(self, place: Place) -> None:
        self._place, self._made = place, list[Any]()
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.name = f"NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}"
        self.control = GlooDevices().group(dist.PrefixStore("control", place.store), place.rank, place.size, place.timeout)

    def new_group(self, name: str, order: Sequence[int]) -> Any:
        store = dist.PrefixStore(name, self._place.store)
        self._made.append(_group(store, order.index(self._place.rank), self._place))
        return self._made[-1]

    def abort(self) -> None:
        for group in self._made:
            group.abort()

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)


class Launched(dist._Work):
    """What was enqueued on `stream`. held: what must live until somebody waits."""

    def __init__(self, stream: torch.cuda.Stream, tensors: list[torch.Tensor], held: Any) -> None:
        super().__init__()
        self._over, self._held = stream.record_event(), held
        self._future: torch.futures.Future[list[torch.Tensor]] = torch.futures.Future(devices=[stream.device])
        with torch.cuda.stream(stream):  # whoever waits for the future has his stream wait for this one
            self._future.set_result(tensors)

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        self._future.wait()
        self._held = None
        return True

    def get_future(self) -> "torch.futures.Future[list[torch.Tensor]]":
        return self._future

    def is_completed(self) -> bool:
        return self._over.query()


class ScheduledNccl(ScheduledGroup):
    """See the top of the file."""

    def __init__(self, ledger: Ledger, inner: Any, transport: Transport, place: Place, tuner: Tuner) -> None:
        super().__init__(ledger, inner, transport, place, tuner)
        self._stream = torch.cuda.Stream(transport.device)

    def _submit(self, what: str, job: Callable[[], None], tensors: list[torch.Tensor], blocking: bool) -> dist.Work:
        stream = self._stream
        stream.wait_stream(torch.cuda.current_stream(stream.device))

        def enqueue() -> None:
            with torch.cuda.stream(stream):
                job()

        self._engine.submit(what, enqueue, tensors, blocking=True).wait()
        return Launched(stream, tensors, job)


def _with_cpu(group: Any, place: Place) -> Any:
    """`group`, which carries tensors of the CPU too, such as files of a checkpoint: over gloo."""
    gloo = GlooDevices().group(dist.PrefixStore("cpu", place.store), place.rank, place.size, place.timeout)
    group._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, gloo)
    return group


def _group(store: dist.Store, rank: int, place: Place) -> Any:
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = place.timeout
    group = dist.ProcessGroup(store, rank, place.size)
    nccl = dist.ProcessGroupNCCL(store, rank, place.size, options)
    group._register_backend(torch.device("cuda"), dist.ProcessGroup.BackendType.NCCL, nccl)
    group._set_default_backend(dist.ProcessGroup.BackendType.NCCL)
    return group
