"""Flows and round trips between hosts over plain TCP sockets, in rounds: every host calls the same methods with the same rounds.

A flow lasts for a time, not for a number of bytes, so that slow and fast links take equally long. The receiver notes
when how much had arrived. Its reads empty the socket, so a receiver that was kept from its core for a moment sees the
true amount when it comes back. One thread a host. No torch.
"""

import gc
import select
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from thinwire.cluster import FRAME_OVERHEAD
from thinwire.errors import UserError
from thinwire.measure.fit import mean_bps, steady_bps
from thinwire.measure.rounds import Flow, Round

CHUNK_BYTES = 256 * 1024
UNSENT_BYTES = 128 * 1024
"""Kept in the sender's socket beyond what is on its way: what lies there when a flow ends delays the next round."""
CONNECT_S = 10.0
PATIENCE_S = 15.0
FIRST_TRIPS = 3


@dataclass(frozen=True, slots=True)
class Peer:
    """Where a host listens."""

    host: str
    address: str
    port: int


@contextmanager
def _no_collection() -> Iterator[None]:
    """Meanwhile Python collects no garbage: with torch loaded that takes 0.1 s and more, in which a receiver reads nothing."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@_no_collection()
def round_trips(listener: socket.socket, to: Peer | None, count: int, limit_s: float) -> list[float]:
    """Seconds of up to `count` round trips of one byte to `to`; without `to`, answer one caller until it has done.

    After `limit_s` no new trip begins, but at least three are made.
    """
    if to is None:
        with _accept(listener) as caller:
            while byte := caller.recv(1):
                caller.sendall(byte)
        return []
    seconds: list[float] = []
    with _connect(to) as line:
        begun = time.perf_counter()
        for trip in range(FIRST_TRIPS + count):
            started = time.perf_counter()
            line.sendall(b"?")
            if not line.recv(1):
                raise UserError(f"{to.host} closed the connection in the middle of the probe")
            if trip >= FIRST_TRIPS:
                seconds.append(time.perf_counter() - started)
            if len(seconds) >= 3 and time.perf_counter() - begun > limit_s:
                break
    return seconds


@_no_collection()
def flow(listener: socket.socket, to: Peer | None, expects: bool, seconds: float) -> list[tuple[float, int]]:
    """Send to `to` for `seconds` and receive from one caller until it ends, both at once, either optional.

    Returns (seconds since the call, bytes until then) for each read.
    """
    sender = _connect(to) if to else None
    receiver: socket.socket | None = None
    arrivals: list[tuple[float, int]] = []
    data, buffer, received = memoryview(bytes(CHUNK_BYTES)), bytearray(4 * CHUNK_BYTES), 0
    started = time.perf_counter()
    try:
        if sender:
            sender.setblocking(False)
        listener.settimeout(PATIENCE_S)
        while sender or expects:
            now = time.perf_counter() - started
            if sender and now >= seconds:
                sender.close()
                sender = None
                continue
            wait_s = seconds - now if sender else seconds + PATIENCE_S - now
            source = receiver or listener
            readable, writable, _ = select.select([source] if expects else [], [sender] if sender else [], [], max(0.0, wait_s))
            if not readable and not writable and not sender:
                raise UserError(f"{socket.gethostname()} waited {PATIENCE_S:g} s for a flow of the probe that never ended")
            if readable and receiver is None:
                receiver = _accept(listener)
            elif readable and receiver is not None:
                count = receiver.recv_into(buffer)
                received += count
                arrivals.append((time.perf_counter() - started, received))
                expects = count > 0
            if writable and sender:
                sender.send(data)
    finally:
        for line in (sender, receiver):
            if line:
                line.close()
    return arrivals


def _connect(to: Peer) -> socket.socket:
    try:
        line = socket.create_connection((to.address, to.port), timeout=CONNECT_S)
    except OSError as error:
        raise UserError(
            f"{socket.gethostname()} cannot reach {to.host} at {to.address}:{to.port}: {error}; "
            "the probe needs TCP between all hosts, on any port"
        ) from None
    line.settimeout(PATIENCE_S)
    line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if hasattr(socket, "TCP_NOTSENT_LOWAT"):
        line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)
    return line


def _accept(listener: socket.socket) -> socket.socket:
    listener.settimeout(PATIENCE_S)
    try:
        line, _ = listener.accept()
    except TimeoutError:
        raise UserError(f"{socket.gethostname()} waited {PATIENCE_S:g} s for another host of the probe to call") from None
    line.settimeout(PATIENCE_S)
    line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return line


SKIP = 0.35
"""Of a flow's time: slow start, and the bytes that a token bucket lets pass at once."""
TRIPS = 24
TRIPS_LIMIT_S = 0.25


@dataclass(frozen=True, slots=True)
class Sample:
    """Line rates of one flow of one round: payload times FRAME_OVERHEAD."""

    round: int
    flow: Flow
    steady_bps: float
    mean_bps: float


class Links:
    """The connections between hosts, seen from one process. me: index of its host; None for a process that only takes part in
    the barriers.

    gather(value) -> the values of all processes, on all of them; barrier() -> when all have called it.
    """

    def __init__(
        self,
        peers: Sequence[Peer],
        me: int | None,
        listener: socket.socket,
        gather: Callable[[Any], list[Any]],
        barrier: Callable[[], None],
    ) -> None:
        self._peers, self._me, self._listener = peers, me, listener
        self._gather, self._barrier = gather, barrier

    def stream(self, rounds: Sequence[Round], seconds: float) -> list[Sample]:
        """Run the rounds, `seconds` each; all samples on every process. Collective."""
        mine = []
        for index, flows in enumerate(rounds):
            to, caller = self._part(flows)
            self._barrier()
            if to is None and caller is None:
                continue
            with self._named(to, caller) as peer:
                arrivals = flow(self._listener, peer, caller is not None, seconds)
            if caller is not None and self._me is not None:
                mean = mean_bps(arrivals, SKIP * seconds, seconds)
                steady = steady_bps(arrivals, SKIP * seconds, seconds)
                mine.append(Sample(index, (caller, self._me), (steady or mean) * FRAME_OVERHEAD, mean * FRAME_OVERHEAD))
        return [sample for samples in self._gather(mine) for sample in samples]

    def trips(self, rounds: Sequence[Round]) -> dict[Flow, list[float]]:
        """Half of each round trip in seconds, by pair, on every process. Collective."""
        mine = []
        for flows in rounds:
            to, caller = self._part(flows)
            self._barrier()
            if to is not None or caller is not None:
                with self._named(to, caller) as peer:
                    seconds = round_trips(self._listener, peer, TRIPS, TRIPS_LIMIT_S)
                if to is not None and self._me is not None:
                    mine.append(((self._me, to), [0.5 * trip for trip in seconds]))
        return {pair: halves for found in self._gather(mine) for pair, halves in found}

    @contextmanager
    def _named(self, to: int | None, caller: int | None) -> Iterator[Peer | None]:
        """The peer to send to; an error meanwhile names the other hosts."""
        try:
            yield None if to is None else self._peers[to]
        except OSError as error:
            others = " or ".join(self._peers[host].host for host in (to, caller) if host is not None)
            problem = f"the line to {others} broke in the middle of the probe: {error}; is its process still there?"
            raise UserError(problem) from None

    def _part(self, flows: Round) -> tuple[int | None, int | None]:
        """(to whom this host sends, who sends to it)"""
        to = next((target for source, target in flows if source == self._me), None)
        caller = next((source for source, target in flows if target == self._me), None)
        return to, caller
