"""`thinwire serve`: the store and all servers in one process, for workers that users start themselves, until told to end."""

import signal
import threading
from pathlib import Path

import torch
from torch.distributed import DistError, TCPStore

from thinwire.collectives.ledger import Ledger
from thinwire.config.replicas import Service
from thinwire.errors import UserError
from thinwire.sync.server import saved
from thinwire.sync.server.server import Event, Server, publish
from thinwire.sync.server.weights import load_optimizers


def serve_here(service: Service, listen: str, keep: Path | None) -> None:
    """Until SIGINT or SIGTERM. keep: a folder of server-N.pt. UserError if nobody can listen there."""
    host, colon, port = listen.rpartition(":")
    if not colon or not port.isdigit():
        raise UserError(f"--listen {listen}: write host:port")
    load_optimizers()
    try:
        store = TCPStore(host, int(port), is_master=True, wait_for_workers=False)
    except (DistError, RuntimeError) as error:
        raise UserError(f"--listen {listen}: {str(error).splitlines()[0][:100]}; take another port") from None
    torch.set_num_threads(1)
    publish(store, service)
    end = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: end.set())
    threads = []
    for index in range(service.servers):
        server = Server(service, store, index, Ledger(), heard=_tell)
        kept = keep / f"server-{index}.pt" if keep else None
        if kept is not None:
            kept.parent.mkdir(parents=True, exist_ok=True)
            if kept.is_file():
                server.merger.load_state_dict(saved.load(kept))
        threads.append(threading.Thread(target=server.run, args=(end, kept), name=f"server {index}"))
        threads[-1].start()
    print(f"serving at {host}:{store.port}", flush=True)
    for thread in threads:
        thread.join()


def _tell(event: Event) -> None:
    print(f"{event.line()}\n", end="", flush=True)
