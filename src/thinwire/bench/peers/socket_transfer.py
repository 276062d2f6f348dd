"""Two hosts, plain TCP sockets, standard library only: how long does a message take after one second of silence?

`socket_transfer.py receive` on one, `socket_transfer.py send HOST FILE SIZE...` on the other. The receiver answers each
message with the seconds from the sender's clock reading to the last byte (both read the one monotonic clock of this
machine). The sender writes {"seconds": [...], "congestion": [sender's, receiver's]} to FILE.
"""

import json
import socket
import struct
import sys
import time
from pathlib import Path

PORT = 5201
SILENCE_S = 1.0
HEAD = struct.Struct("!qd")


def receive() -> None:
    """Take messages; answer each with the seconds since its first byte was sent."""
    with socket.create_server((socket.gethostbyname(socket.gethostname()), PORT)) as server:
        server.settimeout(20)
        connection, _ = server.accept()
    with connection, connection.makefile("rb") as stream:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(congestion(connection).ljust(16).encode())
        while head := stream.read(HEAD.size):
            size, started = HEAD.unpack(head)
            while size:
                size -= len(stream.read1(min(size, 1 << 16)))
            connection.sendall(struct.pack("!d", time.monotonic() - started))


def send(host: str, path: str, *sizes: str) -> None:
    """Seconds of each message, from its first byte until the last one has arrived."""
    seconds: list[float] = []
    with connect(host) as connection, connection.makefile("rb") as stream:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        names = [congestion(connection), stream.read(16).decode().strip()]
        for size in map(int, sizes):
            time.sleep(SILENCE_S)
            connection.sendall(HEAD.pack(size, time.monotonic()) + bytes(size))
            seconds.append(struct.unpack("!d", stream.read(8))[0])
    Path(path).write_text(json.dumps({"seconds": seconds, "congestion": names}))


def connect(host: str) -> socket.socket:
    """Tries until the receiver listens."""
    for _ in range(200):
        try:
            return socket.create_connection((host, PORT), timeout=600)
        except ConnectionRefusedError:
            time.sleep(0.02)
    sys.exit(f"{host} does not listen on port {PORT}")


def congestion(connection: socket.socket) -> str:
    """Name of the congestion control that the kernel uses here."""
    return connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0").decode()


if __name__ == "__main__":
    {"receive": receive, "send": send}[sys.argv[1]](*sys.argv[2:])
