"""A server: owns one range of the weights and answers each worker from a thread of its own.

A worker that is silent for `timeout_s` while its server waits for nothing but its next message has made no progress; one that
hangs up is gone. Both are lost: the merger is told, so that nobody waits for it. What happened to whom is in `events`.

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
from thinwire.sync.server.checks import wrong_with_pace
from thinwire.sync.server.first import Right
from thinwire.sync.server.gradients import GradientMerger
from thinwire.sync.server.kept import Kept
from thinwire.sync.server.link import Link, PeerLost
from thinwire.sync.server.members import Member, Roll
from thinwire.sync.server.merger import Merger, Pace
from thinwire.sync.server.merges import DiLoCoMerger
from thinwire.sync.server.message import HEAD_BYTES, BadMessage, Head, Hello, Kind
from thinwire.sync.server.visit import Refused, Visit

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
    """Server `index` of a service. `heard`: called with each event, from any thread. kept: what it holds, on the disk."""

    def __init__(
        self,
        service: Service,
        index: int,
        ledger: Ledger,
        heard: Callable[[Event], None] = lambda event: None,
        kept: Kept | None = None,
    ) -> None:
        self.merger: Merger = DiLoCoMerger(service) if isinstance(service.merge, DiLoCo) else GradientMerger(service)
        self.events: list[Event] = []
        self.received_bytes: dict[str, int] = {}
        """By worker's name, from HELLO on."""
        self._service, self._index, self._ledger, self._heard, self._kept = service, index, ledger, heard, kept
        self._links: dict[Member, Link] = {}
        self._hosts: dict[Member, str] = {}
        self._waiting: set[Member] = set()
        self._gone: set[Member] = set()
        self._roll = Roll(numbers=index == 0)
        self._right = Right()
        self._lock = threading.Lock()
        self._failure: BaseException | None = None
        self._ended = False
        self._started = time.monotonic()
        if kept is not None:
            self.merger.keep_every = kept.every

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a snapshot, before the first worker."""
        self.merger.load_state_dict(state)
        self._right.end()

    def run(self, end: threading.Event) -> None:
        """Serve until `end` is set; snapshots are written meanwhile, and at the end. Raises what is wrong with the server
        itself."""
        try:
            while not end.is_set():
                if self._failure is not None:
                    raise self._failure
                for member, link in self._hung_up():
                    self._lose(member, str(link.gone()))
                state = self.merger.due(POLL_S)
                if state is not None and self._kept is not None:
                    self._kept.write(state)
                    self.merger.written(state)
        finally:
            with self._lock:
                self._ended, members = True, list(self._links)
            for member in members:
                self._lose(member, "the service ends")
            limit = time.monotonic() + END_S
            while self._links_in_use() and time.monotonic() < limit:
                time.sleep(POLL_S)
        if self._failure is not None:
            raise self._failure
        if self._kept is not None and self.merger.weights is not None:
            self._kept.write(self.merger.state_dict())

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

    def link(self, sock: socket, hello: Hello) -> Link:
        """The link to a worker that has said HELLO."""
        advice = "no step, no word: raise timeout_s, or let the loop call alive() where it pauses on purpose"
        return Link(sock, (f"worker {hello.name}", hello.host), self._ledger, self._service.timeout_s, advice)

    def meet(self, link: Link, hello: Hello) -> None:
        """One worker, from its first word to its last, in a thread of its own."""
        wrong = self._wrong_with(hello)
        if wrong:
            link.dismiss(Kind.REFUSED, wrong)
            return
        with self._lock:
            member = self._roll.enter(hello)
            before = [other for other in self._links if other.name == hello.name]
            if member is not None and not self._ended:
                self._links[member], self._hosts[member] = link, hello.host
        if self._ended:
            link.dismiss(Kind.LOST, "the service ends")
            return
        if member is None:
            link.dismiss(Kind.LOST, f"another life of {hello.name} has come meanwhile")
            return
        self._count(member, HEAD_BYTES + len(hello.packed()))
        for other in before:
            self._lose(other, "came back as a new one", tell=f"another life of {hello.name} has come, in a process of its own")
        try:
            self._serve(Visit(member, link, hello, self._service, self._index))
        except Refused as error:
            self._lose(member, f"was refused: {error}", tell=str(error), kind=Kind.REFUSED)
        except BadMessage as error:
            self._lose(member, f"sent what it may not: {error}", tell=f"what worker {member.name} sent may not come: {error}")
        except PeerLost as error:
            limit = (
                f"it made no step and said nothing for {self._service.timeout_s:g} s; raise timeout_s, or call alive() in pauses"
            )
            self._lose(member, str(error), tell=limit)
        except Exception as error:  # nobody may wait for an answer that does not come
            self._lose(member, f"could not be answered: {error!r}")
        finally:
            with self._lock:
                del self._links[member], self._hosts[member]
                self._gone.discard(member)

    def _serve(self, visit: Visit) -> None:
        member, link, merger, hello = visit.member, visit.link, self.merger, visit.hello
        patience_s = self._service.timeout_s / 4
        with self._own_work():
            step = merger.begin(member, Pace(every=hello.every, tokens_per_step=hello.tokens_per_step))
        with self._lock:
            gone = member in self._gone
        if gone:  # while it was let in
            merger.lost(member)
            raise link.gone()
        self._note("joined", member, hello.host)
        version = -1 if merger.weights is None else merger.version
        link.send(Head(kind=Kind.STATE, step=step, version=version, local_steps=member.incarnation))
        while True:
            head, payload = link.receive(visit.sizes)
            self._count(member, HEAD_BYTES + head.payload_bytes)
            match head.kind:
                case Kind.PROGRESS:
                    continue
                case Kind.LEAVE:
                    self._lose(member, "left")
                    link.send(Head(kind=Kind.STATE))
                    return
                case Kind.BEGIN:
                    number = self._waited(visit, lambda: self._right.ask(member, patience_s))
                    link.send(Head(kind=Kind.STATE, step=number))
                    continue
                case Kind.INIT:
                    self._initialise(visit, head, visit.start_of(head, payload))
                    link.send(Head(kind=Kind.STATE))
                    continue
                case Kind.PUSH:
                    push = visit.push_of(head, payload)
                    with self._own_work():
                        wrong = merger.push(push)
                    if wrong:
                        raise Refused(wrong)
                case Kind.PULL:
                    merger.not_before(member, head.version)
            visit.must_fit(merger.weights)
            with self._own_work():
                standing = self._waited(visit, lambda: merger.admit(member, patience_s))
            visit.must_fit(merger.weights)
            visit.answer(standing)

    def _initialise(self, visit: Visit, head: Head, start: tuple[Any, Any]) -> None:
        """The first weights; see `first`."""
        if self._index == 0 and not self._right.is_held_by(visit.member):
            raise Refused("first weights from a worker that was not asked for them")
        if not self._right.take(head.step):
            raise Refused("first weights from a worker that was given up meanwhile; join again")
        wrong = self.merger.initialise(*start, head.version)
        if wrong:
            raise Refused(wrong)
        if self._index == 0:
            self._right.end()

    def _waited(self, visit: Visit, ask: Callable[[], Any]) -> Any:
        """What `ask` finds in the end. Meanwhile the worker is told to wait, and watched: it has nothing to say."""
        with self._lock:
            self._waiting.add(visit.member)
        try:
            while (found := ask()) is None:
                visit.link.send(Head(kind=Kind.WAIT))
            with self._lock:
                if visit.member not in self._gone:
                    return found
        finally:
            with self._lock:
                self._waiting.discard(visit.member)
        self._right.lost(visit.member)
        raise visit.link.gone()

    def _wrong_with(self, hello: Hello) -> str | None:
        wrong = wrong_with_pace(Pace(every=hello.every, tokens_per_step=hello.tokens_per_step))
        if hello.numel > self._service.most_values:
            wrong = f"a model of {hello.numel} values for a server, where most_values is {self._service.most_values}; raise it"
        return wrong

    def _hung_up(self) -> list[tuple[Member, Link]]:
        with self._lock:
            waiting = [(member, self._links[member]) for member in self._waiting if member in self._links]
        return [(member, link) for member, link in waiting if link.is_hung_up()]

    def _links_in_use(self) -> bool:
        with self._lock:
            return bool(self._links)

    def _lose(self, member: Member, why: str, tell: str = "", kind: Kind = Kind.LOST) -> None:
        with self._lock:
            if member in self._gone or member not in self._links:
                return
            self._gone.add(member)
            link, host = self._links[member], self._hosts[member]
        self._note("left" if why == "left" else "lost", member, host, "" if why == "left" else why)
        if tell:
            link.dismiss(kind, tell)
        elif why != "left":
            link.cut()
        self._right.lost(member)
        with self._own_work():
            self.merger.lost(member)

    def _note(self, what: str, member: Member, host: str, why: str = "") -> None:
        passed_s = time.monotonic() - self._started
        event = Event(round(passed_s, 3), what, member.name, member.incarnation, self.merger.version, host, why)
        self.events.append(event)
        self._heard(event)

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
