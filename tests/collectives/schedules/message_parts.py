"""A schedule in parts of its message: how large its chunks are, and what memory it needs beside input and output."""

from collections import Counter
from fractions import Fraction

from thinwire.collectives.schedules import ops
from thinwire.collectives.schedules.program import programs
from thinwire.collectives.schedules.schedule import Schedule


def fractions(schedule: Schedule) -> tuple[Fraction, ...]:
    """Each chunk as a part of the message (see `ops.block_sizes`), all blocks being equal."""
    totals: Counter[int] = Counter()
    for chunk in schedule.chunks:
        totals[chunk.block] += chunk.weight
    parts = ops.message_blocks(schedule.op, schedule.p)
    return tuple(Fraction(chunk.weight, totals[chunk.block] * parts) for chunk in schedule.chunks)


def scratch(schedule: Schedule, rank: int) -> Fraction:
    """The most memory of `rank` beside input and output, for the executor of `verify`.

    A buffer for each chunk that is to be added to a slot (or copied over one that is sent in this very step) when it lands, and
    a slot for each chunk that the rank has no place for in its output, from its first receive to its last send.
    """
    parts, program = fractions(schedule), programs(schedule)[rank]
    due = set(ops.outputs(schedule.op, schedule.p, schedule.root, rank))
    sent = {(action.step, chunk) for action in program if action.kind == "send" for chunk in action.chunks}
    last_sent = {chunk: action.step for action in program if action.kind == "send" for chunk in action.chunks}
    landing: dict[int, Fraction] = {}
    change: dict[int, Fraction] = {}
    held: set[int] = set()
    for action in program:
        for chunk in action.chunks if action.kind != "send" else ():
            if schedule.chunks[chunk].block not in due and chunk not in held:
                held.add(chunk)  # what lands becomes the slot
                last = last_sent.get(chunk, action.step) + 1
                change[action.step] = change.get(action.step, Fraction(0)) + parts[chunk]
                change[last] = change.get(last, Fraction(0)) - parts[chunk]
            elif action.kind == "reduce" or (action.step, chunk) in sent:
                landing[action.step] = landing.get(action.step, Fraction(0)) + parts[chunk]
    most = now = Fraction(0)
    for step in sorted({*landing, *change}):
        now += change.get(step, Fraction(0))
        most = max(most, now + landing.get(step, Fraction(0)))
    return most
