"""A link: a gloo group of two, one server and one worker, that breaks alone.

A group of all would die with any member. So each pair has its own, met in the store under the worker's incarnation: a worker that
comes back makes a new one. Whatever is sent is entered in the ledger as "send".

A silent peer delays; one that is silent in the middle of an exchange for longer than `timeout_s`, or whose connection is closed,
is a PeerLost. Payloads go in pieces, so that a long one over a slow link is not taken for silence.
"""

import contextlib
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from thinwire.collectives.ledger import Group, Ledger
from thinwire.errors import UserError
from thinwire.sync.server.members import host_of
from thinwire.sync.server.message import HEAD_BYTES, Head
from thinwire.sync.server.polled import Polled

PIECE_BYTES = 4 * 2**20
PATIENT_S = 30 * 24 * 3600.0
"""How long to wait for a peer that may be busy; whoever watches its heartbeat cuts the link."""

AXIS = "replica"
"""Of what links send, in the ledger."""

_CUT_TAG = 7


class PeerLost(UserError):
    """The link to `peer` ("server 0 on host0", "worker a on host1") is gone for good."""

    def __init__(self, peer: str, why: str) -> None:
        super().__init__(f"{peer} {why}")
        self.peer = peer


class Dialer:
    """Makes the links of one process. store: of the whole service; address: "host:port" of it."""

    def __init__(self, store: Any, ledger: Ledger, timeout_s: float) -> None:
        self._store, self._ledger, self._timeout_s = store, ledger, timeout_s
        self._device = dist.ProcessGroupGloo.create_device(hostname=_address_towards(store.host, store.port))

    def link(self, server: int, worker: str, incarnation: int, *, serving: bool) -> "Link":
        """The link between two members, seen from one of them; waits for the other side. PeerLost if it does not come."""
        peer = f"worker {worker}" if serving else f"server {server}"
        gloo: Any = dist.ProcessGroupGloo  # torch's type stubs leave most of it out
        options = gloo._Options()
        options._devices, options._timeout, options._threads = [self._device], timedelta(seconds=self._timeout_s), 1
        store = Polled(dist.PrefixStore(f"pair/{server}/{worker}/{incarnation}", self._store), self._timeout_s)
        rank = 0 if serving else 1
        try:
            group = gloo(store, rank, 2, options)
        except (dist.DistError, RuntimeError):
            raise PeerLost(peer, f"did not come to the link within {self._timeout_s:g} s; look at its own output") from None
        kind, name = ("worker", worker) if serving else ("server", str(server))
        return Link(group, rank, (peer, host_of(self._store, kind, name)), self._ledger, self._timeout_s)


class Link:
    """One end. Used by one thread; `cut` may be called by any. peer: name and host. received_bytes: heads and payloads."""

    def __init__(self, group: Any, rank: int, peer: tuple[str, str], ledger: Ledger, timeout_s: float) -> None:
        self._group, self._other = group, 1 - rank
        self._place = Group(name="", rank=rank, size=2, axis=AXIS)
        self.peer, self._host = peer
        self._ledger, self._timeout_s = ledger, timeout_s
        self.sent_bytes = self.received_bytes = 0

    def send(self, head: Head, payload: Tensor | None = None, label: str = "") -> None:
        """The head, and [n] uint8 or float32 behind it. PeerLost."""
        data = torch.empty(0, dtype=torch.uint8) if payload is None else payload.contiguous().view(torch.uint8)
        head = replace(head, payload_bytes=data.numel())
        self._send(torch.frombuffer(bytearray(head.packed()), dtype=torch.uint8), f"head to {self.peer}")
        if data.numel():
            self._send(data, f"{label} to {self.peer}")

    def receive(self, *, patient: bool = False) -> tuple[Head, Tensor]:
        """The head and its payload, uint8. patient: the peer may think for as long as it lives. PeerLost."""
        raw = torch.empty(HEAD_BYTES, dtype=torch.uint8)
        self._wait(partial(self._group.recv, [raw], self._other, 0), PATIENT_S if patient else self._timeout_s)
        head = Head.unpacked(raw.numpy().tobytes())
        payload = torch.empty(head.payload_bytes, dtype=torch.uint8)
        for first in range(0, head.payload_bytes, PIECE_BYTES):
            piece = payload[first : first + PIECE_BYTES]
            self._wait(partial(self._group.recv, [piece], self._other, 0), self._timeout_s)
        self.received_bytes += HEAD_BYTES + head.payload_bytes
        return head, payload

    def cut(self) -> None:
        """Break the link; whoever waits on it, on either side, gets a PeerLost."""
        # gloo wakes nobody when it is told to abort. A wait that runs out of time closes the pair, and that wakes all.
        with contextlib.suppress(RuntimeError):
            self._group.recv([torch.empty(1)], self._other, _CUT_TAG).wait(timedelta(milliseconds=1))

    def _send(self, data: Tensor, label: str) -> None:
        issued = time.perf_counter()
        with self._ledger.label(label):
            total = self._ledger.enter("send", data.numel(), self._place)
        for first in range(0, data.numel(), PIECE_BYTES):
            piece = data[first : first + PIECE_BYTES]
            self._wait(partial(self._group.send, [piece], self._other, 0), self._timeout_s)
        self._ledger.completed(total, issued)
        self.sent_bytes += data.numel()

    def _wait(self, issue: Callable[[], dist.Work], limit_s: float) -> None:
        try:
            issue().wait(timedelta(seconds=limit_s))
        except RuntimeError as error:
            if "timed out" in str(error).lower():
                why = f"was silent for {limit_s:g} s; raise timeout_s if its link or its peers may stall for longer"
            else:
                why = "is gone: its connection is closed; see its own output for why"
            raise PeerLost(f"{self.peer} on {self._host}", why) from None


def _address_towards(host: str, port: int) -> str:
    """The address of this machine on the way to `host`."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # connecting a datagram socket sends nothing
        probe.connect((host, port))
        address: str = probe.getsockname()[0]
    return address
