"""A worker's side of all its links: push to every server its range, pull all ranges.

    with ServerClient(address, name, values, spans) as client:
        weights = client.weights
        while ...:
            weights = client.push(what, weight=..., local_steps=...)

It joins the store under a new incarnation, says HELLO to every server, gives the weights to those that have none, and pulls.
"""

from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from thinwire.collectives.ledger import Ledger
from thinwire.config.replicas import Service
from thinwire.errors import UserError
from thinwire.sync.server.coding import Mirror, PushCoder
from thinwire.sync.server.link import Dialer, Link
from thinwire.sync.server.members import Membership, connect
from thinwire.sync.server.merger import Pace
from thinwire.sync.server.message import Head, Kind
from thinwire.sync.server.polled import Polled
from thinwire.sync.server.ranges import Range, Span, cut, within
from thinwire.sync.server.server import SERVICE_KEY, pack_start

CONNECT_S = 30.0
"""How long a worker looks for the store and for what the servers have agreed on."""


class ServerClient:
    """One life of worker `name`. values, spans: its own initial weights, used if the servers have none."""

    def __init__(
        self,
        address: str,
        name: str,
        values: Tensor,
        spans: Sequence[Span],
        pace: Pace = Pace(),  # noqa: B008 (frozen)
        ledger: Ledger | None = None,
    ) -> None:
        self.name, self.ledger, self._pace = name, ledger or Ledger(), pace
        self.step = self.local_steps = 0
        """Where server 0 says that this worker is, and how many steps it is to make before it pushes; 0: the run is over."""
        self.merged = 0.0
        """Tokens that server 0 has merged."""
        self.weights = values
        self._values, self._spans = values, spans
        self._store = connect(address, CONNECT_S)
        self.service = _agreed(self._store, address)
        self._coder = PushCoder(self.service.push)
        self._ranges: list[Range] = cut(values.numel(), self.service.servers)
        self._mirrors = [Mirror(self.service.pull) for _ in self._ranges]
        self._versions = [0] * len(self._ranges)
        self._links: list[Link] = []
        self._membership: Membership | None = None

    @property
    def versions(self) -> list[int]:
        """Of the weights it holds, by server."""
        return list(self._versions)

    @property
    def progress(self) -> float:
        """What part of the tokens of the run is merged, 0 where their number was not agreed on."""
        total = self.service.total_tokens
        return min(1.0, self.merged / total) if total else 0.0

    def __enter__(self) -> "ServerClient":
        service = self.service
        self._membership = Membership(self._store, "worker", self.name, service.heartbeat_s)
        try:
            incarnation = self._membership.member.incarnation
            dialer = Dialer(self._store, self.ledger, service.timeout_s)
            for index in range(service.servers):
                self._links.append(dialer.link(index, self.name, incarnation, serving=False))
            hello = Head(kind=Kind.HELLO, local_steps=self._pace.every, weight=self._pace.tokens_per_step)
            states = self._ask([(hello, None)] * service.servers)
            for link, part, (head, _) in zip(self._links, self._ranges, states, strict=True):
                if head.version < 0:
                    spans = within(self._spans, part)
                    payload = pack_start(self._values[part.first : part.end], spans)
                    link.send(Head(kind=Kind.INIT, local_steps=len(spans)), payload, label="start")
                    link.receive()
            self._take(self._ask([(Head(kind=Kind.PULL), None)] * service.servers))
        except BaseException:
            self._break()
            raise
        return self

    def push(self, values: Tensor, *, weight: float = 1.0, local_steps: int = 1, learning_rate: float = 0.0) -> Tensor:
        """Send [numel] to the servers; returns the weights with which to go on, when it may. PeerLost names a lost server.

        UserError when the run is over.

        weight: tokens or samples behind it. learning_rate: for the server's optimizer; 0: its own.
        """
        if not self.local_steps:
            raise UserError(
                f"the {self.service.total_tokens:g} tokens that the servers were to merge are merged; end the loop: "
                "`for step in replica.remaining_steps()` does"
            )
        requests: list[tuple[Head, Tensor | None]] = []
        for part, version in zip(self._ranges, self._versions, strict=True):
            head = Head(kind=Kind.PUSH, version=version, weight=weight, local_steps=local_steps, learning_rate=learning_rate)
            requests.append((head, self._coder.encode(f"{part.first}:{part.end}", values[part.first : part.end])))
        self._take(self._ask(requests))
        return self.weights

    def state_dict(self) -> dict[str, Any]:
        """What coding has lost of its pushes so far."""
        return {"servers": len(self._ranges), "coder": self._coder.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Before the first push. UserError if there were another number of servers."""
        if state["servers"] != len(self._ranges):
            raise UserError(f"the worker's state is of {state['servers']} servers, and there are {len(self._ranges)}")
        self._coder.load_state_dict(state["coder"])

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if error is not None:
            self._break()
            return
        assert self._membership is not None
        self._ask([(Head(kind=Kind.LEAVE), None)] * len(self._links))
        self._membership.leave()
        self._links = []

    def _ask(self, requests: Sequence[tuple[Head, Tensor | None]]) -> list[tuple[Head, Tensor]]:
        """One request to each server, then one answer from each."""
        for link, (head, payload) in zip(self._links, requests, strict=True):
            link.send(head, payload, label="push")
        return [_answer(link) for link in self._links]

    def _take(self, answers: Sequence[tuple[Head, Tensor]]) -> None:
        parts = []
        for index, (head, payload) in enumerate(answers):
            self._versions[index] = head.version
            parts.append(self._mirrors[index].decode(payload, self._ranges[index].numel))
        first = answers[0][0]
        self.step, self.local_steps, self.merged = first.step, first.local_steps, first.merged
        self.weights = torch.cat(parts)

    def _break(self) -> None:
        """Leave as one who has died, so that nobody waits."""
        if self._membership is not None:
            self._membership.stop()
        for link in self._links:
            link.cut()
        self._links = []


def _answer(link: Link) -> tuple[Head, Tensor]:
    """What the server says once it does not let us wait any more."""
    while (found := link.receive())[0].kind == Kind.WAIT:
        pass
    return found


def _agreed(store: Any, address: str) -> Service:
    """What the servers have published."""
    try:
        told = Polled(store, CONNECT_S).get(SERVICE_KEY)
    except RuntimeError:
        raise UserError(f"store {address} knows of no parameter service after {CONNECT_S:g} s; start its servers") from None
    return Service.model_validate_json(told)
