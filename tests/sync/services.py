"""A parameter service in threads of the test's own process, and workers that are threads too."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from thinwire.collectives.ledger import Ledger
from thinwire.config.replicas import Service
from thinwire.errors import UserError
from thinwire.sync.server.authentication import read_secret
from thinwire.sync.server.connection import Connection
from thinwire.sync.server.dialer import Dialer
from thinwire.sync.server.listener import Listener, listen, shown
from thinwire.sync.server.message import Head, Hello, Kind, as_text
from thinwire.sync.server.server import Server
from thinwire.sync.server.snapshots import Snapshots


@dataclass
class Running:
    """address: where workers find it. weights(): of all servers. failures: what a server or the listener died of."""

    address: str
    servers: list[Server]
    ledgers: list[Ledger]
    failures: list[BaseException] = field(default_factory=list)

    def weights(self) -> torch.Tensor:
        return torch.cat([server.merger.weights.values for server in self.servers])


@contextmanager
def serving(
    service: Service, state: list[dict] | None = None, keep: Path | None = None, every: int = 1, secret: Path | None = None
) -> Iterator[Running]:
    """Servers that serve until the end."""
    ledgers = [Ledger() for _ in range(service.servers)]
    shelves = [Snapshots(keep, index, service, every) if keep else None for index in range(service.servers)]
    servers = [Server(service, index, ledger, snapshots=shelves[index]) for index, ledger in enumerate(ledgers)]
    for server, saved in zip(servers, state or [], strict=False):
        server.load_state_dict(saved)
    end, listener = threading.Event(), listen("127.0.0.1:0", "--bind")
    running = Running(shown(listener), servers, ledgers)
    accepting = Listener(listener, read_secret(secret), service, dict(enumerate(servers)))

    def run(function: Callable[[threading.Event], None]) -> None:
        try:
            function(end)
        except BaseException as error:
            running.failures.append(error)

    functions = [accepting.run, *(server.run for server in servers)]
    threads = [threading.Thread(target=run, args=(function,), daemon=True) for function in functions]
    for thread in threads:
        thread.start()
    try:
        yield running
    finally:
        end.set()
        for thread in threads:
            thread.join(10)


def wait_for(condition: Callable[[], object], limit_s: float = 20) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


def together(*functions: Callable[[], Any], timeout_s: float = 30) -> list[Any]:
    """Call all at once, each in a thread of its own; their results. The first failure is raised."""
    results: dict[int, Any] = {}
    failures: list[BaseException] = []

    def call(index: int, function: Callable[[], Any]) -> None:
        try:
            results[index] = function()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=call, args=pair, daemon=True) for pair in enumerate(functions)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout_s)
    if failures:
        raise failures[0]
    assert len(results) == len(functions), "a worker hangs"
    return [results[index] for index in range(len(functions))]


def any_answer(head: Head) -> range:
    return range(2**30)


def greeted(address: str, name: str, numel: int, secret: Path | None = None, **others: Any) -> Connection:
    """A worker by hand, which has said HELLO and heard the answer; its user closes it. numel: of its range."""
    link = Dialer(address, secret).connect(0, Ledger())
    fields = {"server": 0, "incarnation": 0, "host": "by-hand", "every": 0, "tokens_per_step": 1.0} | others
    link.send(Head(kind=Kind.HELLO), Hello(name=name, numel=numel, **fields).packed())
    head, payload = link.receive(any_answer)
    if head.kind != Kind.STATE:
        link.close()
        raise UserError(as_text(payload))
    return link


def answer(link: Connection) -> tuple[Head, torch.Tensor]:
    """What comes after all the WAITs."""
    while (found := link.receive(any_answer))[0].kind == Kind.WAIT:
        pass
    return found
