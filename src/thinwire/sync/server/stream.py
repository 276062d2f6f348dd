"""Bytes over a connected socket that breaks alone, for as long as its peer says something.

    silent     no byte has moved for `limit_s`: TimeoutError. A long message over a slow link is not silent.
    gone       the peer, or `hang_up` in another thread, has closed it: ConnectionError, at once

Sockets here never block; whoever has to wait does so in poll, with a limit of its own. No thread waits without one.
"""

import contextlib
import errno
import select
import socket
import time
from collections.abc import Callable
from typing import Any

_HUNG_UP = getattr(select, "POLLRDHUP", 0) | select.POLLHUP | select.POLLERR


def nothing() -> None:
    """For nobody who has to be told while somebody waits."""


def prepare(sock: socket.socket, silent_s: float) -> None:
    """Small messages go at once; a host that vanishes without a word is noticed by the kernel after `silent_s`."""
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_USER_TIMEOUT", max(1, int(1000 * silent_s))),
        ("TCP_KEEPIDLE", max(1, int(silent_s / 4))),
        ("TCP_KEEPINTVL", max(1, int(silent_s / 4))),
        ("TCP_KEEPCNT", 4),
    ):
        if hasattr(socket, name):
            with contextlib.suppress(OSError):  # above what this kernel takes; its own limits hold then
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def send(sock: socket.socket, data: Any, limit_s: float, between: Callable[[], None] = nothing) -> None:
    """All of a buffer of bytes. between: called whenever there was something to wait for."""
    view = memoryview(data)
    while view:
        try:
            view = view[sock.send(view) :]
        except BlockingIOError:
            wait(sock, select.POLLOUT, limit_s)
            between()
        except OSError as error:
            raise _translated(error) from None


def receive(sock: socket.socket, into: Any, limit_s: float) -> None:
    """As many bytes as the buffer has."""
    view = memoryview(into)
    while view:
        count = receive_some(sock, view)
        if not count:
            wait(sock, select.POLLIN, limit_s)
        view = view[count:]


def receive_some(sock: socket.socket, into: Any) -> int:
    """What has come, and no more than the buffer has: the number of bytes, 0 if there are none yet."""
    try:
        count = sock.recv_into(into)
    except BlockingIOError:
        return 0
    except OSError as error:
        raise _translated(error) from None
    if not count:
        raise ConnectionError("the connection is closed")
    return count


def wait(sock: socket.socket, event: int, limit_s: float) -> None:
    """Until it can be read or written, or is closed."""
    if not ready([sock], limit_s, event):
        raise TimeoutError


def ready(socks: list[socket.socket], limit_s: float, event: int = select.POLLIN) -> list[socket.socket]:
    """Those that can be read or written, or are closed; none after `limit_s`."""
    poll, by_number = select.poll(), {}
    for sock in socks:
        number = sock.fileno()
        if number < 0:
            return [sock]
        by_number[number] = sock
        poll.register(number, event)
    return [by_number[number] for number, _ in poll.poll(1000 * max(0.0, limit_s))]


def is_hung_up(sock: socket.socket) -> bool:
    """The peer has closed it, whatever is still to be read; or it is broken."""
    number = sock.fileno()
    if number < 0:
        return True
    poll = select.poll()
    poll.register(number, _HUNG_UP)
    return bool(poll.poll(0))


def hang_up(sock: socket.socket) -> None:
    """Close it for both sides. Any thread may; one that waits on it is woken. Its number is freed by `close` alone."""
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


class Talk:
    """What `multiprocessing.connection` asks of a connection to challenge it, within a time limit for all of it together.

    A length of 4 bytes, big-endian, then as many bytes.
    """

    def __init__(self, sock: socket.socket, limit_s: float) -> None:
        self._sock, self._end = sock, time.monotonic() + limit_s
        self.heard = b""
        """The first message that came."""

    def send_bytes(self, data: bytes) -> None:
        """One message."""
        send(self._sock, len(data).to_bytes(4, "big") + data, self._left_s())

    def recv_bytes(self, most_bytes: int) -> bytes:
        """One message. ConnectionError if it is longer than most_bytes."""
        size = int.from_bytes(self._exactly(4), "big")
        if size > most_bytes:
            raise ConnectionError(f"a challenge of {size} bytes")
        data = self._exactly(size)
        self.heard = self.heard or data
        return data

    def _exactly(self, size: int) -> bytes:
        data = bytearray(size)
        view = memoryview(data)
        for first in range(size):  # byte by byte, so that the limit is that of all together
            receive(self._sock, view[first : first + 1], self._left_s())
        return bytes(data)

    def _left_s(self) -> float:
        left_s = self._end - time.monotonic()
        if left_s <= 0:
            raise TimeoutError
        return left_s


def _translated(error: OSError) -> OSError:
    """What the kernel says of a host that vanished is silence; everything else is a closed connection."""
    if error.errno in (errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH):
        return TimeoutError()
    return ConnectionError(str(error))
