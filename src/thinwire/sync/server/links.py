"""A worker's links to its servers: one request to each, one answer from each, and a sign of progress to whoever waits for one.

A server that is asked nothing gives a worker up after `timeout_s` (`members`). So while the worker waits for one server, or a
long message to it is under way, it says PROGRESS to those who have answered already, and reads what others answer; and its loop
says it at each step. At most one goes to each server in `heartbeat_s`. It is sent only to servers that read: never to one that
owes an answer.
"""

import time
from collections.abc import Callable, Mapping
from functools import partial

from torch import Tensor

from thinwire.config.replicas import Service
from thinwire.errors import UserError
from thinwire.sync.server import stream
from thinwire.sync.server.link import Link, PeerLost
from thinwire.sync.server.message import TEXT_BYTES, BadMessage, Head, Kind, as_text

Request = tuple[Head, Tensor | None, str]
"""Head, payload, and the payload's label in the ledger."""


class Links:
    """By server. expected: bytes of the weights that server is to send next."""

    def __init__(self, service: Service, expected: Callable[[int], int]) -> None:
        self._service, self._expected = service, expected
        self._links: dict[int, Link] = {}
        self._idle: set[int] = set()
        self._heard: dict[int, float] = {}
        """When those were heard last who owe an answer."""
        self._left: set[int] = set()
        """Servers that read no more, once they have answered."""
        self._answers: dict[int, tuple[Head, Tensor]] = {}
        self._told = time.monotonic()
        self._busy = False

    def __bool__(self) -> bool:
        return bool(self._links)

    def add(self, index: int, link: Link) -> None:
        """One more server."""
        link.between = self._between
        self._links[index] = link
        self._idle.add(index)
        self._left.discard(index)

    def ask(self, requests: Mapping[int, Request]) -> dict[int, tuple[Head, Tensor]]:
        """Each server's answer. PeerLost; UserError if a server refuses what it was asked. The links are cut then."""
        try:
            self._answers = {}
            for index, (head, payload, label) in requests.items():
                self._idle.discard(index)
                if head.kind == Kind.LEAVE:
                    self._left.add(index)
                self._send(index, partial(self._links[index].send, head, payload, label))
                self._heard[index] = time.monotonic()
            while self._heard:
                self._say_progress()
                self._hear(self._service.heartbeat_s)
            return self._answers
        except BaseException:
            self.cut()
            raise

    def alive(self) -> None:
        """Say PROGRESS, if the last one was `heartbeat_s` ago. PeerLost if a server has given this worker up meanwhile."""
        try:
            self._say_progress()
            for index in list(self._idle):
                if self._links[index].can_be_read():
                    self._advance(index)
        except BaseException:
            self.cut()
            raise

    def cut(self) -> None:
        """Leave without a word, so that nobody waits."""
        for link in self._links.values():
            link.cut()
            link.close()
        for kept in (self._links, self._idle, self._heard):
            kept.clear()

    def _between(self) -> None:
        """While a long message to one server is under way, the others neither wait for a word nor to be read."""
        if not self._busy:
            self._say_progress()
            self._hear(0.0)

    def _say_progress(self) -> None:
        """To each server that reads, at most every `heartbeat_s`."""
        now = time.monotonic()
        if now - self._told < self._service.heartbeat_s:
            return
        self._told, self._busy = now, True
        try:
            for index in list(self._idle):
                self._send(index, partial(self._links[index].send, Head(kind=Kind.PROGRESS), head_label="progress"))
        finally:
            self._busy = False

    def _hear(self, limit_s: float) -> None:
        """Read what comes from those who owe an answer. PeerLost if one is silent for `timeout_s`."""
        by_sock = {self._links[index].sock: index for index in self._heard}
        for sock in stream.ready(list(by_sock), limit_s):
            index = by_sock[sock]
            found = self._advance(index)
            self._heard[index] = time.monotonic()
            if found is not None and found[0].kind != Kind.WAIT:
                self._answers[index] = found
                del self._heard[index]
                if index not in self._left:
                    self._idle.add(index)
        for index, heard in self._heard.items():
            if time.monotonic() - heard > self._service.timeout_s and not self._links[index].can_be_read():
                raise self._links[index].silent()

    def _advance(self, index: int) -> tuple[Head, Tensor] | None:
        """What a server says, once it is whole; what it refuses, and that it gives this worker up, is raised."""
        link = self._links[index]
        try:
            found = link.advance(partial(self._sizes, index))
            if found is not None and found[0].kind == Kind.REFUSED:
                raise UserError(as_text(found[1]))
            if found is not None and found[0].kind == Kind.LOST:
                raise PeerLost(link.peer, f"has given this worker up: {as_text(found[1])}")
        except BadMessage as error:
            raise PeerLost(link.peer, f"sent what no server of this service sends ({error}); start them anew") from None
        return found

    def _sizes(self, index: int, head: Head) -> range | int:
        match head.kind:
            case Kind.STATE | Kind.WAIT:
                return 0
            case Kind.WEIGHTS:
                return self._expected(index)
            case Kind.REFUSED | Kind.LOST:
                return range(TEXT_BYTES + 1)
        raise BadMessage(head.kind.name)

    def _send(self, index: int, send: Callable[[], None]) -> None:
        """A server that hangs up may have said why."""
        try:
            send()
        except PeerLost as error:
            self._idle.discard(index)
            while self._links[index].can_be_read():
                self._advance(index)
            raise error
