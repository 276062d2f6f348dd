"""A server: owns one range of the weights and answers each worker from a thread of its own.

A worker that is silent for `timeout_s` while its server waits for nothing but its next message has made no progress; one that
hangs up is gone. Both are lost: the merger learns it, so that nobody waits for it. What happened to whom is in `events`.

What a worker sends can cost it its own connection only. An error while merging, or while a snapshot is written, is the server's
own: it ends the server, and `run` raises it.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from socket import socket
from typing import Any

from thinwire.collectives.ledger import Ledger
from thinwire.config.replicas import DiLoCo, Service
from thinwire.sync.server.checks import pace_error
from thinwire.sync.server.connection import Connection, PeerLost
from thinwire.sync.server.diloco_merger import DiLoCoMerger
from thinwire.sync.server.flat import extent_of
from thinwire.sync.server.gradient_merger import GradientMerger
from thinwire.sync.server.lease import Lease
from thinwire.sync.server.merger import Member, Merger, Pace
from thinwire.sync.server.message import HEAD_BYTES, BadMessage, Head, Hello, Kind, unpack_start
from thinwire.sync.server.session import Refused, Session
from thinwire.sync.server.snapshots import Snapshots

POLL_S = 0.02
END_S = 1.0
"""How long threads of workers may take to end with the service."""


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


class Server:
    """Server `index` of a service. on_event: called with each event, from any thread. snapshots: what it holds, on the disk."""

    def __init__(
        self,
        service: Service,
        index: int,
        ledger: Ledger,
        on_event: Callable[[Event], None] = lambda event: None,
        snapshots: Snapshots | None = None,
    ) -> None:
        self.merger: Merger = DiLoCoMerger(service) if isinstance(service.merge, DiLoCo) else GradientMerger(service)
        self.events: list[Event] = []
        self.received_bytes: dict[str, int] = {}
        """By worker's name, from HELLO on."""
        self._service, self._index, self._ledger = service, index, ledger
        self._on_event, self._snapshots = on_event, snapshots
        self._connections: dict[Member, Connection] = {}
        self._waiting: set[Member] = set()
        self._gone: set[Member] = set()
        self._newest: dict[str, int] = {}
        """The number of each name's last life."""
        self._lease = Lease()
        self._lock = threading.Lock()
        self._failure: BaseException | None = None
        self._ended = False
        self._started = time.monotonic()
        if snapshots is not None:
            self.merger.keep_every = snapshots.every

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a snapshot, before the first worker."""
        self.merger.load_state_dict(state)
        self._lease.end()

    def run(self, end: threading.Event) -> None:
        """Serve until `end` is set; snapshots are written meanwhile, and at the end. Raises what is wrong with the server
        itself."""
        try:
            while not end.is_set() and self._failure is None:
                for member, connection in self._hung_up():
                    self._lose(member, str(connection.lost(ConnectionError())))
                state = self.merger.snapshot(POLL_S)
                if state is not None and self._snapshots is not None:
                    self._snapshots.write(state)
                    self.merger.written(state)
        finally:
            with self._lock:
                self._ended, members = True, list(self._connections)
            for member in members:
                self._lose(member, "the service ends")
            limit = time.monotonic() + END_S
            while self._connections and time.monotonic() < limit:
                time.sleep(POLL_S)
        if self._failure is not None:
            raise self._failure
        if self._snapshots is not None and self.merger.weights is not None:
            self._snapshots.write(self.merger.state_dict())

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

    def measures(self) -> dict[str, float]:
        """What it is doing, in numbers."""
        with self._lock:
            joined, waiting, received = len(self._connections), len(self._waiting), sum(self.received_bytes.values())
        return {
            "version": self.merger.version,
            "merged_tokens_total": self.merger.merged,
            "workers": joined,
            "waiting": waiting,
            "lost_total": sum(event.what == "lost" for event in self.events),
            "received_bytes_total": received,
            "sent_bytes_total": self._ledger.sent_bytes,
        }

    def serve(self, sock: socket, hello: Hello) -> None:
        """One worker, from its HELLO to its last word, in a thread of its own."""
        advice = "no step, no word: raise timeout_s, or let the loop call alive() where it pauses on purpose"
        peer = f"worker {hello.name}", hello.host
        connection = Connection(sock, peer, self._ledger, self._service.timeout_s, advice)
        try:
            self._serve(connection, hello)
        finally:
            connection.close()

    def _serve(self, connection: Connection, hello: Hello) -> None:
        error = pace_error(hello.every, hello.tokens_per_step)
        if hello.numel > self._service.most_values:
            error = f"a model of {hello.numel} values for a server, where most_values is {self._service.most_values}; raise it"
        if error:
            connection.dismiss(Kind.REFUSED, error)
            return
        with self._lock:
            member = self._new_member(hello)
            before = [other for other in self._connections if other.name == hello.name]
            if member is not None and not self._ended:
                self._connections[member] = connection
        if self._ended:
            connection.dismiss(Kind.LOST, "the service ends")
            return
        if member is None:
            connection.dismiss(Kind.LOST, f"another life of {hello.name} has come meanwhile")
            return
        self._count(member, HEAD_BYTES + len(hello.packed()))
        for other in before:
            self._lose(other, "came back as a new one", tell=f"another life of {hello.name} has come, in a process of its own")
        try:
            self._answer(Session(member, connection, hello, self._service, self._index))
        except Refused as error:
            self._lose(member, f"was refused: {error}", tell=str(error), kind=Kind.REFUSED)
        except BadMessage as error:
            self._lose(member, f"sent what it may not: {error}", tell=f"what worker {member.name} sent may not come: {error}")
        except PeerLost as error:
            limit = f"it made no step and said nothing for {self._service.timeout_s:g} s"
            self._lose(member, str(error), tell=f"{limit}; raise timeout_s, or call alive() in pauses")
        except Exception as error:  # nobody may wait for an answer that does not come
            self._lose(member, f"could not be answered: {error!r}")
        finally:
            with self._lock:
                del self._connections[member]
                self._gone.discard(member)

    def _answer(self, session: Session) -> None:
        """Whatever the worker asks, until it leaves."""
        member, connection, merger, hello = session.member, session.connection, self.merger, session.hello
        with self._own_work():
            step = merger.begin(member, Pace(every=hello.every, tokens_per_step=hello.tokens_per_step))
        with self._lock:
            gone = member in self._gone
        if gone:  # while it began
            merger.lost(member)
            raise connection.lost(ConnectionError())
        self._note("joined", member, hello.host)
        version = -1 if merger.weights is None else merger.version
        connection.send(Head(kind=Kind.STATE, step=step, version=version, local_steps=member.incarnation))
        while True:
            head, payload = connection.receive(session.sizes)
            self._count(member, HEAD_BYTES + head.payload_bytes)
            match head.kind:
                case Kind.LEAVE:
                    self._lose(member, "left")
                    connection.send(Head(kind=Kind.STATE))
                    return
                case Kind.BEGIN:
                    number = self._waited(session, lambda patience_s: self._lease.acquire(member, patience_s))
                    connection.send(Head(kind=Kind.STATE, step=number))
                case Kind.INIT:
                    self._initialise(session, head, unpack_start(payload, head.local_steps, session.extent))
                    connection.send(Head(kind=Kind.STATE))
                case Kind.PUSH:
                    push = session.push_of(head, payload)
                    with self._own_work():
                        error = merger.push(push)
                    if error:
                        raise Refused(error)
                    self._send_weights(session)
                case Kind.PULL:
                    merger.not_before(member, head.version)
                    self._send_weights(session)

    def _send_weights(self, session: Session) -> None:
        session.must_fit(self.merger.weights)
        with self._own_work():
            standing = self._waited(session, lambda patience_s: self.merger.admit(session.member, patience_s))
        session.must_fit(self.merger.weights)
        session.answer(standing)

    def _initialise(self, session: Session, head: Head, start: tuple[Any, Any]) -> None:
        """The first weights; see `lease`."""
        if self._index == 0 and not self._lease.is_held_by(session.member):
            raise Refused("first weights from a worker that was not asked for them")
        if not self._lease.accept(head.step):
            raise Refused("first weights from a worker that was given up meanwhile; join again")
        if (given := extent_of(start[1])) != session.extent:
            raise Refused(f"first weights whose spans cover {given} where this model has {session.extent}")
        if error := self.merger.initialise(*start, head.version):
            raise Refused(error)
        if self._index == 0:
            self._lease.end()

    def _waited(self, session: Session, ask: Callable[[float], Any]) -> Any:
        """What `ask` finds, asked again and again for some seconds each. Meanwhile the worker is sent WAIT, and watched."""
        with self._lock:
            self._waiting.add(session.member)
        try:
            while (found := ask(self._service.timeout_s / 4)) is None:
                session.connection.send(Head(kind=Kind.WAIT))
            with self._lock:
                if session.member not in self._gone:
                    return found
        finally:
            with self._lock:
                self._waiting.discard(session.member)
        self._lease.lost(session.member)
        raise session.connection.lost(ConnectionError())

    def _new_member(self, hello: Hello) -> Member | None:
        """The life that says HELLO. None if it cannot be: its number is not above those before, or it gives itself one."""
        newest = self._newest.get(hello.name, 0)
        number = newest + 1 if self._index == 0 else hello.incarnation
        if number <= newest or (self._index == 0 and hello.incarnation):
            return None
        self._newest[hello.name] = number
        return Member(hello.name, number)

    def _hung_up(self) -> list[tuple[Member, Connection]]:
        with self._lock:
            waiting = [(member, self._connections[member]) for member in self._waiting if member in self._connections]
        return [(member, connection) for member, connection in waiting if connection.is_hung_up()]

    def _lose(self, member: Member, why: str, tell: str = "", kind: Kind = Kind.LOST) -> None:
        with self._lock:
            if member in self._gone or member not in self._connections:
                return
            self._gone.add(member)
            connection = self._connections[member]
        self._note("left" if why == "left" else "lost", member, connection.host, "" if why == "left" else why)
        if tell:
            connection.dismiss(kind, tell)
        elif why != "left":
            connection.cut()
        self._lease.lost(member)
        with self._own_work():
            self.merger.lost(member)

    def _note(self, what: str, member: Member, host: str, why: str = "") -> None:
        passed_s = time.monotonic() - self._started
        event = Event(round(passed_s, 3), what, member.name, member.incarnation, self.merger.version, host, why)
        self.events.append(event)
        self._on_event(event)

    def _count(self, member: Member, size: int) -> None:
        with self._lock:
            self.received_bytes[member.name] = self.received_bytes.get(member.name, 0) + size

    @contextmanager
    def _own_work(self) -> Iterator[None]:
        """What goes wrong inside is this server's fault, not the worker's: `run` raises it."""
        try:
            yield
        except PeerLost:
            raise
        except BaseException as error:
            self._failure = error
            raise
