"""The listener of a process of servers: one socket, from which each connection goes to the server that it asks for.

    accept        a thread for each connection, with HANDSHAKE_S for all that comes before a worker is known
    challenge     in both directions (`authentication`), before anything that the stranger sends is believed
    WELCOME       what was agreed on
    HELLO         which server it wants, and who it is; from then on the connection is that server's

A stranger's bytes cost the stranger's connection and nobody else anything. At most STRANGERS connections have not said HELLO yet;
beyond that the oldest of them is closed, so that a real worker gets in within a few tries while others only hold connections.

A server binds exactly the address it was given, "host:port" with an IPv6 address in brackets, and no other; a worker connects to
exactly what it was given. Neither tells the other any address, so none has to be guessed: a name that a host knows as 127.0.1.1
is served on 127.0.1.1, and is printed as that.
"""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Mapping

from thinwire import listening
from thinwire.collectives.ledger import Ledger
from thinwire.config.replicas import Service
from thinwire.sync.server.authentication import HANDSHAKE_S, admit
from thinwire.sync.server.connection import Connection, hang_up, only, prepare, ready
from thinwire.sync.server.message import HELLO_BYTES, BadMessage, Head, Hello, Kind, as_bytes
from thinwire.sync.server.server import Server

STRANGERS = 64
POLL_S = 0.1


class Listener:
    """sock: bound and listening; the listener's from now on. servers: by index, those at this address."""

    def __init__(self, sock: socket.socket, secret: bytes, service: Service, servers: Mapping[int, Server]) -> None:
        self._sock, self._secret, self._service, self._servers = sock, secret, service, servers
        sock.setblocking(False)
        agreed = {"service": service.model_dump(mode="json"), "host": socket.gethostname()}
        self._welcome = as_bytes(json.dumps(agreed))
        self._strangers: dict[socket.socket, float] = {}
        self._lock = threading.Lock()

    def run(self, end: threading.Event) -> None:
        """Accept workers until `end` is set."""
        try:
            while not end.is_set():
                if ready([self._sock], POLL_S):
                    self._accept()
        finally:
            self._sock.close()
            with self._lock:
                for sock in self._strangers:
                    hang_up(sock)

    def _accept(self) -> None:
        try:
            sock, _ = self._sock.accept()
        except OSError:  # it has gone again, or this process has no descriptor left: others will close theirs
            time.sleep(0.01)
            return
        try:
            prepare(sock, self._service.timeout_s)
            with self._lock:
                while len(self._strangers) >= STRANGERS:
                    oldest = next(iter(self._strangers))
                    hang_up(oldest)
                    del self._strangers[oldest]
                self._strangers[sock] = time.monotonic()
            threading.Thread(target=self._handle, args=(sock,), name="a stranger", daemon=True).start()
        except (OSError, RuntimeError):  # it has gone again, or there can be no other thread
            self._forget(sock)
            sock.close()

    def _handle(self, sock: socket.socket) -> None:
        """One connection, to its end."""
        with contextlib.closing(sock):
            try:
                hello, server = self._introduced(sock)
            except Exception:  # whatever came or did not come: nobody else is concerned
                return
            finally:
                self._forget(sock)
            server.serve(sock, hello)

    def _introduced(self, sock: socket.socket) -> tuple[Hello, Server]:
        admit(sock, self._secret)
        stranger = Connection(sock, ("a stranger", "no host"), Ledger(), HANDSHAKE_S)
        stranger.send(Head(kind=Kind.WELCOME), self._welcome)
        _, payload = stranger.receive(only(Kind.HELLO, HELLO_BYTES))
        hello = Hello.unpacked(payload)
        server = self._servers.get(hello.server)
        if server is None:
            known = ", ".join(map(str, self._servers))
            stranger.dismiss(Kind.REFUSED, f"server {hello.server} is not at this address, but server {known}")
            raise BadMessage("another server's")
        return hello, server

    def _forget(self, sock: socket.socket) -> None:
        with self._lock:
            self._strangers.pop(sock, None)


def listen(address: str, what: str) -> socket.socket:
    """A socket that listens at "host:port" and nowhere else. UserError if it cannot be."""
    return listening.listen(*listening.parse_address(address, what), f"{what} {address}")


def shown(sock: socket.socket) -> str:
    """Where it listens, as workers write it."""
    return listening.shown(*sock.getsockname()[:2])
