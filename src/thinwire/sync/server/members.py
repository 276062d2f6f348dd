"""Who is there: membership in a store that outlives its members.

    join        an incarnation, 1 for the first life of this name, and a heartbeat: a counter that goes up every `heartbeat_s`
    leave       the counter says so
    dead        the counter has not changed for `timeout_s` by the clock of whoever watches; no two clocks are ever compared

A member that is killed and comes back has a new incarnation, which is also the news that the old one is dead.
"""

import contextlib
import json
import socket
import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from thinwire.errors import UserError

LEFT = b"left"


@dataclass(frozen=True, slots=True, order=True)
class Member:
    """One life of a named member."""

    name: str
    incarnation: int


def connect(address: str, timeout_s: float) -> dist.TCPStore:
    """The store at "host:port", which somebody else holds. UserError if nobody answers there."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit():
        raise UserError(f"store {address!r}: write host:port, as whoever holds the store has printed it")
    try:
        return dist.TCPStore(host, int(port), is_master=False, timeout=timedelta(seconds=timeout_s))
    except (dist.DistError, RuntimeError):
        raise UserError(f"store {address}: nobody answered within {timeout_s:g} s; is the service running there?") from None


class Membership:
    """This process as a member of kind "server" or "worker", from `join` to `leave`. A context manager."""

    def __init__(self, store: Any, kind: str, name: str, heartbeat_s: float) -> None:
        if not name or "/" in name:
            raise UserError(f"member name {name!r}: write letters, digits, - and _")
        self._store = store
        self._heartbeat_s = heartbeat_s
        self.member = Member(name, self._store.add(f"incarnations/{kind}/{name}", 1))
        self._store.set(_host_key(kind, name), socket.gethostname())
        self._key = _beat_key(kind, self.member)
        self._store.set(self._key, b"0")
        number = self._store.add(f"joins/{kind}", 1)
        self._store.set(f"joins/{kind}/{number}", json.dumps([name, self.member.incarnation]))
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._beat, name=f"heartbeat of {kind} {name}", daemon=True)
        self._thread.start()

    def leave(self) -> None:
        """Say that this life ends as it should."""
        self.stop()
        with contextlib.suppress(RuntimeError):  # the store may have ended first
            self._store.set(self._key, LEFT)

    def stop(self) -> None:
        """End the heartbeat without a word, as a crash does."""
        self._end.set()
        self._thread.join()

    def _beat(self) -> None:
        count = 0
        with contextlib.suppress(RuntimeError):  # without a store there is nobody to tell
            while not self._end.wait(self._heartbeat_s):
                count += 1
                self._store.set(self._key, str(count))


class Watch:
    """Whoever joins, leaves or falls silent among members of a kind, seen by one thread."""

    def __init__(self, store: Any, kind: str, timeout_s: float) -> None:
        self._store, self._kind, self._timeout_s = store, kind, timeout_s
        self._seen_joins = 0
        self._heard: dict[Member, tuple[bytes, float]] = {}

    def joined(self) -> list[Member]:
        """Members that are new since the last call."""
        new = []
        while self._store.check([key := f"joins/{self._kind}/{self._seen_joins + 1}"]):
            name, incarnation = json.loads(self._store.get(key))
            self._seen_joins += 1
            new.append(Member(name, incarnation))
            self._heard[new[-1]] = (b"", time.monotonic())
        return new

    def gone(self) -> dict[Member, str]:
        """Members that are gone since the last call, and why."""
        now, found = time.monotonic(), {}
        members = list(self._heard)
        beats = self._store.multi_get([_beat_key(self._kind, member) for member in members]) if members else []
        newest = {member.name: member.incarnation for member in sorted(members)}
        for member, beat in zip(members, beats, strict=True):
            before, since = self._heard[member]
            if beat == LEFT:
                found[member] = "left"
            elif member.incarnation < newest[member.name]:
                found[member] = "came back as a new one"
            elif beat != before:
                self._heard[member] = (beat, now)
            elif now - since > self._timeout_s:
                found[member] = f"was silent for {self._timeout_s:g} s"
        for member in found:
            del self._heard[member]
        return found


def host_of(store: Any, kind: str, name: str) -> str:
    """The host of a member that has joined, where its newest life is."""
    told: bytes = store.multi_get([_host_key(kind, name)])[0]  # `get` may look up names first, which can take seconds
    return told.decode()


def _host_key(kind: str, name: str) -> str:
    return f"hosts/{kind}/{name}"


def _beat_key(kind: str, member: Member) -> str:
    return f"beats/{kind}/{member.name}/{member.incarnation}"
