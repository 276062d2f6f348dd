"""The script's own process groups, behind a meter that notes when each call was issued, waited for and over.

c10d makes every group in one place. What comes out of it is put into a group of ours, which passes each call on to the very same
backend: the numbers are those of the script without us, to the bit. On a device the moments are events in its streams.
"""
# c10d keeps its groups in tables that its type stubs do not have:
# mypy: disable-error-code="override,attr-defined,assignment"

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from thinwire.collectives.backend import MeteredGroup, bytes_of
from thinwire.collectives.clock import HostClock, clock_of
from thinwire.collectives.ledger import Ledger
from thinwire.errors import UserError
from thinwire.why.trace import Call, Event, Mark, Trace, Wait

OWN = "thinwire why"
"""Description of groups that are ours, and not metered."""
MOST_EVENTS = 400_000


class Recorder:
    """What this rank notes while `on`, of calls only if `calls` too. clock: of the devices of the script's first group."""

    def __init__(self) -> None:
        self.on = self.calls = True
        self.clock: Any = HostClock()
        self.events: list[Event] = []
        self.kept: list[dist.ProcessGroup] = []
        """Groups that stay to the end: gloo's thread may still want the interpreter to drop a call that is over, and
        whoever drops a group holds the interpreter while it waits for that thread."""

    def note(self, event: Event) -> None:
        """Only so many: a script that never ends a step must not fill the memory."""
        self.events.append(event)
        if len(self.events) >= MOST_EVENTS:
            self.on = False

    def mark(self, what: str, who: int = 0) -> None:
        """Now."""
        if self.on:
            self.note(Mark(self.clock.now(), what, who))

    def trace(self) -> Trace:
        """All that was noted, in seconds of the host's clock. On a device it waits for what is under way."""
        if not self.clock.on_device:
            return self.events
        torch.accelerator.synchronize()
        base, zero = self.clock.now(), HostClock().now()

        def seconds(moment: Any) -> Any:
            return None if moment is None else zero - self.clock.seconds(moment, base)

        for one in self.events:
            for name in ("issued", "returned", "ended", "begun", "at"):
                if hasattr(one, name):
                    setattr(one, name, seconds(getattr(one, name)))
        return self.events


class _SeenWork(dist._Work):
    """A call under way. Notes who stands still for it; everything else is the backend's own answer."""

    def __init__(self, inner: Any, recorder: Recorder, call: Call) -> None:
        super().__init__()
        self._inner, self._recorder, self._call = inner, recorder, call

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        recorder = self._recorder
        begun = recorder.clock.now() if recorder.on else None
        done: bool = self._inner.wait(timeout) if timeout else self._inner.wait()
        if begun is not None:
            ended = recorder.clock.now()
            if self._call.ended is None:
                self._call.ended = ended
            recorder.note(Wait(begun, ended, self._call))
        return done

    def get_future(self) -> Any:
        return self._inner.get_future()

    def is_completed(self) -> bool:
        return bool(self._inner.is_completed())

    def is_success(self) -> bool:
        return bool(self._inner.is_success())

    def exception(self) -> Any:
        return self._inner.exception()

    def result(self) -> Any:
        return self._inner.result()

    def source_rank(self) -> int:
        return int(self._inner.source_rank())

    def _source_rank(self) -> int:
        return int(self._inner._source_rank())

    def synchronize(self) -> None:
        self._inner.synchronize()


def _ended(recorder: Recorder, call: Call, _future: Any) -> None:
    call.ended = recorder.clock.now()


class SeenGroup(MeteredGroup):
    """A group of the script. ranks: global, in its order."""

    def __init__(self, recorder: Recorder, group: dist.ProcessGroup, ranks: Sequence[int]) -> None:
        kinds = list(group._device_types)
        backends = [group._get_backend(kind) for kind in kinds]
        gloo = all(isinstance(backend, dist.ProcessGroupGloo) for backend in backends)
        device = torch.device("cpu") if gloo else kinds[-1]
        super().__init__(Ledger(), backends[0] if gloo else group, device_type=device.type)
        for kind, backend in zip(kinds, backends, strict=True):
            self._register_backend(kind, dist.ProcessGroup.BackendType.CUSTOM, backend)
        self._recorder, self._ranks = recorder, tuple(ranks)
        recorder.kept.append(group)
        if not recorder.events:  # the first group says by which clock all is timed
            recorder.clock = clock_of(device)

    def _entered(
        self, op: str, tensors: Any, issue: Callable[..., Any], arguments: Sequence[Any], opts: Any, peer: int = 0
    ) -> Any:
        recorder = self._recorder
        passed = partial(issue, *arguments) if opts is None else partial(issue, *arguments, opts)
        if not (recorder.on and recorder.calls):
            return passed() or _Nothing()
        call = Call(recorder.clock.now(), op, bytes_of(tensors), self._ranks)
        recorder.note(call)
        work = passed() or _Nothing()
        call.returned = recorder.clock.now()
        if not getattr(opts, "asyncOp", True):  # the caller waits at once
            work.wait()
            call.ended = recorder.clock.now()
            recorder.note(Wait(call.returned, call.ended, call))
            return work
        if op not in ("send", "recv", "reduce_scatter"):
            with suppress(RuntimeError):  # no future: its end is where somebody has waited for it
                work.get_future().add_done_callback(partial(_ended, recorder, call))
        return _SeenWork(work, recorder, call)

    def recv_anysource(self, tensors: Any, tag: int) -> Any:
        return self._inner.recv_anysource(tensors, tag)


class _Nothing(dist._Work):
    """NCCL gives no Work where the call is on the caller's own stream."""

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        return True


@contextmanager
def metered(recorder: Recorder) -> Iterator[None]:
    """Inside, each new process group is behind the meter. UserError where this torch makes groups in another way."""
    make = getattr(c10d, "_new_process_group_helper", None)
    if make is None or not hasattr(c10d._world, "pg_map"):
        raise UserError(f"torch {torch.__version__} makes its process groups in another way; use torch 2.11 to 2.15")

    def made(size: int, rank: int, ranks: Sequence[int], *arguments: Any, **options: Any) -> Any:
        group, store = make(size, rank, ranks, *arguments, **options)
        if not isinstance(group, dist.ProcessGroup) or isinstance(group, MeteredGroup) or options.get("group_desc") == OWN:
            return group, store
        seen = SeenGroup(recorder, group, ranks or range(size))
        _take_place(group, seen)
        return seen, store

    c10d._new_process_group_helper = made
    try:
        yield
    finally:
        c10d._new_process_group_helper = make


def _take_place(group: dist.ProcessGroup, seen: SeenGroup) -> None:
    """In c10d's tables."""
    world, name = c10d._world, group.group_name
    seen._set_group_name(name)
    seen._set_group_desc(group.group_desc)
    for table in (world.pg_map, world.pg_names, world.pg_backend_config, world.pg_to_tag):
        if group in table:
            table[seen] = table.pop(group)
    for groups in world.tags_to_pg.values():
        groups[:] = [seen if one is group else one for one in groups]
    c10d._unregister_process_group(name)
    c10d._register_process_group(name, seen)
