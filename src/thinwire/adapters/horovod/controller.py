"""Rank 0's table of what the ranks have asked for: announces what is complete, in one order, and fails what can never be.

A request is complete when each member of its process set has made it, or has joined (`hvd.join`: a rank that is out of data
stands in with zeros). Complete requests that are alike travel together, up to FUSION_BYTES.

Ranks that wait say so. A set W of waiting ranks waits for ever if what each of them waits for lacks only ranks that wait in W,
have joined, or are gone; the largest such W is found by taking out, again and again, whoever lacks somebody else. Then what they
wait for fails on all ranks that have asked for it, with one line that names it and who lacks. What lacks a rank that does
something else fails after `timeout_s`.

Nothing here knows threads, sockets or tensors.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from thinwire.adapters.horovod.request import RAGGED, Key, Request, difference, ranks_in_words

FUSION_BYTES = 64 * 2**20
FUSED = frozenset({"allreduce", "broadcast", "allgather", "reducescatter"})
JOINED = "joined ranks stand in for allreduce with Sum or Average only"


@dataclass(frozen=True)
class Waiting:
    """A rank cannot go on before this request of its own is answered."""

    key: Key


@dataclass(frozen=True)
class Leaving:
    """A rank ends, and with it all that is under way: why."""

    reason: str


Message = Request | Waiting | Leaving


@dataclass(kw_only=True)
class Part:
    """One request of an announcement. first_dims, splits: by place in the process set, where ranks may differ."""

    request: Request
    first_dims: list[list[int]] = field(default_factory=list)
    splits: list[tuple[int, ...]] = field(default_factory=list)


@dataclass(kw_only=True)
class Announcement:
    """To be run now by all `ranks`, after those before it. error: why it is not run. end: nothing comes after it."""

    parts: list[Part]
    ranks: tuple[int, ...]
    error: str = ""
    end: bool = False
    result: int = -1
    """Of a join: who came last; of a new process set: its number."""


class Controller:
    """See the top of the file. Time is `clock`'s, in seconds."""

    def __init__(self, size: int, timeout_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._timeout_s, self._clock = timeout_s, clock
        self._sets: dict[int, tuple[int, ...]] = {0: tuple(range(size))}
        self._next_set = 1
        self._asked: dict[Key, dict[int, Request]] = {}
        self._since: dict[Key, float] = {}
        self._waits: dict[int, Key] = {}
        self._joined: list[int] = []
        self.noted: Callable[[Request, int], None] = lambda request, rank: None
        """Hears of each request as it comes (the timeline)."""

    def receive(self, rank: int, messages: Sequence[Message]) -> list[Announcement]:
        """What `rank` has sent; returns what is to be announced now."""
        found: list[Announcement] = []
        for message in messages:
            if isinstance(message, Leaving):
                text = f"rank {rank} {message.reason}"
                return [*found, Announcement(parts=[], ranks=self._sets[0], error=text, end=True)]
            if isinstance(message, Waiting):
                if rank in self._asked.get(message.key, {}):
                    self._waits[rank] = message.key
                    found += self._hopeless()
                continue
            self.noted(message, rank)
            if message.kind == "join":
                self._joined.append(rank)
                found += [one for key in list(self._asked) for one in self._announced(key)]
                found += self._all_joined()
                continue
            self._asked.setdefault(message.key, {})[rank] = message
            self._since.setdefault(message.key, self._clock())
            found += self._announced(message.key)
        return _fused(found)

    def _lacking(self, key: Key) -> list[int]:
        """Members that have neither asked nor joined."""
        return [rank for rank in self._members(key) if rank not in self._asked[key] and rank not in self._joined]

    def _members(self, key: Key) -> tuple[int, ...]:
        return self._sets.get(key[1], self._sets[0])

    def _announced(self, key: Key) -> list[Announcement]:
        """Of one key: nothing, or what is to be run or to fail."""
        if self._lacking(key):
            return []
        members, asked = self._members(key), self._asked[key]
        request = asked[min(asked)]
        error = difference(asked)
        if not error and len(asked) < len(members) and not _joins(request):
            absent = ranks_in_words([rank for rank in members if rank not in asked])
            error = f"{request.kind} of {request.name!r}: {absent} joined, and {JOINED}"
        made = self._answered(key, error)
        if not error and request.kind == "add_process_set":
            made.result = self._new_set(request.splits)
            if made.result < 0:
                made.error = f"there is a process set of {ranks_in_words(request.splits)} already; use that one"
        elif not error and request.kind == "remove_process_set":
            self._sets.pop(request.root, None)
        return [made]

    def _answered(self, key: Key, error: str) -> Announcement:
        asked = self._asked.pop(key)
        self._since.pop(key)
        self._waits = {rank: waited for rank, waited in self._waits.items() if waited != key}
        part = Part(request=asked[min(asked)])
        if key[0] in RAGGED and not error:
            own = [asked[rank] for rank in self._members(key)]
            part.first_dims = [[shape[0] for _, shape in request.tensors] for request in own]
            part.splits = [request.splits for request in own]
        return Announcement(parts=[part], ranks=self._members(key), error=error)

    def _new_set(self, ranks: tuple[int, ...]) -> int:
        if ranks in self._sets.values():
            return -1
        self._next_set += 1
        self._sets[self._next_set - 1] = ranks
        return self._next_set - 1

    def _all_joined(self) -> list[Announcement]:
        if len(self._joined) < len(self._sets[0]):
            return []
        last, self._joined = self._joined[-1], []
        part = Part(request=Request(kind="join", name="join"))
        return [Announcement(parts=[part], ranks=self._sets[0], result=last)]

    def _hopeless(self) -> list[Announcement]:
        """What nobody can complete any more, or has waited for too long."""
        stuck = dict(self._waits)
        while out := [rank for rank, key in stuck.items() if any(r not in stuck for r in self._lacking(key))]:
            for rank in out:
                del stuck[rank]
        found = []
        for key in dict.fromkeys(stuck.values()):
            others = [other for other in dict.fromkeys(stuck.values()) if other != key]
            met = f", which wait for {_described(others)}" if others else ""
            found.append(self._answered(key, self._missing(key, met)))
        for key in [key for key, since in self._since.items() if self._clock() - since > self._timeout_s]:
            found.append(self._answered(key, self._missing(key, f", after {self._timeout_s:g} s")))
        return found

    def _missing(self, key: Key, why: str) -> str:
        asked, absent = ranks_in_words(sorted(self._asked[key])), ranks_in_words(self._lacking(key))
        return f"{key[0]} of {key[2]!r}: {asked} asked for it, and it is missing on {absent}{why}; call it on all ranks"


def _joins(request: Request) -> bool:
    return request.kind in ("allreduce", "end_step") and request.op in ("sum", "average", "")


def _described(keys: Sequence[Key]) -> str:
    return ", ".join(f"{kind} of {name!r}" for kind, _, name in keys)


def _fused(announcements: Sequence[Announcement]) -> list[Announcement]:
    """In their order; neighbours that are alike become one."""
    fused: list[Announcement] = []
    for one in announcements:
        before = fused[-1] if fused else None
        if before is None or before.error or one.error or not before.parts or not one.parts:
            fused.append(one)
            continue
        first, new = before.parts[0].request, one.parts[0].request
        size = sum(part.request.message_bytes for part in before.parts) + new.message_bytes
        if new.kind in FUSED and first.like == new.like and size <= FUSION_BYTES:
            before.parts += one.parts
        else:
            fused.append(one)
    return fused
