"""How a worker finds its servers: it dials what it was given, and both sides prove that they know the secret.

store is "host:port" of `thinwire serve`, where all servers are behind one address; or one such address for each server, separated
by commas, in the order of servers. Somebody who comes early, or is turned away for the crowd at the door, tries again for
CONNECT_S.
"""

import json
import socket
import time
from pathlib import Path

from thinwire.collectives.ledger import Ledger
from thinwire.config.replicas import Service
from thinwire.errors import UserError
from thinwire.sync.server import secret as secrets
from thinwire.sync.server import stream
from thinwire.sync.server.address import parse
from thinwire.sync.server.link import Link, PeerLost
from thinwire.sync.server.message import NAME_LETTERS, WELCOME_BYTES, BadMessage, Head, Kind, as_text

CONNECT_S = 30.0
"""How long a worker tries to reach a server."""
AGAIN_S = 0.1
ADVICE = "raise timeout_s if its link or its peers may stall for longer"


class Dialer:
    """store: see the top of the file. secret_file: that of the service; None: it is on loopback and has none."""

    def __init__(self, store: str, secret_file: Path | str | None = None) -> None:
        self._places = [parse(one, "store") for one in store.split(",")]
        self._addresses = store.split(",")
        self._secret, self._has_secret = secrets.read_secret(secret_file), secret_file is not None

    def service(self) -> Service:
        """What the servers have agreed on. UserError if there are none."""
        sock, service, _ = self._reached(0)
        sock.close()
        if len(self._places) not in (1, service.servers):
            raise UserError(f"store names {len(self._places)} addresses for {service.servers} servers; give 1, or 1 each")
        return service

    def link(self, index: int, ledger: Ledger) -> Link:
        """A link to server `index`, over which nobody has said HELLO yet."""
        sock, service, host = self._reached(index if len(self._places) > 1 else 0)
        return Link(sock, (f"server {index}", host), ledger, service.timeout_s, ADVICE)

    def _reached(self, place: int) -> tuple[socket.socket, Service, str]:
        """A connection on which the server has said WELCOME, the service, and the server's host."""
        end, address = time.monotonic() + CONNECT_S, self._addresses[place]
        while True:
            try:
                sock = socket.create_connection(self._places[place], timeout=max(AGAIN_S, end - time.monotonic()))
            except (OSError, UnicodeError):
                if time.monotonic() > end:
                    told = f"nobody answered within {CONNECT_S:g} s; is the service running there, and bound to that address?"
                    raise UserError(f"store {address}: {told}") from None
                time.sleep(AGAIN_S)
                continue
            try:
                return self._welcomed(sock, address)
            except (PeerLost, OSError):
                sock.close()
                if time.monotonic() > end:
                    raise UserError(f"store {address}: whoever answers there hangs up; is it a parameter service?") from None
                time.sleep(AGAIN_S)
            except BaseException:
                sock.close()
                raise

    def _welcomed(self, sock: socket.socket, address: str) -> tuple[socket.socket, Service, str]:
        stream.prepare(sock, secrets.HANDSHAKE_S)
        try:
            secrets.introduce(sock, self._secret)
            link = Link(sock, ("server", address), Ledger(), secrets.HANDSHAKE_S, ADVICE)
            _, payload = link.receive(_only_welcome)
            told = json.loads(as_text(payload))
            service, host = Service.model_validate(told["service"]), str(told["host"])[:NAME_LETTERS]
        except secrets.WrongSecret:
            mend = "its secret is not that of secret_file" if self._has_secret else "it asks for a secret; give secret_file"
            raise UserError(f"store {address}: {mend} (thinwire serve --secret-file)") from None
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, PeerLost):
                raise
            raise UserError(f"store {address}: what answers there is no parameter service of this version") from None
        stream.prepare(sock, service.timeout_s)
        return sock, service, host


def _only_welcome(head: Head) -> range:
    if head.kind != Kind.WELCOME:
        raise BadMessage(head.kind.name)
    return range(WELCOME_BYTES + 1)
