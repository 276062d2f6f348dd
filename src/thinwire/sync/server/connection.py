"""A connection between a server and a worker, that breaks alone.

    silent     no byte has moved for `timeout_s`: TimeoutError. A long message over a slow link is not silent.
    gone       the peer, or `hang_up` in another thread, has closed it: ConnectionError, at once

Sockets here never block; whoever has to wait does so in poll, with a limit of its own. No thread waits without one.

Whatever a Connection sends is entered in the ledger as "send". A silent peer delays; one that is silent for longer than
`timeout_s`, in the middle of an exchange or, at a server, between two of them, or that is gone, is a PeerLost. A payload is read
only if it has a size that may come here, and memory for it is taken only as its bytes arrive, unless its size was agreed on.
"""

import contextlib
import errno
import select
import socket
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from thinwire.collectives.clock import HostClock
from thinwire.collectives.ledger import Group, Ledger
from thinwire.errors import UserError
from thinwire.sync.server.message import HEAD_BYTES, TEXT_BYTES, BadMessage, Head, Kind, as_bytes

_HUNG_UP = getattr(select, "POLLRDHUP", 0) | select.POLLHUP | select.POLLERR
CLOCK = HostClock()
PIECE_BYTES = 2**20
TURN_PIECES = 16
"""The most that one turn of reading takes, so that others have theirs."""
LAST_WORD_S = 0.5
"""How long somebody else's sending may delay the news that a life is given up."""

AXIS = "replica"
"""Of what connections send, in the ledger."""

Sizes = Callable[[Head], range | int]
"""How many bytes may come behind this head: a range, or a number that was agreed on. BadMessage if the head may not come at
all."""


class PeerLost(UserError):
    """The connection to `peer` ("server 0 on host0", "worker a on host1") is gone for good."""

    def __init__(self, peer: str, why: str) -> None:
        super().__init__(f"{peer} {why}")
        self.peer = peer


