"""The ledger: what was really sent. Whoever issues a collective writes it; it knows nothing of predictions.

Calls are summed by (label, axis, op, message bytes); two snapshots subtract, so any stretch of a run can be read. Seconds are the
wire's: on a device, where the host only enqueues, they lie between two events, and are added when both have happened. Nobody
waits for that: it is looked up when a call ends and when the ledger is read.
"""

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

from thinwire.collectives.wire import sent_bytes

SETUP_STEP = -1
"""The step under which calls before the first training step are entered."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """What makes calls alike."""

    label: str
    axis: str
    op: str
    world_size: int
    message_bytes: int


@dataclass(slots=True)
class Total:
    """Sums over alike calls of this rank. seconds: from issuing to completion, as the caller, or his stream, could see it."""

    calls: int = 0
    wire_bytes: int = 0
    seconds: float = 0.0
    first_step: int = SETUP_STEP
    last_step: int = SETUP_STEP


Snapshot = dict[Call, Total]


class Clock(Protocol):
    """What `thinwire.collectives.clock` has for hosts and devices."""

    on_device: bool

    def now(self) -> Any: ...

    def passed(self, moment: Any) -> bool: ...

    def seconds(self, begin: Any, end: Any) -> float: ...


@dataclass
class Ledger:
    """One per rank. `step` is set by the training loop; `axes` names process groups by mesh axis."""

    step: int = SETUP_STEP
    axes: dict[str, str] = field(default_factory=dict)
    sent_bytes: int = 0
    recorded: list[tuple[int, Total, Any, Any]] | None = None
    """Where somebody wants each call by itself: step, its total, and when it began and was over, by the host's clock."""
    _totals: Snapshot = field(default_factory=dict)
    _under_way: deque[tuple[Total, Clock, Any, Any]] = field(default_factory=deque)
    """Calls whose seconds are not added yet: when they were issued, and are over."""
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _local: threading.local = field(default_factory=threading.local)

    @contextmanager
    def label(self, label: str) -> Iterator[None]:
        """Calls that this thread issues inside are entered under `label`. Threads do not inherit it: whoever issues, labels."""
        before = getattr(self._local, "label", "")
        self._local.label = label
        try:
            yield
        finally:
            self._local.label = before

    def enter(self, op: str, message_bytes: int, group: "Group", root: int = 0, wire_bytes: int | None = None) -> Total:
        """Enter one call at the moment it is issued. Returns the running total, to which `completed` adds the seconds.

        wire_bytes: payload bytes that this rank sends, if it is not by the backend's own algorithm.
        """
        call = Call(
            label=getattr(self._local, "label", ""),
            axis=self.axes.get(group.name, group.axis),
            op=op,
            world_size=group.size,
            message_bytes=message_bytes,
        )
        if wire_bytes is None:
            wire_bytes = sent_bytes(op, message_bytes, group.size, group.rank, root)
        with self._lock:
            total = self._totals.get(call)
            if total is None:
                total = self._totals[call] = Total(first_step=self.step)
            total.calls += 1
            total.wire_bytes += wire_bytes
            total.last_step = self.step
            self.sent_bytes += wire_bytes
        return total

    def completed(self, total: Total, clock: Clock, issued: Any, _future: Any = None) -> None:
        """Add the time since `issued`, a moment of `clock`, to `total`; a callback of futures too."""
        ended = clock.now()
        with self._lock:
            if self.recorded is not None and not clock.on_device:
                self.recorded.append((self.step, total, issued, ended))
            self._under_way.append((total, clock, issued, ended))
            while self._under_way and self._add(*self._under_way[0]):
                self._under_way.popleft()

    def _add(self, total: Total, clock: Clock, issued: Any, ended: Any) -> bool:
        """Whether the call is over; then its seconds count."""
        if not (clock.passed(issued) and clock.passed(ended)):
            return False
        total.seconds += clock.seconds(issued, ended)
        return True

    def snapshot(self) -> Snapshot:
        """A copy of all totals so far; of calls that a device still works on the seconds are missing."""
        with self._lock:
            self._under_way = deque(call for call in self._under_way if not self._add(*call))
            return {call: replace(total) for call, total in self._totals.items()}

    def recorded_calls(self) -> list[tuple[int, Call, Any, Any]]:
        """What was `recorded`, with the calls themselves."""
        with self._lock:
            calls = {id(total): call for call, total in self._totals.items()}
            return [(step, calls[id(total)], *times) for step, total, *times in self.recorded or []]

    def entries(self, rank: int) -> list[dict[str, Any]]:
        """All totals as flat rows for the run folder."""
        return [{"rank": rank, **asdict(call), **asdict(total)} for call, total in self.snapshot().items()]


@dataclass(frozen=True, slots=True)
class Group:
    """The group of ranks in which a call is made, as the ledger needs it. axis: used where the ledger knows no better."""

    name: str
    rank: int
    size: int
    axis: str = "world"


def axis_of(description: str) -> str:
    """The mesh axis of a group that a DeviceMesh has made and described; "world" for any other."""
    return description.removeprefix("mesh_") if description.startswith("mesh_") else "world"


def difference(after: Snapshot, before: Snapshot) -> Snapshot:
    """What was entered between two snapshots; calls without any are left out."""
    result = {}
    for call, total in after.items():
        old = before.get(call, Total())
        if total.calls > old.calls:
            result[call] = replace(
                total,
                calls=total.calls - old.calls,
                wire_bytes=total.wire_bytes - old.wire_bytes,
                seconds=total.seconds - old.seconds,
            )
    return result
