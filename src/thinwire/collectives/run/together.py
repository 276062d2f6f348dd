"""Programs for carriers whose messages have no tags, such as NCCL: what a rank receives and sends in a step begins as one.

There messages between two ranks match in the order in which they begin. What begins as one goes on side by side; what comes after
begins when all of that is over. With a receive and a send that begin one after the other, two ranks that exchange something would
wait for each other for ever.

A rank that begins all receives and sends of a step together, and those of the next step after they are over, is the executor for
which every schedule is proven free of deadlock and to match in order (`schedules.verify`).
"""

from collections.abc import Sequence
from dataclasses import replace

from thinwire.collectives.run.compiler import compile_for
from thinwire.collectives.run.instructions import Add, Arrive, Compiled, Expect, Instruction, Leave, Send, Together
from thinwire.collectives.schedules.schedule import Schedule


def compile_together(schedule: Schedule, rank: int, sizes: Sequence[int]) -> Compiled:
    """As `compile_for`, in such groups."""
    compiled = compile_for(schedule, rank, sizes, ahead=0)
    return replace(compiled, instructions=_together(compiled.instructions))


def _together(instructions: Sequence[Instruction]) -> tuple[Instruction, ...]:
    out: list[Instruction] = []
    parts: list[Expect | Send] = []
    for told in instructions:
        match told:
            case Expect():
                over = any(isinstance(part, Send) for part in parts)  # receives come first in a step: this is the next one
            case Leave(message):
                over = any(part.message == message for part in parts)
            case Arrive() | Add():
                over = True
            case _:
                over = False
        if over and parts:
            out.append(Together(tuple(parts)))
            parts = []
        if isinstance(told, Expect | Send):
            parts.append(told)
        else:
            out.append(told)  # before what has not begun: it copies what is about to be sent
    if parts:
        out.append(Together(tuple(parts)))
    return tuple(out)
