"""A schedule as a program for each rank: what it sends, gets and adds up, and which of that must wait for which.

A rank's program lists, step by step, first what it sends and then what it receives. Two rules follow from the slots (see
`schedule`) and suffice for equal bits in any order that keeps them (s: send, r: receive-and-apply, both touching chunk c here):

    s waits for the last r of c before it            it sends what that r has made of the slot
    r waits for the last r and the later s of c      contributions are added in the listed order, and no value is overwritten
                                                     before it has left

A message may arrive at any time; only applying it waits. The number of a message is its tag: messages between two ranks may
overtake one another, unless the executor takes a program strictly in order.
"""

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
    first = 0
    for number, step in enumerate(schedule.steps):
        for tag, message in enumerate(step, first):
            ranks[message.source].send(message, number, tag)
        for tag, message in enumerate(step, first):
            ranks[message.target].receive(message, number, tag)
        first += len(step)
    return tuple(tuple(rank.actions) for rank in ranks)


@dataclass
class _Rank:
    """A program in the making. written: the last action that changed a chunk's slot; read: the sends of it since."""

    actions: list[Action] = field(default_factory=list)
    written: dict[int, int] = field(default_factory=dict)
    read: dict[int, list[int]] = field(default_factory=dict)

    def send(self, message: Message, step: int, tag: int) -> None:
        after = {self.written[chunk] for chunk in message.chunks if chunk in self.written}
        for chunk in message.chunks:
            self.read.setdefault(chunk, []).append(len(self.actions))
        self.actions.append(Action("send", message.target, message.chunks, step, tag, tuple(sorted(after))))

    def receive(self, message: Message, step: int, tag: int) -> None:
        after = {self.written[chunk] for chunk in message.chunks if chunk in self.written}
        for chunk in message.chunks:
            after.update(self.read.pop(chunk, ()))
        self.written.update(dict.fromkeys(message.chunks, len(self.actions)))
        kind: Kind = "reduce" if message.reduce else "copy"
        self.actions.append(Action(kind, message.source, message.chunks, step, tag, tuple(sorted(after))))
