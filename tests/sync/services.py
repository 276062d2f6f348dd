"""A parameter service in threads of the test's own process, and workers that are threads too."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed import TCPStore

from thinwire.collectives.ledger import Ledger
from thinwire.config.replicas import Service
from thinwire.sync.server.server import Server, publish


@dataclass
class Running:
    """address: of the store. weights(): of all servers."""

    address: str
    servers: list[Server]
    ledgers: list[Ledger]
    store: TCPStore
    failures: list[BaseException] = field(default_factory=list)

    def weights(self) -> torch.Tensor:
        return torch.cat([server.merger.weights.values for server in self.servers])


@contextmanager
def serving(service: Service, state: list[dict] | None = None, **run: Any) -> Iterator[Running]:
    """Servers that serve until the end."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    publish(store, service)
    ledgers = [Ledger() for _ in range(service.servers)]
    servers = [Server(service, store, index, ledger) for index, ledger in enumerate(ledgers)]
    for server, saved in zip(servers, state or [], strict=False):
        server.merger.load_state_dict(saved)
    end = threading.Event()
    threads = [threading.Thread(target=server.run, args=(end,), kwargs=run, daemon=True) for server in servers]
    for thread in threads:
        thread.start()
    try:
        yield Running(f"127.0.0.1:{store.port}", servers, ledgers, store)
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
