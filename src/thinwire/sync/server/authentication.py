"""Authentication: worker and server prove to each other that they know the service's secret, before anything else is read.

    server -> worker    32 random bytes and a mark       worker -> server    their HMAC under the secret
    server -> worker    welcome, or the end
                        and the same in the other direction, so that a worker knows that it found its own servers

This is `multiprocessing.connection`'s challenge; nothing is ever unpickled. The server answers no challenge of a peer that has
not answered its own. On loopback a service may go without a secret: the key is OPEN then, known to everybody, and turns away only
who speaks something else. What follows is neither encrypted nor signed: whoever can change packets on the way is not kept out by
this.
"""

import multiprocessing
import select
import socket
import time
from multiprocessing.connection import answer_challenge, deliver_challenge
from pathlib import Path
from typing import Any

from thinwire.errors import UserError
from thinwire.sync.server.connection import receive_some, send, wait

OPEN = b"thinwire: no secret"
CHALLENGE = b"#CHALLENGE#"
"""With this a challenge begins, in every version of Python."""
LEAST_BYTES = 16
HANDSHAKE_S = 10.0
"""For a challenge in both directions, and for all that comes before HELLO."""


class WrongSecret(UserError):
    """The other side knows another secret."""


def read_secret(path: Path | str | None) -> bytes:
    """What is in the file, without white space around it; OPEN without a file. UserError if it is short."""
    if path is None:
        return OPEN
    try:
        secret = Path(path).read_bytes().strip()
    except OSError as error:
        raise UserError(f"secret file {path}: {error.strerror}; make one: head -c 32 /dev/urandom | base64 > {path}") from None
    if len(secret) < LEAST_BYTES:
        raise UserError(
            f"secret file {path} has {len(secret)} bytes, which can be guessed; {LEAST_BYTES} are needed: "
            f"head -c 32 /dev/urandom | base64 > {path}"
        )
    return secret


def admit(sock: socket.socket, secret: bytes) -> None:
    """The server's side. Any exception: the peer is to be turned away."""
    handshake: Any = Handshake(sock, HANDSHAKE_S)
    deliver_challenge(handshake, secret)
    answer_challenge(handshake, secret)


def introduce(sock: socket.socket, secret: bytes) -> None:
    """The worker's side. WrongSecret; OSError if the peer hangs up or is silent; ValueError if it speaks something else."""
    handshake: Any = Handshake(sock, HANDSHAKE_S)
    try:
        answer_challenge(handshake, secret)
        deliver_challenge(handshake, secret)
    except (multiprocessing.AuthenticationError, AssertionError):
        if not handshake.first_message.startswith(CHALLENGE):
            raise ValueError("no challenge came") from None
        raise WrongSecret("its secret is another") from None


class Handshake:
    """What `multiprocessing.connection` asks of a connection to challenge it, within a time limit for all of it together.

    A length of 4 bytes, big-endian, then as many bytes.
    """

    def __init__(self, sock: socket.socket, limit_s: float) -> None:
        self._sock, self._end = sock, time.monotonic() + limit_s
        self.first_message = b""

    def send_bytes(self, data: bytes) -> None:
        send(self._sock, len(data).to_bytes(4, "big") + data, self._left_s())

    def recv_bytes(self, most_bytes: int) -> bytes:
        """One message. ConnectionError if it is longer than most_bytes."""
        size = int.from_bytes(self._exactly(4), "big")
        if size > most_bytes:
            raise ConnectionError(f"a challenge of {size} bytes")
        data = self._exactly(size)
        self.first_message = self.first_message or data
        return data

    def _exactly(self, size: int) -> bytes:
        data = bytearray(size)
        view = memoryview(data)
        while view:
            wait(self._sock, select.POLLIN, self._left_s())
            view = view[receive_some(self._sock, view) :]
        return bytes(data)

    def _left_s(self) -> float:
        left_s = self._end - time.monotonic()
        if left_s <= 0:
            raise TimeoutError
        return left_s
