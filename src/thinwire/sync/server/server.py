"""A server: owns one range of the weights and answers each worker from a thread of its own.

It watches the members of the store: for a worker that joins it makes a link, for one that is gone it cuts the link and tells the
merger, so that nobody waits for it. What happened to whom is in `events`.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from thinwire.collectives.ledger import Ledger
from thinwire.config.replicas import DiLoCo, Service
from thinwire.sync.server import saved
from thinwire.sync.server.coding import Mirror, decode, make_flat
from thinwire.sync.server.gradients import GradientMerger
from thinwire.sync.server.link import Dialer, Link, PeerLost
from thinwire.sync.server.members import Member, Membership, Watch, host_of
from thinwire.sync.server.merger import Merger, Pace, Push
from thinwire.sync.server.merges import DiLoCoMerger
from thinwire.sync.server.message import HEAD_BYTES, Head, Kind
from thinwire.sync.server.ranges import Span

SERVICE_KEY = "service"
POLL_S = 0.02


@dataclass(frozen=True, slots=True)
class Event:
    """what: "joined", "left" or "lost"; version: of the server's weights at that time."""

    time_s: float
    what: str
    worker: str
    incarnation: int
    version: int
    host: str
    why: str = ""

    def line(self) -> str:
        """For people."""
        why = f": {self.why}" if self.why else ""
        return f"version {self.version}  {self.worker} on {self.host} {self.what}{why}"


def publish(store: dist.Store, service: Service) -> None:
    """Tell all who come what has been agreed."""
    store.set(SERVICE_KEY, service.model_dump_json())


