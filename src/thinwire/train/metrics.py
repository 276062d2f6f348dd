"""What a rank is doing, or a server, for Prometheus: a tiny HTTP endpoint on loopback that looks when it is asked.

    thinwire_step{rank="0"} 41
    thinwire_sent_bytes_total{rank="0",axis="data",op="all_reduce"} 123456
    thinwire_collective_seconds_total{rank="0",axis="data",op="all_reduce"} 1.25      from issuing to completion
    thinwire_calls_total{rank="0",axis="data",op="all_reduce"} 84

    thinwire_server_version{server="0"} 12                                            and so on, of `thinwire serve`

Text format 0.0.4 of Prometheus. Whoever scrapes from another machine tunnels: nothing listens on a network.
"""

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from thinwire.collectives.ledger import Ledger
from thinwire.errors import UserError
from thinwire.listening import LOOPBACK
from thinwire.sync.server.server import Server

HELP = {
    "thinwire_step": ("gauge", "The step that is under way; -1 before the first."),
    "thinwire_sent_bytes_total": ("counter", "Payload that this rank has sent."),
    "thinwire_collective_seconds_total": ("counter", "Seconds from issuing calls to their completion; calls may overlap."),
    "thinwire_calls_total": ("counter", "Collectives and messages that this rank has issued."),
}

SERVER_HELP = {
    "thinwire_server_version": ("gauge", "Merges, or steps of the optimizer, made so far."),
    "thinwire_server_merged_tokens_total": ("counter", "Tokens in them."),
    "thinwire_server_workers": ("gauge", "Workers that are joined."),
    "thinwire_server_waiting": ("gauge", "Of these, how many wait for others."),
    "thinwire_server_lost_total": ("counter", "Workers that were given up, or hung up."),
    "thinwire_server_received_bytes_total": ("counter", "What workers have sent."),
    "thinwire_server_sent_bytes_total": ("counter", "What they were sent."),
}


def exposition(ledger: Ledger, rank: int) -> str:
    """All metrics of one rank as text."""
    sums = defaultdict[str, dict[str, float]](lambda: defaultdict(float))
    sums["thinwire_step"][f'rank="{rank}"'] = ledger.step
    for call, total in ledger.snapshot().items():
        labels = f'rank="{rank}",axis="{call.axis}",op="{call.op}"'
        sums["thinwire_sent_bytes_total"][labels] += total.wire_bytes
        sums["thinwire_collective_seconds_total"][labels] += total.seconds
        sums["thinwire_calls_total"][labels] += total.calls
    return _text(HELP, sums)


def server_exposition(servers: Sequence[Server]) -> str:
    """All metrics of the servers of one process as text."""
    values: dict[str, dict[str, float]] = {name: {} for name in SERVER_HELP}
    for number, server in enumerate(servers):
        for name, value in server.measures().items():
            values[f"thinwire_server_{name}"][f'server="{number}"'] = value
    return _text(SERVER_HELP, values)


def _text(described: Mapping[str, tuple[str, str]], values: Mapping[str, Mapping[str, float]]) -> str:
    lines = []
    for name, (kind, text) in described.items():
        lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
        lines += [f"{name}{{{labels}}} {value:.17g}" for labels, value in values[name].items()]
    return "\n".join(lines) + "\n"


@contextmanager
def metrics_served(text_now: Callable[[], str], port: int, who: str) -> Iterator[int]:
    """Inside, http://127.0.0.1:port/metrics answers. port 0: a free one. Gives the port. UserError, of `who`, if it is taken."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            text = text_now().encode() if self.path in ("/", "/metrics") else b""
            self.send_response(200 if text else 404)
            self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, format: str, *arguments: object) -> None:
            """Nobody needs to read of each scrape."""

    try:
        server = ThreadingHTTPServer((LOOPBACK, port), Handler)
    except OSError as error:
        raise UserError(f"{who} cannot listen on {LOOPBACK}:{port}: {error.strerror}") from None
    thread = threading.Thread(target=server.serve_forever, name="thinwire-metrics", daemon=True)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
