"""A schedule as a program for each rank: what it sends, gets and adds up, and which of that must wait for which.

A rank's program lists, step by step, first what it sends and then what it receives. Two rules follow from the slots (see
`schedule`) and suffice for equal bits in any order that keeps them (s: send, r: receive-and-apply, both touching chunk c here):

    s waits for the last r of c before it            it sends what that r has made of the slot
    r waits for the last r and the later s of c      contributions are added in the listed order, and no value is overwritten
                                                     before it has left

A message may arrive at any time; only applying it waits. The number of a message is its tag: messages between two ranks may
overtake one another, unless the executor takes a program strictly in order.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from thinwire.collectives.schedules.schedule import Message, Schedule

Kind = Literal["send", "reduce", "copy"]


@dataclass(frozen=True, slots=True)
class Action:
    """One side of a message. reduce, copy: receive it, then apply it. `after`: places in this program to be done before it."""

    kind: Kind
    peer: int
    chunks: tuple[int, ...]
    step: int
    message: int
    after: tuple[int, ...]


Program = tuple[Action, ...]


def programs(schedule: Schedule) -> tuple[Program, ...]:
    """The program of each rank."""
    ranks = [_Rank() for _ in range(schedule.p)]
    number = 0
    for at, step in enumerate(schedule.steps):
        numbered = list(enumerate(step, number))
        for tag, message in numbered:
            ranks[message.source].send(message, at, tag)
        for tag, message in numbered:
            ranks[message.target].receive(message, at, tag)
        number += len(step)
    return tuple(tuple(rank.actions) for rank in ranks)


@dataclass
class _Rank:
    """A program in the making. written: the last action that changed a chunk's slot; read: the sends of it since."""

    actions: list[Action] = field(default_factory=list)
    written: dict[int, int] = field(default_factory=dict)
    read: dict[int, list[int]] = field(default_factory=dict)

    def send(self, message: Message, step: int, tag: int) -> None:
        place = len(self.actions)
        self._add("send", message.target, message, (step, tag), (self.written[c] for c in message.chunks if c in self.written))
        for chunk in message.chunks:
            self.read.setdefault(chunk, []).append(place)

    def receive(self, message: Message, step: int, tag: int) -> None:
        place = len(self.actions)
        before = {self.written[c] for c in message.chunks if c in self.written}
        for chunk in message.chunks:
            before.update(self.read.pop(chunk, ()))
        self._add("reduce" if message.reduce else "copy", message.source, message, (step, tag), before)
        self.written.update(dict.fromkeys(message.chunks, place))

    def _add(self, kind: Kind, peer: int, message: Message, when: tuple[int, int], after: Iterable[int]) -> None:
        self.actions.append(Action(kind, peer, message.chunks, when[0], when[1], tuple(sorted(set(after)))))