class Server:
    """Server `index` of the service in `store`. `heard`: called with each event, from any thread."""

    def __init__(
        self,
        service: Service,
        store: dist.TCPStore,
        index: int,
        ledger: Ledger,
        heard: Callable[[Event], None] = lambda event: None,
    ) -> None:
        self.merger: Merger = DiLoCoMerger(service) if isinstance(service.merge, DiLoCo) else GradientMerger(service)
        self.events: list[Event] = []
        self.received_bytes: dict[str, int] = {}
        """By worker's name."""
        self._service, self._store, self._index, self._heard = service, store, index, heard
        self._dialer = Dialer(store, ledger, service.timeout_s)
        self._push_codec = make_flat(service.push)
        self._links: dict[Member, Link] = {}
        self._threads: list[threading.Thread] = []
        self._gone: dict[Member, str] = {}
        self._lock = threading.Lock()
        self._started = time.monotonic()

    def run(self, end: threading.Event, checkpoint: Path | None = None, every: int = 1) -> None:
        """Serve until `end` is set. checkpoint: written after every `every` versions, and at the end."""
        membership = Membership(self._store, "server", str(self._index), self._service.heartbeat_s)
        watch = Watch(self._store, "worker", self._service.timeout_s)
        next_look = written = 0.0
        try:
            while not end.wait(POLL_S):
                for member in watch.joined():
                    thread = threading.Thread(target=self._serve, args=(member,), name=f"worker {member.name}", daemon=True)
                    thread.start()
                    self._threads = [other for other in self._threads if other.is_alive()] + [thread]
                if time.monotonic() >= next_look:
                    for member, why in watch.gone().items():
                        self._lose(member, why)
                    next_look = time.monotonic() + min(self._service.heartbeat_s, self._service.timeout_s / 4)
                if checkpoint and self.merger.version >= written + every:
                    written = self.merger.version
                    saved.save(self.merger.state_dict(), checkpoint)
        finally:
            for member in list(self._links):
                self._lose(member, "the service ends")
            for thread in self._threads:
                thread.join(1.0)
            membership.leave()
        if checkpoint and self.merger.weights is not None:
            saved.save(self.merger.state_dict(), checkpoint)

    def report(self) -> dict[str, Any]:
        """What happened, as plain data."""
        found: dict[str, Any] = {
            "server": self._index,
            "version": self.merger.version,
            "merged_tokens": self.merger.merged,
            "late_steps": dict(self.merger.late),
            "events": [asdict(event) for event in self.events],
            "received_bytes": dict(self.received_bytes),
        }
        if isinstance(self.merger, DiLoCoMerger):
            found["merges"] = [asdict(merge) for merge in self.merger.merges]
        if isinstance(self.merger, GradientMerger):
            found["furthest_ahead"] = self.merger.furthest_ahead
        return found

    def _serve(self, member: Member) -> None:
        """One worker, from its first word to its last."""
        try:
            link = self._dialer.link(self._index, member.name, member.incarnation, serving=True)
            self._links[member] = link
            with self._lock:
                if member in self._gone:
                    return
            mirror = Mirror(self._service.pull)
            while True:
                head, payload = link.receive(patient=True)
                with self._lock:
                    received = self.received_bytes.get(member.name, 0)
                    self.received_bytes[member.name] = received + HEAD_BYTES + head.payload_bytes
                if head.kind == Kind.LEAVE:
                    link.send(Head(kind=Kind.STATE))
                    self._lose(member, "left")
                    return
                self._answer(link, member, head, payload, mirror)
        except PeerLost as error:
            self._lose(member, str(error))
        except Exception as error:  # nobody may wait for an answer that does not come
            self._lose(member, f"could not be answered: {error!r}")
            raise

    def _answer(self, link: Link, member: Member, head: Head, payload: Tensor, mirror: Mirror) -> None:
        merger = self.merger
        match head.kind:
            case Kind.HELLO:
                step = merger.begin(member, Pace(every=head.local_steps, tokens_per_step=head.weight))
                self._note("joined", member)
                link.send(Head(kind=Kind.STATE, step=step, version=-1 if merger.weights is None else merger.version))
                return
            case Kind.INIT:
                merger.initialise(*unpack_start(payload, head.local_steps))
                link.send(Head(kind=Kind.STATE))
                return
            case Kind.PUSH:
                assert merger.weights is not None, "a worker gives the weights before it pushes"
                push = Push(
                    member=member,
                    values=decode(self._push_codec, payload, merger.weights.values.numel()),
                    version=head.version,
                    weight=head.weight,
                    local_steps=head.local_steps,
                    learning_rate=head.learning_rate,
                )
                merger.push(push)
        while (standing := merger.admit(member, self._service.timeout_s / 4)) is None:
            link.send(Head(kind=Kind.WAIT))
        answer = Head(
            kind=Kind.WEIGHTS,
            step=standing.step,
            version=standing.version,
            local_steps=standing.local_steps,
            merged=standing.merged,
        )
        link.send(answer, mirror.encode(standing.values), label="weights")

    def _lose(self, member: Member, why: str) -> None:
        with self._lock:
            if member in self._gone:
                return
            self._gone[member] = why
            link = self._links.pop(member, None)
        self._note("left" if why == "left" else "lost", member, "" if why == "left" else why)
        if link is not None and why != "left":
            link.cut()
        self.merger.lost(member)

    def _note(self, what: str, member: Member, why: str = "") -> None:
        passed_s = time.monotonic() - self._started
        host = host_of(self._store, "worker", member.name)
        event = Event(round(passed_s, 3), what, member.name, member.incarnation, self.merger.version, host, why)
        self.events.append(event)
        self._heard(event)


def pack_start(values: Tensor, spans: list[Span]) -> Tensor:
    """Spans and weights as one payload."""
    table = torch.tensor([(span.first, span.end, span.decays) for span in spans], dtype=torch.int64)
    return torch.cat([table.view(torch.uint8).reshape(-1), values.contiguous().view(torch.uint8)])


def unpack_start(payload: Tensor, num_spans: int) -> tuple[Tensor, list[Span]]:
    """The inverse of `pack_start`."""
    size = num_spans * 3 * 8
    table = payload[:size].clone().view(torch.int64).view(num_spans, 3)
    return payload[size:].clone().view(torch.float32), [Span(int(a), int(b), bool(c)) for a, b, c in table]