class Connection:
    """One end. Used by one thread; `cut` and `dismiss` may be called by any. peer: name and host."""

    def __init__(self, sock: socket.socket, peer: tuple[str, str], ledger: Ledger, timeout_s: float, advice: str = "") -> None:
        self.sock = sock
        self.name, self.host = peer
        self._place = Group(name="", rank=0, size=2, axis=AXIS)
        self._ledger, self._timeout_s, self._advice = ledger, timeout_s, advice
        self._writing = threading.Lock()
        self._dismissed = ""
        self._coming = bytearray(HEAD_BYTES)
        self._head: Head | None = None
        self._payload = torch.empty(0, dtype=torch.uint8)
        self._filled = 0
        """Of the head, or once that is known of the payload."""
        self.between: Callable[[], None] = lambda: None
        """Called now and then while a long message is being sent."""

    @property
    def peer(self) -> str:
        """Whoever is at the other end, and on which host."""
        return f"{self.name} on {self.host}"

    def send(self, head: Head, payload: Tensor | None = None, label: str = "", head_label: str = "head") -> None:
        """The head, and [n] uint8 behind it. PeerLost."""
        data = torch.empty(0, dtype=torch.uint8) if payload is None else payload.contiguous().view(torch.uint8)
        head = replace(head, payload_bytes=data.numel())
        with self._writing:
            self._send(head.packed(), f"{head_label} to {self.name}")
            if data.numel():
                self._send(data.numpy(), f"{label} to {self.name}")

    def receive(self, sizes: Sizes) -> tuple[Head, Tensor]:
        """The head and its payload, uint8. PeerLost; BadMessage for what may not come."""
        while (found := self.advance(sizes)) is None:
            try:
                wait(self.sock, select.POLLIN, self._timeout_s)
            except OSError as error:
                raise self.lost(error) from None
        return found

    def advance(self, sizes: Sizes) -> tuple[Head, Tensor] | None:
        """Read what has come, without waiting: a message once it is whole. The rest as `receive`."""
        try:
            for _ in range(TURN_PIECES):
                if self._head is None:
                    count = receive_some(self.sock, memoryview(self._coming)[self._filled :])
                    self._filled += count
                    if self._filled == HEAD_BYTES:
                        head, self._filled = Head.unpacked(bytes(self._coming)), 0
                        self._payload, self._head = _memory_for(head, sizes(head)), head
                else:
                    end = min(self._payload.numel(), self._filled + PIECE_BYTES)
                    count = receive_some(self.sock, self._payload[self._filled : end].numpy())
                    self._filled += count
                    if self._filled == self._payload.numel() < self._head.payload_bytes:
                        more = min(self._filled, self._head.payload_bytes - self._filled)
                        self._payload = torch.cat([self._payload, torch.empty(more, dtype=torch.uint8)])
                if self._head is not None and self._filled == self._head.payload_bytes:
                    found = self._head, self._payload
                    self._head, self._filled = None, 0
                    return found
                if not count:
                    return None
        except OSError as error:
            raise self.lost(error) from None
        return None

    def can_be_read(self) -> bool:
        """Something has come, or the connection is closed."""
        return bool(ready([self.sock], 0.0))

    def is_hung_up(self) -> bool:
        """The peer is gone, whatever it has sent before."""
        return bool(ready([self.sock], 0.0, _HUNG_UP))

    def lost(self, error: OSError) -> PeerLost:
        """What to say of it. TimeoutError: the peer has been silent for timeout_s; else: the connection is closed."""
        if self._dismissed:
            return PeerLost(self.peer, f"was dismissed: {self._dismissed}")
        if isinstance(error, TimeoutError):
            return PeerLost(self.peer, f"was silent for {self._timeout_s:g} s; {self._advice}")
        return PeerLost(self.peer, "is gone: its connection is closed; see its own output for why")

    def cut(self) -> None:
        """Break it; whoever waits on it, on either side, gets a PeerLost."""
        hang_up(self.sock)

    def dismiss(self, kind: Kind, text: str) -> None:
        """Tell the peer a last line if that can be done at once, and break the connection."""
        self._dismissed = text
        if self._writing.acquire(timeout=LAST_WORD_S):
            payload = as_bytes(text.encode()[:TEXT_BYTES].decode(errors="ignore"))
            head = replace(Head(kind=kind), payload_bytes=payload.numel())
            with contextlib.suppress(OSError):
                send(self.sock, head.packed() + payload.numpy().tobytes(), LAST_WORD_S)
            self._writing.release()
        self.cut()

    def close(self) -> None:
        """Free it; by the thread that uses it, when nobody else does."""
        with self._writing:
            self.sock.close()

    def _send(self, data: object, label: str) -> None:
        size = memoryview(data).nbytes  # type: ignore[arg-type]
        issued = CLOCK.now()
        with self._ledger.label(label):
            total = self._ledger.enter("send", size, self._place)
        try:
            send(self.sock, data, self._timeout_s, self.between)
        except OSError as error:
            raise self.lost(error) from None
        self._ledger.completed(total, CLOCK, issued)


def only(kind: Kind, most_bytes: int) -> Sizes:
    """The sizes where one kind of message may come, and no other."""

    def sizes(head: Head) -> range:
        if head.kind != kind:
            raise BadMessage(f"{head.kind.name} where {kind.name} was due")
        return range(most_bytes + 1)

    return sizes


def _memory_for(head: Head, allowed: range | int) -> Tensor:
    """Memory for the payload: all of it if its size was agreed on, else for its first piece. BadMessage if it may not be so
    long."""
    size = head.payload_bytes
    if isinstance(allowed, range):
        if size not in allowed:
            raise BadMessage(f"{head.kind.name} of {size} bytes, where {allowed.stop - 1} are the most")
        return torch.empty(min(size, PIECE_BYTES), dtype=torch.uint8)
    if size != allowed:
        raise BadMessage(f"{head.kind.name} of {size} bytes, where {allowed} were due")
    return torch.empty(size, dtype=torch.uint8)


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


def send(sock: socket.socket, data: Any, limit_s: float, between: Callable[[], None] = lambda: None) -> None:
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


def hang_up(sock: socket.socket) -> None:
    """Close it for both sides. Any thread may; one that waits on it is woken. Its number is freed by `close` alone."""
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


def _translated(error: OSError) -> OSError:
    """What the kernel says of a host that vanished is silence; everything else is a closed connection."""
    if error.errno in (errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH):
        return TimeoutError()
    return ConnectionError(str(error))
