"""A worker's connections to its servers: one request to each, one answer from each, and signs of progress to those who wait.

A server that is asked nothing gives a worker up after `timeout_s` (`merger`). So while the worker waits for one server, or a
long message to it is under way, it sends PROGRESS to those who have answered already, and reads what others answer; and its loop
sends it at each step. At most one goes to each server in `heartbeat_s`. It is sent only to servers that read: never to one that
has not answered yet.
"""

import time
from collections.abc import Callable, Mapping
from functools import partial

from torch import Tensor

from thinwire.config.replicas import Service
from thinwire.errors import UserError
from thinwire.sync.server.connection import Connection, PeerLost, ready
from thinwire.sync.server.message import TEXT_BYTES, BadMessage, Head, Kind, as_text

Request = tuple[Head, Tensor | None, str]
"""Head, payload, and the payload's label in the ledger."""


class Connections:
    """By server. expected: bytes of the weights that server is to send next."""

    def __init__(self, service: Service, expected: Callable[[int], int]) -> None:
        self._service, self._expected = service, expected
        self._connections: dict[int, Connection] = {}
        self._idle: set[int] = set()
        self._heard: dict[int, float] = {}
        """When those who have not answered yet were heard last."""
        self._left: set[int] = set()
        """Servers that read no more, once they have answered."""
        self._answers: dict[int, tuple[Head, Tensor]] = {}
        self._last_progress = time.monotonic()
        self._sending_progress = False

    def __bool__(self) -> bool:
        return bool(self._connections)

    def add(self, index: int, connection: Connection) -> None:
        """One more server."""
        connection.between = self._between
        self._connections[index] = connection
        self._idle.add(index)
        self._left.discard(index)

    def ask(self, requests: Mapping[int, Request]) -> dict[int, tuple[Head, Tensor]]:
        """Each server's answer. PeerLost; UserError if a server refuses what it was asked. The connections are cut then."""
        try:
            self._answers = {}
            for index, (head, payload, label) in requests.items():
                self._idle.discard(index)
                if head.kind == Kind.LEAVE:
                    self._left.add(index)
                self._send(index, head, payload, label)
                self._heard[index] = time.monotonic()
            while self._heard:
                self._send_progress()
                self._read_answers(self._service.heartbeat_s)
            return self._answers
        except BaseException:
            self.cut()
            raise

    def alive(self) -> None:
        """Send PROGRESS, if the last one was `heartbeat_s` ago. PeerLost if a server has given this worker up meanwhile."""
        try:
            self._send_progress()
            for index in list(self._idle):
                if self._connections[index].can_be_read():
                    self._advance(index)
        except BaseException:
            self.cut()
            raise

    def cut(self) -> None:
        """Leave without a word, so that nobody waits."""
        for connection in self._connections.values():
            connection.cut()
            connection.close()
        for kept in (self._connections, self._idle, self._heard):
            kept.clear()

    def _between(self) -> None:
        """While a long message to one server is under way, the others neither wait for a word nor to be read."""
        if not self._sending_progress:
            self._send_progress()
            self._read_answers(0.0)

    def _send_progress(self) -> None:
        """To each server that reads, at most every `heartbeat_s`."""
        now = time.monotonic()
        if now - self._last_progress < self._service.heartbeat_s:
            return
        self._last_progress, self._sending_progress = now, True
        try:
            for index in list(self._idle):
                self._send(index, Head(kind=Kind.PROGRESS), head_label="progress")
        finally:
            self._sending_progress = False

    def _read_answers(self, limit_s: float) -> None:
        """Read what comes from those who have not answered yet. PeerLost if one is silent for `timeout_s`."""
        by_sock = {self._connections[index].sock: index for index in self._heard}
        for sock in ready(list(by_sock), limit_s):
            index = by_sock[sock]
            found = self._advance(index)
            self._heard[index] = time.monotonic()
            if found is not None and found[0].kind != Kind.WAIT:
                self._answers[index] = found
                del self._heard[index]
                if index not in self._left:
                    self._idle.add(index)
        for index, heard in self._heard.items():
            if time.monotonic() - heard > self._service.timeout_s and not self._connections[index].can_be_read():
                raise self._connections[index].lost(TimeoutError())

    def _advance(self, index: int) -> tuple[Head, Tensor] | None:
        """A server's message, once it is whole; what it refuses, and that it gives this worker up, is raised."""
        connection = self._connections[index]
        try:
            found = connection.advance(partial(self._sizes, index))
            if found is not None and found[0].kind == Kind.REFUSED:
                raise UserError(as_text(found[1]))
            if found is not None and found[0].kind == Kind.LOST:
                raise PeerLost(connection.peer, f"has given this worker up: {as_text(found[1])}")
        except BadMessage as error:
            raise PeerLost(connection.peer, f"sent what no server of this service sends ({error}); start them anew") from None
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

    def _send(self, index: int, head: Head, payload: Tensor | None = None, label: str = "", head_label: str = "head") -> None:
        """A server that hangs up may have said why."""
        try:
            self._connections[index].send(head, payload, label, head_label)
        except PeerLost as error:
            self._idle.discard(index)
            while self._connections[index].can_be_read():
                self._advance(index)
            raise error
