"""The door of a process of servers: one socket that listens where it was told, behind which its servers are.

    accept        a thread for each connection, with HANDSHAKE_S for all that comes before a worker is known
    challenge     both ways (`secret`), before anything of the stranger's is believed
    WELCOME       what was agreed on
    HELLO         which server it wants, and who it is; from then on the connection is that server's

A stranger's bytes cost him his connection and nobody else anything. At most STRANGERS connections are not known yet; beyond that
the oldest of them is closed, so whoever means it is let in within a few tries while others only hold the line.
"""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Mapping

from thinwire.collectives.ledger import Ledger
from thinwire.config.replicas import Service
from thinwire.sync.server import secret as secrets
from thinwire.sync.server import stream
from thinwire.sync.server.link import Link
from thinwire.sync.server.message import HELLO_BYTES, BadMessage, Head, Hello, Kind, as_bytes
from thinwire.sync.server.server import Server

STRANGERS = 64
POLL_S = 0.1


class Door:
    """listener: bound and listening; the door's from now on. servers: by index, those that are behind it."""

    def __init__(self, listener: socket.socket, secret: bytes, service: Service, servers: Mapping[int, Server]) -> None:
        self._listener, self._secret, self._service, self._servers = listener, secret, service, servers
        listener.setblocking(False)
        told = {"service": service.model_dump(mode="json"), "host": socket.gethostname()}
        self._welcome = as_bytes(json.dumps(told))
        self._strangers: dict[socket.socket, float] = {}
        self._lock = threading.Lock()

    def run(self, end: threading.Event) -> None:
        """Let workers in until `end` is set."""
        try:
            while not end.is_set():
                if stream.ready([self._listener], POLL_S):
                    self._accept()
        finally:
            self._listener.close()
            with self._lock:
                for sock in self._strangers:
                    stream.hang_up(sock)

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError:  # it has gone again, or this process has no descriptor left: others will close theirs
            time.sleep(0.01)
            return
        try:
            stream.prepare(sock, self._service.timeout_s)
            with self._lock:
                while len(self._strangers) >= STRANGERS:
                    oldest = next(iter(self._strangers))
                    stream.hang_up(oldest)
                    del self._strangers[oldest]
                self._strangers[sock] = time.monotonic()
            threading.Thread(target=self._meet, args=(sock,), name="a stranger", daemon=True).start()
        except (OSError, RuntimeError):  # it has gone again, or there can be no other thread
            self._forget(sock)
            sock.close()

    def _meet(self, sock: socket.socket) -> None:
        """One connection, to its end."""
        with contextlib.closing(sock):
            try:
                hello, server, link = self._introduced(sock)
            except Exception:  # whatever he said or did not say: nobody else is concerned
                return
            finally:
                self._forget(sock)
            server.meet(link, hello)
            link.close()

    def _introduced(self, sock: socket.socket) -> tuple[Hello, Server, Link]:
        secrets.admit(sock, self._secret)
        stranger = Link(sock, ("a stranger", "no host"), Ledger(), secrets.HANDSHAKE_S)
        stranger.send(Head(kind=Kind.WELCOME), self._welcome)
        head, payload = stranger.receive(_only_hello)
        assert head.kind == Kind.HELLO
        hello = Hello.unpacked(payload)
        server = self._servers.get(hello.server)
        if server is None:
            known = ", ".join(map(str, self._servers))
            stranger.dismiss(Kind.REFUSED, f"server {hello.server} is not at this address, but server {known}")
            raise BadMessage("another server's")
        return hello, server, server.link(sock, hello)

    def _forget(self, sock: socket.socket) -> None:
        with self._lock:
            self._strangers.pop(sock, None)


def _only_hello(head: Head) -> range:
    if head.kind != Kind.HELLO:
        raise BadMessage(f"{head.kind.name} before HELLO")
    return range(HELLO_BYTES + 1)
