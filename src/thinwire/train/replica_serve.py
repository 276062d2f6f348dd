"""`thinwire serve`: all servers in one process, behind one socket, for workers that users start themselves, until told to end.

It listens where it is told and nowhere else. Beyond loopback it asks for a secret, and does not start without one. When a server,
or the listener of all, dies for a reason of its own, all end, what they hold is kept, and so says one line.
"""

import signal
import socket
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch

from thinwire.collectives.ledger import Ledger
from thinwire.config.replicas import Service
from thinwire.errors import UserError
from thinwire.listening import is_loopback, parse_address
from thinwire.sync.server.authentication import read_secret
from thinwire.sync.server.listener import Listener, listen, shown
from thinwire.sync.server.server import Event, Server
from thinwire.sync.server.snapshots import Snapshots, choose_versions
from thinwire.sync.server.weights import load_optimizers
from thinwire.train.metrics import metrics_served, server_exposition

SERVER_DIED = 3


def serve_here(service: Service, bind: str, keep: Path | None, secret_file: Path | None, metrics_port: int = 0) -> int:
    """Until SIGINT or SIGTERM; returns the exit code. keep: a folder of server-N.pt. metrics_port: on loopback; 0: none.
    UserError if it cannot be there, or not safely."""
    secret = read_secret(secret_file)
    listener = listen(bind, "--bind")
    if secret_file is None and not is_loopback(listener.getsockname()[0]):
        listener.close()
        raise UserError(
            f"--bind {bind}: others reach that, so give a --secret-file, and the same to the workers; make one: "
            "head -c 32 /dev/urandom | base64 > secret"
        )
    servers = _servers(service, keep)
    load_optimizers()
    torch.set_num_threads(1)
    end = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: end.set())
    accepting = Listener(listener, secret, service, dict(enumerate(servers)))
    parts = {"the listener": accepting.run} | {f"server {index}": server.run for index, server in enumerate(servers)}
    with ExitStack() as stack:
        if metrics_port:
            stack.enter_context(metrics_served(partial(server_exposition, servers), metrics_port, "--metrics-port: the server"))
        print(f"serving at {shown(listener)}{_hint(bind, listener)}", flush=True)
        return run_all(parts, end)


def run_all(parts: Mapping[str, Callable[[threading.Event], None]], end: threading.Event) -> int:
    """Each in a thread until `end`; if one dies, all end: a line, and SERVER_DIED."""
    died: list[str] = []

    def run(name: str, part: Callable[[threading.Event], None]) -> None:
        try:
            part(end)
        except BaseException as error:
            died.append(f"{name} died of {type(error).__name__}: {' '.join(str(error).split())[:200]}")
            end.set()

    threads = [threading.Thread(target=run, args=pair, name=pair[0]) for pair in parts.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if died:
        print(f"thinwire: error: {died[0]}; what was kept before is sound, go on from it", file=sys.stderr, flush=True)
    return SERVER_DIED if died else 0


def _servers(service: Service, keep: Path | None) -> list[Server]:
    if keep is None:
        return [Server(service, index, Ledger(), on_event=_tell) for index in range(service.servers)]
    versions, servers = choose_versions(keep, service), []
    for index in range(service.servers):
        kept = Snapshots(keep, index, service)
        servers.append(Server(service, index, Ledger(), on_event=_tell, snapshots=kept))
        if versions:
            servers[-1].load_state_dict(kept.load(versions[index]))
    return servers


def _hint(bind: str, listener: socket.socket) -> str:
    """For who has named this machine and may not know that its name is a loopback address here."""
    host, _ = parse_address(bind, "--bind")
    if not is_loopback(listener.getsockname()[0]) or host == "localhost" or host[0].isdigit() or ":" in host:
        return ""
    return f" alone, which is {host} here and which no other machine can reach; bind an address that `ip address` shows for them"


def _tell(event: Event) -> None:
    print(f"{event.line()}\n", end="", flush=True)
