"""A schedule as a program for each rank: what it sends, gets and adds up, and which of that must wait for which.

A rank's program lists, step by step, first what it sends and then what it receives. Two rules follow from the slots (see
`schedule`) and suffice for equal bits in any order that keeps them (s: send, r: receive-and-apply, both touching chunk c here):

    s waits for the last r of c before it            it sends what that r has made of the slot
    r waits for the last r and the later s of c      contributions are added in the listed order, and no value is overwritten
                                                     before it has left

A message may arrive at any time; only applying it waits. The number of a message is its tag: messages between two ranks may
overtake one another, unless the executor takes a program strictly in order.
"""

from dataclasses import dataclass
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
    actions: list[list[Action]] = [[] for _ in range(schedule.p)]
    written: list[dict[int, int]] = [{} for _ in range(schedule.p)]
    """Of each rank, by chunk: the last action that changed its slot."""
    read: list[dict[int, list[int]]] = [{} for _ in range(schedule.p)]
    """The sends of it since."""

    def add(kind: Kind, rank: int, peer: int, message: Message, step: int, tag: int) -> None:
        after = {written[rank][chunk] for chunk in message.chunks if chunk in written[rank]}
        for chunk in message.chunks:
            if kind == "send":
                read[rank].setdefault(chunk, []).append(len(actions[rank]))
            else:
                after.update(read[rank].pop(chunk, ()))
                written[rank][chunk] = len(actions[rank])
        actions[rank].append(Action(kind, peer, message.chunks, step, tag, tuple(sorted(after))))

    first = 0
    for step, messages in enumerate(schedule.steps):
        for tag, message in enumerate(messages, first):
            add("send", message.source, message.target, message, step, tag)
        for tag, message in enumerate(messages, first):
            add("reduce" if message.reduce else "copy", message.target, message.source, message, step, tag)
        first += len(messages)
    return tuple(map(tuple, actions))
