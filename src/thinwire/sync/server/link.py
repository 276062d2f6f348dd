"""A link: one connection between a server and a worker, that breaks alone.

Whatever is sent over it is entered in the ledger as "send". A silent peer delays; one that is silent for longer than `timeout_s`,
in the middle of an exchange or, at a server, between two of them, or whose connection is closed, is a PeerLost. A long payload
over a slow link is not taken for silence (`stream`). A payload is read only if it has a size that may come here, and memory for
it is taken only as its bytes arrive, unless its size was agreed on.
"""

import contextlib
import select
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from thinwire.collectives.ledger import Group, Ledger
from thinwire.errors import UserError
from thinwire.sync.server import stream
from thinwire.sync.server.message import HEAD_BYTES, TEXT_BYTES, BadMessage, Head, Kind, as_bytes

PIECE_BYTES = 2**20
TURN_PIECES = 16
"""The most that one turn of reading takes, so that others have theirs."""
LAST_WORD_S = 0.5
"""How long somebody else's sending may delay the news that a life is given up."""

AXIS = "replica"
"""Of what links send, in the ledger."""

Sizes = Callable[[Head], range | int]
"""How many bytes may come behind this head: a range, or a number that was agreed on. BadMessage if the head may not come at
all."""


class PeerLost(UserError):
    """The link to `peer` ("server 0 on host0", "worker a on host1") is gone for good."""

    def __init__(self, peer: str, why: str) -> None:
        super().__init__(f"{peer} {why}")
        self.peer = peer


class Link:
    """One end. Used by one thread; `cut` and `dismiss` may be called by any. peer: name and host."""

    def __init__(self, sock: socket.socket, peer: tuple[str, str], ledger: Ledger, timeout_s: float, advice: str = "") -> None:
        self.sock = sock
        self._name, self._host = peer
        self._place = Group(name="", rank=0, size=2, axis=AXIS)
        self._ledger, self._timeout_s, self._advice = ledger, timeout_s, advice
        self._writing = threading.Lock()
        self._dismissed = ""
        self._coming = bytearray(HEAD_BYTES)
        self._head: Head | None = None
        self._payload = torch.empty(0, dtype=torch.uint8)
        self._filled = 0
        """Of the head, or once that is known of the payload."""
        self.between: Callable[[], None] = stream.nothing
        """Called now and then while a long message is being sent."""

    @property
    def peer(self) -> str:
        """Whoever is at the other end, and on which host."""
        return f"{self._name} on {self._host}"

    def send(self, head: Head, payload: Tensor | None = None, label: str = "", head_label: str = "head") -> None:
        """The head, and [n] uint8 or float32 behind it. PeerLost."""
        data = torch.empty(0, dtype=torch.uint8) if payload is None else payload.contiguous().view(torch.uint8)
        head = replace(head, payload_bytes=data.numel())
        with self._writing:
            self._send(head.packed(), f"{head_label} to {self._name}")
            if data.numel():
                self._send(data.numpy(), f"{label} to {self._name}")

    def receive(self, sizes: Sizes, limit_s: float | None = None) -> tuple[Head, Tensor]:
        """The head and its payload, uint8. PeerLost; BadMessage for what may not come. limit_s: of silence, instead of
        timeout_s."""
        while (found := self.advance(sizes)) is None:
            try:
                stream.wait(self.sock, select.POLLIN, self._timeout_s if limit_s is None else limit_s)
            except OSError as error:
                raise self._lost(error) from None
        return found

    def advance(self, sizes: Sizes) -> tuple[Head, Tensor] | None:
        """Read what has come, without waiting: a message once it is whole. The rest as `receive`."""
        try:
            for _ in range(TURN_PIECES):
                if self._head is None:
                    count = stream.receive_some(self.sock, memoryview(self._coming)[self._filled :])
                    self._filled += count
                    if self._filled == HEAD_BYTES:
                        head, self._filled = Head.unpacked(bytes(self._coming)), 0
                        self._payload, self._head = _room(head, sizes(head)), head
                else:
                    end = min(self._payload.numel(), self._filled + PIECE_BYTES)
                    count = stream.receive_some(self.sock, self._payload[self._filled : end].numpy())
                    self._filled += count
                    if self._filled == self._payload.numel() < self._head.payload_bytes:
                        self._payload = _larger(self._payload, self._head.payload_bytes)
                if self._head is not None and self._filled == self._head.payload_bytes:
                    found = self._head, self._payload
                    self._head, self._filled = None, 0
                    return found
                if not count:
                    return None
        except OSError as error:
            raise self._lost(error) from None
        return None

    def can_be_read(self) -> bool:
        """Something has come, or the connection is closed."""
        return bool(stream.ready([self.sock], 0.0))

    def is_hung_up(self) -> bool:
        """The peer is gone, whatever it has sent before."""
        return stream.is_hung_up(self.sock)

    def gone(self) -> PeerLost:
        """What to say of a connection that is closed."""
        return self._lost(ConnectionError())

    def silent(self) -> PeerLost:
        """What to say of a peer that has said nothing for timeout_s."""
        return self._lost(TimeoutError())

    def cut(self) -> None:
        """Break the link; whoever waits on it, on either side, gets a PeerLost."""
        stream.hang_up(self.sock)

    def dismiss(self, kind: Kind, text: str) -> None:
        """Tell the peer a last line if that can be done at once, and break the link."""
        self._dismissed = text
        if self._writing.acquire(timeout=LAST_WORD_S):
            payload = as_bytes(text.encode()[:TEXT_BYTES].decode(errors="ignore"))
            head = replace(Head(kind=kind), payload_bytes=payload.numel())
            with contextlib.suppress(OSError):
                stream.send(self.sock, head.packed() + payload.numpy().tobytes(), LAST_WORD_S)
            self._writing.release()
        self.cut()

    def close(self) -> None:
        """Free it; by the thread that uses it, when nobody else does."""
        with self._writing:
            self.sock.close()

    def _send(self, data: object, label: str) -> None:
        size = memoryview(data).nbytes  # type: ignore[arg-type]
        issued = time.perf_counter()
        with self._ledger.label(label):
            total = self._ledger.enter("send", size, self._place)
        try:
            stream.send(self.sock, data, self._timeout_s, self.between)
        except OSError as error:
            raise self._lost(error) from None
        self._ledger.completed(total, issued)

    def _lost(self, error: OSError) -> PeerLost:
        if self._dismissed:
            return PeerLost(self.peer, f"was dismissed: {self._dismissed}")
        if isinstance(error, TimeoutError):
            return PeerLost(self.peer, f"was silent for {self._timeout_s:g} s; {self._advice}")
        return PeerLost(self.peer, "is gone: its connection is closed; see its own output for why")


def _room(head: Head, allowed: range | int) -> Tensor:
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


def _larger(payload: Tensor, size: int) -> Tensor:
    """Memory for twice as much as has come, and for no more than all."""
    larger = torch.empty(min(size, 2 * payload.numel()), dtype=torch.uint8)
    larger[: payload.numel()] = payload
    return larger
