"""One run of a schedule on a cluster, event by event, as the executor would do it.

    rank         works off its program (`schedules.program`) strictly in order, on one thread. A send costs o_s and is not waited
                 for, unless a later action needs it to have left. A receive waits for the message, if it is not there, and then
                 a little to wake up; it costs o_r (+ gamma a byte where it is added). Receives are posted early: a message may
                 travel before its receiver gets round to it.
    wire         messages travel as in `wires`
    latency      the sum along the route, added when the last byte has passed
    one node     ranks on it reach each other without a link: only o_s and o_r

Time goes from event to event; what happens within a nanosecond happens at once, so symmetrical schedules take few events.

The critical path, walked back from the end, splits the seconds into software, wire (waiting in the connection included) and
latency. (LogGP: Alexandrov et al. 1995.)
"""

import heapq
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import ceil, gcd, inf

from thinwire.cluster import Link
from thinwire.cluster.graph import Routes
from thinwire.collectives.choose.costs import Costs
from thinwire.collectives.choose.wires import SAME_S, Message, Wires
from thinwire.collectives.schedules.program import programs
from thinwire.collectives.schedules.schedule import Schedule

_ELEMENT_BYTES = 4
FRAME_BYTES = 1448
"""Payload of a full frame."""


@dataclass(frozen=True, slots=True)
class Transfer:
    """One message on the wire: from when its turn came on the connection to when its last byte had left."""

    source: int
    target: int
    payload_bytes: int
    reduce: bool
    began_s: float
    left_s: float


@dataclass(frozen=True, slots=True)
class Simulated:
    """seconds = software_s + wire_s + latency_s along the critical path. busy: part of the time that the fullest link works."""

    seconds: float
    software_s: float
    wire_s: float
    latency_s: float
    link_bytes: Mapping[Link, int]
    fullest: Link | None
    busy: float
    transfers: tuple[Transfer, ...]

    @property
    def why(self) -> str:
        parts = {"software": self.software_s, "latency": self.latency_s, "the wire": self.wire_s}
        most = max(parts, key=parts.__getitem__)
        if self.fullest is None:
            return "no link is crossed: software alone"
        if most == "the wire":
            return f"{self.fullest.source} -> {self.fullest.target} is busy {self.busy:.0%} of the time"
        path = f"{parts[most] / self.seconds:.0%} of the critical path is {most}"
        return f"{path}; {self.fullest.source} -> {self.fullest.target} is busy {self.busy:.0%}"


