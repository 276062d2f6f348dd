"""Flows and round trips over plain TCP sockets, one thread a host. No torch.

A flow lasts for a time, not for a number of bytes, so that slow and fast links take equally long. The receiver notes
when how much had arrived. Its reads empty the socket, so a receiver that was kept from its core for a moment sees the
true amount when it comes back.
"""

import select
import socket
import time
from dataclasses import dataclass

from thinwire.errors import UserError

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


def listen(master_address: str) -> socket.socket:
    """A listening socket on a free port of all interfaces, of the family in which the master is reached."""
    family, _ = _resolve(master_address, 0)
    return socket.create_server(("", 0), family=family, backlog=16)


def address_towards(address: str, port: int) -> str:
    """This machine's own address on the way to another one. Sends nothing."""
    family, where = _resolve(address, port)
    with socket.socket(family, socket.SOCK_DGRAM) as line:
        try:
            line.connect(where)
        except OSError as error:
            raise UserError(f"{socket.gethostname()} has no way to {address}:{port}: {error}") from None
        return str(line.getsockname()[0])


def is_loopback(address: str) -> bool:
    """True for an address that reaches this machine only."""
    return address == "::1" or address.startswith("127.")


def _resolve(address: str, port: int) -> tuple[socket.AddressFamily, tuple]:
    """IPv4 where there is one, so that all hosts choose alike."""
    try:
        known = socket.getaddrinfo(address, port, type=socket.SOCK_DGRAM)
    except OSError as error:
        raise UserError(f"{socket.gethostname()} does not know the host {address!r}: {error}") from None
    family, _, _, _, where = min(known, key=lambda entry: entry[0] != socket.AF_INET)
    return family, where


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
