"""How a worker finds its servers: it connects to the addresses it was given, and both sides prove that they know the secret.

store is "host:port" of `thinwire serve`, where all servers are behind one address; or one such address for each server, separated
by commas, in the order of servers. A worker that comes early, or is turned away because too many strangers are connected, tries
again for CONNECT_S.
"""

import json
import socket
import time
from pathlib import Path

from thinwire.collectives.ledger import Ledger
from thinwire.config.replicas import Service
from thinwire.errors import UserError
from thinwire.listening import parse_address
from thinwire.sync.server.authentication import HANDSHAKE_S, WrongSecret, introduce, read_secret
from thinwire.sync.server.connection import Connection, PeerLost, only, prepare
from thinwire.sync.server.message import NAME_LETTERS, WELCOME_BYTES, Kind, as_text

CONNECT_S = 30.0
"""How long a worker tries to reach a server."""
AGAIN_S = 0.1
ADVICE = "raise timeout_s if its link or its peers may stall for longer"


class Dialer:
    """store: see the top of the file. secret_file: that of the service; None: it is on loopback and has none."""

    def __init__(self, store: str, secret_file: Path | str | None = None) -> None:
        self._places = [parse_address(one, "store") for one in store.split(",")]
        self._addresses = store.split(",")
        self._secret, self._has_secret = read_secret(secret_file), secret_file is not None

    def service(self) -> Service:
        """What the servers have agreed on. UserError if there are none."""
        sock, service, _ = self._connect(0)
        sock.close()
        if len(self._places) not in (1, service.servers):
            raise UserError(f"store names {len(self._places)} addresses for {service.servers} servers; give 1, or 1 each")
        return service

    def connect(self, index: int, ledger: Ledger) -> Connection:
        """A connection to server `index`, over which no HELLO has been sent yet."""
        sock, service, host = self._connect(index if len(self._places) > 1 else 0)
        return Connection(sock, (f"server {index}", host), ledger, service.timeout_s, ADVICE)

    def _connect(self, place: int) -> tuple[socket.socket, Service, str]:
        """A connection on which the server has said WELCOME, the service, and the server's host."""
        end, address = time.monotonic() + CONNECT_S, self._addresses[place]
        while True:
            try:
                sock = socket.create_connection(self._places[place], timeout=max(AGAIN_S, end - time.monotonic()))
            except (OSError, UnicodeError):
                if time.monotonic() > end:
                    raise UserError(
                        f"store {address}: nobody answered within {CONNECT_S:g} s; is the service running there, and bound to "
                        "that address?"
                    ) from None
                time.sleep(AGAIN_S)
                continue
            try:
                return self._handshake(sock, address)
            except (PeerLost, OSError):
                sock.close()
                if time.monotonic() > end:
                    raise UserError(f"store {address}: whoever answers there hangs up; is it a parameter service?") from None
                time.sleep(AGAIN_S)
            except BaseException:
                sock.close()
                raise

    def _handshake(self, sock: socket.socket, address: str) -> tuple[socket.socket, Service, str]:
        prepare(sock, HANDSHAKE_S)
        try:
            introduce(sock, self._secret)
            connection = Connection(sock, ("server", address), Ledger(), HANDSHAKE_S, ADVICE)
            _, payload = connection.receive(only(Kind.WELCOME, WELCOME_BYTES))
            welcome = json.loads(as_text(payload))
            service, host = Service.model_validate(welcome["service"]), str(welcome["host"])[:NAME_LETTERS]
        except WrongSecret:
            mend = "its secret is not that of secret_file" if self._has_secret else "it asks for a secret; give secret_file"
            raise UserError(f"store {address}: {mend} (thinwire serve --secret-file)") from None
        except PeerLost:
            raise
        except (ValueError, KeyError, TypeError):
            raise UserError(f"store {address}: what answers there is no parameter service of this version") from None
        prepare(sock, service.timeout_s)
        return sock, service, host