def chunk_bytes(schedule: Schedule, message_bytes: int) -> list[int]:
    """Of each chunk, message_bytes as in `schedules.ops.block_sizes`. Cut by elements of float32 where they divide it."""
    unit = gcd(message_bytes, _ELEMENT_BYTES) or 1
    return [len(one) * unit for one in schedule.ranges(schedule.block_sizes(message_bytes // unit))]


def simulate(schedule: Schedule, message_bytes: int, routes: Routes, costs: Costs | None = None, calls: int = 1) -> Simulated:
    """Rank i of the schedule is rank i of the cluster of `routes`; message_bytes as in `schedules.ops.block_sizes`.

    calls: so many, back to back: a rank that is done early begins the next.
    """
    return _Run(replace(schedule, steps=schedule.steps * calls), message_bytes, routes, costs or Costs(), calls).result()


@dataclass(slots=True)
class _Message(Message):
    """pair: its connection, None on one node. arrived: inf until known. sender: the action that sent it."""

    source: int = 0
    target: int = 0
    reduce: bool = False
    pair: int | None = None
    arrived: float = inf
    before: "_Message | None" = None
    sender: int = 0


@dataclass(slots=True)
class _Action:
    """needs: earlier sends of this rank that must have left. end: when done; cause: what it waited for last, None: the rank."""

    message: _Message
    receives: bool
    needs: list[_Message]
    call: int
    ready: float = inf
    end: float = inf
    cause: _Message | None = None


@dataclass(slots=True)
class _Rank:
    actions: list[_Action] = field(default_factory=list)
    at: int = 0
    waits_for: _Message | None = None


class _Run:
    def __init__(self, schedule: Schedule, message_bytes: int, routes: Routes, costs: Costs, calls: int) -> None:
        self._costs = costs
        self._call_s = costs.call_s * max(1.0, costs.cores_shared)
        lengths = chunk_bytes(schedule, message_bytes)
        self._messages = [
            _Message(sum(lengths[chunk] for chunk in m.chunks), source=m.source, target=m.target, reduce=m.reduce)
            for m in schedule.messages
        ]
        sent = [message for message in self._messages if message.size]
        self._wires: Wires[_Message] = Wires(((one.source, one.target) for one in sent), routes, costs.acknowledged)
        for message in sent:
            message.pair = self._wires.connection(message.source, message.target)
        self._ranks = self._prepared(schedule, len(schedule.steps) // calls)
        self._cores = [0.0] * costs.cores(schedule.p)
        self._events: list[tuple[float, int, int]] = []  # time, rank, 1 if its action ends then, 0 if it may begin
        self._work()

    def _prepared(self, schedule: Schedule, call_steps: int) -> list[_Rank]:
        """Programs without messages that carry nothing. A call has call_steps steps."""
        ranks = []
        for program in programs(schedule):
            rank = _Rank()
            for action in program:
                message = self._messages[action.message]
                if message.size:
                    earlier = (program[place] for place in action.after)
                    sent = (self._messages[one.message] for one in earlier if one.kind == "send")
                    needs = [one for one in sent if one.size]
                    rank.actions.append(_Action(message, action.kind != "send", needs, action.step // call_steps))
            ranks.append(rank)
        return ranks

    def _work(self) -> None:
        for number in range(len(self._ranks)):
            self._begin_next(number, self._call_s)
        while self._events or self._wires.busy:
            now = min(self._wires.soonest, self._events[0][0] if self._events else inf)
            for pair, message in self._wires.left(now):
                message.arrived = now + self._wires.latency_s(pair)
                self._wake(message, now)
            while self._events and self._events[0][0] <= now + SAME_S:
                time, number, ends = heapq.heappop(self._events)
                self._action_ended(number, time) if ends else self._take_core(number, time)
            self._wires.settle(now)

    def _begin_next(self, number: int, time: float) -> None:
        """The rank is free from `time` on; its next action begins when it can."""
        rank = self._ranks[number]
        if rank.at == len(rank.actions):
            return
        action = rank.actions[rank.at]
        ready, action.cause = time, None
        for needed in [*action.needs, action.message] if action.receives else action.needs:
            at = needed.arrived if needed is action.message else needed.left
            if at == inf:
                rank.waits_for = needed
                action.ready = time
                return
            if at > ready:
                ready, action.cause = at, needed
        rank.waits_for = None
        action.ready = ready if action.cause is None else ready + self._costs.wake_s
        if self._cores:
            heapq.heappush(self._events, (action.ready, number, 0))
        else:
            heapq.heappush(self._events, (action.ready + self._cost(action), number, 1))

    def _cost(self, action: _Action) -> float:
        if not action.receives:
            return self._costs.send_s + self._carrying_s(action.message)
        added = action.message.size * self._costs.reduce_s_per_byte if action.message.reduce else 0.0
        return self._costs.receive_s + added

    def _carrying_s(self, message: _Message) -> float:
        """Of the frames after the first that pass at once: the sender's core takes them through the network."""
        if not self._cores or message.pair is None:
            return 0.0
        free = self._wires.passing(message.pair, message.size)
        return max(0, ceil(free / FRAME_BYTES) - 1) * self._costs.frame_s

    def _take_core(self, number: int, time: float) -> None:
        rank = self._ranks[number]
        start = max(time, heapq.heappop(self._cores))
        end = start + self._cost(rank.actions[rank.at])
        heapq.heappush(self._cores, end)
        heapq.heappush(self._events, (end, number, 1))

    def _action_ended(self, number: int, time: float) -> None:
        rank = self._ranks[number]
        action = rank.actions[rank.at]
        action.end = time
        if not action.receives:
            self._post(action.message, rank.at, time)
        rank.at += 1
        another = rank.at < len(rank.actions) and rank.actions[rank.at].call > action.call
        self._begin_next(number, time + self._call_s if another else time)

    def _post(self, message: _Message, place: int, time: float) -> None:
        message.sender = place
        if message.pair is None:
            message.began = message.left = message.arrived = time
            self._wake(message, time)
        else:
            message.before = self._wires.post(message.pair, message, time)

    def _wake(self, message: _Message, time: float) -> None:
        """Its receiver, or its sender, may wait for it."""
        for number in (message.target, message.source):
            rank = self._ranks[number]
            if rank.waits_for is message:
                self._begin_next(number, rank.actions[rank.at].ready)

    def result(self) -> Simulated:
        ends = [rank.actions[-1].end if rank.actions else 0.0 for rank in self._ranks]
        last = max(range(len(ends)), key=ends.__getitem__)
        links, load = self._wires.links, self._wires.carried
        busy = [size / capacity for size, capacity in zip(load, self._wires.capacity, strict=True)]
        fullest = max(range(len(busy)), key=busy.__getitem__, default=None)
        software_s, wire_s, latency_s = self._path(last)
        return Simulated(
            seconds=ends[last],
            software_s=software_s,
            wire_s=wire_s,
            latency_s=latency_s,
            link_bytes=dict(zip(links, load, strict=True)),
            fullest=None if fullest is None else links[fullest],
            busy=0.0 if fullest is None else busy[fullest] / max(ends[last], busy[fullest]),
            transfers=tuple(Transfer(m.source, m.target, m.size, m.reduce, m.began, m.left) for m in self._messages if m.size),
        )

    def _path(self, number: int) -> tuple[float, float, float]:
        """Seconds of software, wire and latency on the critical path back from the last action of a rank."""
        software = wire = latency = 0.0
        place = len(self._ranks[number].actions) - 1
        while place >= 0:
            action = self._ranks[number].actions[place]
            if action.cause is None:
                begun = self._ranks[number].actions[place - 1].end if place else 0.0
                software += action.end - begun
                place -= 1
                continue
            message = action.cause
            reached = message.arrived if message.target == number else message.left
            software += action.end - reached
            latency += reached - message.left
            while message.before is not None:
                wire += message.left - message.began
                message = message.before
            wire += message.left - message.began
            number, place = message.source, message.sender
        return software, wire, latency
