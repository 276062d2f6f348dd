"""A worker's links to its servers: one request to each, one answer from each, and a sign of progress to whoever waits for one.

A server that is asked nothing gives a worker up after `timeout_s` (`members`). So while the worker waits for one server, or a
long message to it is under way, it says PROGRESS to those who have answered already; and its loop says it at each step. At most
one goes to each server in `heartbeat_s`. It is sent only to servers that read: never to one that owes an answer.
"""

import select
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
        self._told = time.monotonic()
        self._telling = False

    def __bool__(self) -> bool:
        return bool(self._links)

    def add(self, index: int, link: Link) -> None:
        """One more server."""
        link.between = self.say_progress
        self._links[index] = link
        self._idle.add(index)

    def ask(self, requests: Mapping[int, Request]) -> dict[int, tuple[Head, Tensor]]:
        """Each server's answer. PeerLost; UserError if a server refuses what it was asked. The links are cut then."""
        try:
            for index, (head, payload, label) in requests.items():
                self._idle.discard(index)
                self._send(index, partial(self._links[index].send, head, payload, label))
            return self._answers(set(requests))
        except BaseException:
            self.cut()
            raise

    def alive(self) -> None:
        """Say PROGRESS, if the last one was `heartbeat_s` ago. PeerLost if a server has given this worker up meanwhile."""
        try:
            self.say_progress()
            for index in list(self._idle):
                if self._links[index].can_be_read():
                    self._receive(index)
        except BaseException:
            self.cut()
            raise

    def say_progress(self) -> None:
        """To each server that reads, at most every `heartbeat_s`."""
        now = time.monotonic()
        if self._telling or now - self._told < self._service.heartbeat_s:
            return
        self._told, self._telling = now, True
        try:
            for index in list(self._idle):
                self._send(index, partial(self._links[index].send, Head(kind=Kind.PROGRESS), head_label="progress"))
        finally:
            self._telling = False

    def cut(self) -> None:
        """Leave without a word, so that nobody waits."""
        for link in self._links.values():
            link.cut()
            link.close()
        self._links.clear()
        self._idle.clear()

    def _answers(self, pending: set[int]) -> dict[int, tuple[Head, Tensor]]:
        answers = {}
        heard = dict.fromkeys(pending, time.monotonic())
        while pending:
            self.say_progress()
            by_sock = {self._links[index].sock: index for index in pending}
            for sock in stream.ready(list(by_sock), self._service.heartbeat_s, select.POLLIN):
                index = by_sock[sock]
                found = self._receive(index)
                heard[index] = time.monotonic()
                if found[0].kind != Kind.WAIT:
                    answers[index] = found
                    pending.discard(index)
                    self._idle.add(index)
            silent = [index for index in pending if time.monotonic() - heard[index] > self._service.timeout_s]
            if silent:
                raise self._links[silent[0]].silent()
        return answers

    def _receive(self, index: int) -> tuple[Head, Tensor]:
        """What a server says; what it refuses, and that it gives this worker up, is raised."""
        link = self._links[index]
        try:
            head, payload = link.receive(partial(self._sizes, index))
            if head.kind == Kind.REFUSED:
                raise UserError(as_text(payload))
            if head.kind == Kind.LOST:
                raise PeerLost(link.peer, f"has given this worker up: {as_text(payload)}")
        except BadMessage as error:
            raise PeerLost(link.peer, f"sent what no server of this service sends ({error}); start them anew") from None
        return head, payload

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
                self._receive(index)
            raise error
