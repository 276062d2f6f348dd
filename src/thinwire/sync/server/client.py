"""A worker's side of the whole service: push to every server its range, pull all ranges.

    with ServerClient(dialer, name, values, spans) as client:
        weights = client.weights
        while ...:
            weights = client.push(what, weight=..., local_steps=...)

It says HELLO to server 0, which numbers its life, then to the others; gives the weights to all if server 0 asks it to (`lease`),
or waits until there are some; and pulls.
"""

import socket
from collections.abc import Sequence
from secrets import randbelow
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from thinwire.collectives.ledger import Ledger
from thinwire.config.replicas import DiLoCo
from thinwire.errors import UserError
from thinwire.sync.server.checks import initial_weights_error, pace_error, push_numbers_error
from thinwire.sync.server.coding import Mirror, PushCoder
from thinwire.sync.server.connections import Connections, Request
from thinwire.sync.server.dialer import Dialer
from thinwire.sync.server.flat import Span, cut, extent_of, within
from thinwire.sync.server.merger import Pace
from thinwire.sync.server.message import MOST, NAME_LETTERS, Head, Hello, Kind, name_error, pack_start


class ServerClient:
    """One life of worker `name`. values, spans: its own initial weights, used if the servers have none; float64 values last."""

    def __init__(
        self,
        dialer: Dialer,
        name: str,
        values: Tensor,
        spans: Sequence[Span],
        pace: Pace = Pace(),  # noqa: B008 (frozen)
        ledger: Ledger | None = None,
    ) -> None:
        _refuse(name_error(name) or pace_error(pace.every, pace.tokens_per_step))
        self.name, self.ledger, self._pace = name, ledger or Ledger(), pace
        self.step = self.local_steps = 0
        """Where server 0 says that this worker is, and how many steps it is to make before it pushes; 0: the run is over."""
        self.merged = 0.0
        """Tokens that server 0 has merged."""
        self.weights = values
        self._values, self._spans = values, spans
        self._dialer = dialer
        self.service = dialer.service()
        self._coder = PushCoder(self.service.push)
        self._ranges = cut(values.numel(), self.service.servers)
        self._extents = [extent_of(within(spans, part)) for part in self._ranges]
        self._mirrors = [Mirror(self.service.pull) for _ in self._ranges]
        self.versions = [0] * len(self._ranges)
        """Of the weights it holds, by server."""
        self._parts = [values[part.start : part.stop] for part in self._ranges]
        self._connections = Connections(self.service, self._expected_bytes)

    @property
    def progress(self) -> float:
        """What part of the tokens of the run is merged, 0 where their number was not agreed on."""
        total = self.service.total_tokens
        return min(1.0, self.merged / total) if total else 0.0

    def __enter__(self) -> "ServerClient":
        others = range(1, len(self._ranges))
        try:
            state = self._greet(0, 0)
            number = 0 if state.version >= 0 else self._ask(0, (Head(kind=Kind.BEGIN), None, "")).step
            for index in others:
                self._greet(index, state.local_steps)
            if number:
                model = randbelow(MOST)
                _refuse(initial_weights_error(self._values, self._spans))
                for index in (*others, 0):  # server 0 last: that it has weights means that all do
                    self._ask(index, self._start(index, number, model))
            self._pull()
        except BaseException:
            self._connections.cut()
            raise
        return self

    def push(self, values: Tensor, *, weight: float = 1.0, local_steps: int = 1, learning_rate: float | None = None) -> Tensor:
        """Send [numel] to the servers; returns the weights with which to go on, when it may. PeerLost names a lost server.

        UserError when the run is over, or if the servers refuse it.

        weight: tokens or samples behind it, 0: none. learning_rate: for the server's optimizer; None: its own.
        """
        if not self.local_steps:
            raise UserError(
                f"the {self.service.total_tokens:g} tokens that the servers were to merge are merged; end the loop: "
                "`for step in replica.remaining_steps()` does"
            )
        if not self._connections:
            raise UserError(f"this life of worker {self.name} is over; make another one to go on")
        _refuse(push_numbers_error(weight, local_steps, learning_rate))
        requests: dict[int, Request] = {}
        for index, (part, version) in enumerate(zip(self._ranges, self.versions, strict=True)):
            head = Head(kind=Kind.PUSH, version=version, weight=weight, local_steps=local_steps, learning_rate=learning_rate)
            name, pushed = f"{part.start}:{part.stop}", values[part.start : part.stop]
            requests[index] = head, self._coder.encode(name, pushed, self._extents[index]), "push"
        self._take(self._connections.ask(requests))
        return self.weights

    def alive(self) -> None:
        """Say that the loop is where it should be; cheap, so call it as often as you like. PeerLost if this life was given up.

        Each local step says so too. A worker of which nothing is heard for `timeout_s` is lost.
        """
        if self._connections:
            self._connections.alive()

    def state_dict(self) -> dict[str, Any]:
        """What coding has lost of its pushes so far."""
        return {"servers": len(self._ranges), "coder": self._coder.memory.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Before the first push. UserError if there were another number of servers."""
        if state["servers"] != len(self._ranges):
            raise UserError(f"the worker's state is of {state['servers']} servers, and there are {len(self._ranges)}")
        self._coder.memory.load_state_dict(state["coder"])

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if error is None and self._connections:
            self._connections.ask({index: (Head(kind=Kind.LEAVE), None, "") for index in range(len(self._ranges))})
        self._connections.cut()

    def _greet(self, index: int, incarnation: int) -> Head:
        """HELLO to one server, and its answer."""
        self._connections.add(index, self._dialer.connect(index, self.ledger))
        hello = Hello(
            server=index,
            name=self.name,
            incarnation=incarnation,
            host=socket.gethostname()[:NAME_LETTERS],
            numel=self._extents[index].numel,
            wide=self._extents[index].wide,
            every=self._pace.every,
            tokens_per_step=float(self._pace.tokens_per_step),
        )
        return self._ask(index, (Head(kind=Kind.HELLO), hello.packed(), "hello"))

    def _ask(self, index: int, request: Request) -> Head:
        return self._connections.ask({index: request})[index][0]

    def _pull(self) -> None:
        """All ranges, of one version where servers make versions in step; one that cannot reach it any more keeps its own."""
        behind, version = list(range(len(self._ranges))), 0
        while behind:
            before = [self.versions[index] for index in behind]
            self._take(self._connections.ask({index: (Head(kind=Kind.PULL, version=version), None, "") for index in behind}))
            if version and before == [self.versions[index] for index in behind]:
                return
            version = max(self.versions)
            in_step = isinstance(self.service.merge, DiLoCo)
            behind = [index for index, at in enumerate(self.versions) if at < version and in_step]

    def _expected_bytes(self, index: int) -> int:
        return self._mirrors[index].expected_bytes(self._extents[index])

    def _start(self, index: int, number: int, model: int) -> Request:
        part = self._ranges[index]
        spans = within(self._spans, part)
        head = Head(kind=Kind.INIT, step=number, version=model, local_steps=len(spans))
        return head, pack_start(self._values[part.start : part.stop], spans), "start"

    def _take(self, answers: dict[int, tuple[Head, Tensor]]) -> None:
        for index, (head, payload) in answers.items():
            self.versions[index] = head.version
            self._parts[index] = self._mirrors[index].decode(payload, self._extents[index])
        if 0 in answers:
            first = answers[0][0]
            self.step, self.local_steps, self.merged = first.step, first.local_steps, first.merged
        self.weights = torch.cat(self._parts)


def _refuse(error: str | None) -> None:
    if error:
        raise UserError(error)
