"""Two hosts, plain TCP sockets, standard library only: how long do messages of many senders wait for one link?

`socket_queue.py receive` on one, `socket_queue.py send HOST FILE BYTES SERVICE_S CASE...` on the other; a CASE is a file:
{"name": ..., "arrivals": [seconds since its start, ...]}. All go through one connection, one after the other: a queue in which
the first comes first. A message's waiting is the time from its arrival until its last byte is there, less SERVICE_S (both ends
read the one monotonic clock of this machine). The sender writes {name: [waiting_s, ...], ...} to FILE.
"""

import json
import socket
import sys
import time
from pathlib import Path

from thinwire.bench.peers.socket_transfer import HEAD, PORT, connect

SILENCE_S = 0.5


def receive() -> None:
    """Take messages until one is empty; then answer with the seconds that each took."""
    took_s: list[float] = []
    with socket.create_server((socket.gethostbyname(socket.gethostname()), PORT)) as server:
        server.settimeout(20)
        connection, _ = server.accept()
    with connection, connection.makefile("rb") as stream:
        while True:
            size, arrived_s = HEAD.unpack(stream.read(HEAD.size))
            if not size:
                break
            while size:
                size -= len(stream.read1(min(size, 1 << 16)))
            took_s.append(time.monotonic() - arrived_s)
        connection.sendall(json.dumps(took_s).encode())


def send(host: str, path: str, bytes_each: str, service_s: str, *cases: str) -> None:
    """Offer the arrivals of each case in time, whether or not the link has done with those before."""
    content, shapes = bytes(int(bytes_each)), [json.loads(Path(case).read_text()) for case in cases]
    with connect(host) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(HEAD.pack(len(content), time.monotonic()) + content)  # the window opens
        for shape in shapes:
            time.sleep(SILENCE_S)
            start_s = time.monotonic()
            for offset_s in shape["arrivals"]:
                time.sleep(max(0.0, start_s + offset_s - time.monotonic()))
                connection.sendall(HEAD.pack(len(content), start_s + offset_s) + content)
        connection.sendall(HEAD.pack(0, 0.0))
        connection.shutdown(socket.SHUT_WR)
        with connection.makefile("rb") as stream:
            took_s = json.loads(stream.read())[1:]
    waited = {}
    for shape in shapes:
        own, took_s = took_s[: len(shape["arrivals"])], took_s[len(shape["arrivals"]) :]
        waited[shape["name"]] = [one - float(service_s) for one in own]
    Path(path).write_text(json.dumps(waited))


if __name__ == "__main__":
    {"receive": receive, "send": send}[sys.argv[1]](*sys.argv[2:])
