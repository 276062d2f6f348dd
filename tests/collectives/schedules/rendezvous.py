"""Compiled programs of all ranks in one process, on the worst network that is allowed.

It stores nothing and is as late as can be: the values of a message go over only when one of its two ends waits for it and the
other has begun. Memory that a receive has been promised is spoilt at once, so whoever still reads it is found out.

Where messages have no tags, the network takes those between two ranks in the order in which they begin, whatever they are, and a
rank begins nothing before all that it has begun is over.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import partial
from random import Random

import numpy as np

from thinwire.collectives.run.compiler import compile_for, compile_without_tags, in_place
from thinwire.collectives.run.instructions import Combine, Copy, Piece, Start, StartBatch, Wait
from thinwire.collectives.schedules import ops
from thinwire.collectives.schedules.schedule import Schedule

Memory = tuple[np.ndarray, np.ndarray, np.ndarray]


def run(schedule: Schedule, inputs: Sequence[np.ndarray], sizes: Sequence[int], seed: int, ahead: int) -> list[np.ndarray | None]:
    """The output of each rank, None where nothing is due at it. ahead = 0: where messages have no tags."""
    random = Random(seed)
    compiled = partial(compile_for, ahead=ahead) if ahead else compile_without_tags
    programs = [compiled(schedule, rank, sizes) for rank in range(schedule.p)]
    memories: list[Memory] = []
    for rank, program in enumerate(programs):
        given, got, scratch = (np.full(length, 77, inputs[0].dtype) for length in program.lengths)
        if in_place(schedule.op, schedule.root, rank):
            got[: len(inputs[rank])] = inputs[rank]
        else:
            given[:] = inputs[rank]
        memories.append((given, got, scratch))
    sent: dict[int, tuple[int, Piece]] = {}
    expected: dict[int, tuple[int, Piece]] = {}
    over: set[int] = set()
    group_of: dict[tuple[int, int], tuple[int, ...]] = {}
    """By rank and message: what began with it."""
    last: dict[int, tuple[int, ...]] = {}
    at = [0] * schedule.p

    def view(rank: int, piece: Piece) -> np.ndarray:
        return memories[rank][piece.buffer][piece.first : piece.last]

    def goes(message: int) -> bool:
        """Whether both ends have begun; if so, the values have gone over afterwards."""
        if message not in over and message in sent and message in expected:
            view(*expected[message])[:] = view(*sent[message])
            over.add(message)
        return message in over

    def ready(rank: int) -> bool:
        instruction = programs[rank].instructions[at[rank]]
        match instruction:
            case Wait(message):
                return all([goes(other) for other in group_of.get((rank, message), (message,))])
            case StartBatch():
                return all([goes(other) for other in last.get(rank, ())])
        return True

    def begin(rank: int, part: Start) -> None:
        if part.sends:
            assert part.piece.buffer != 2 or part.piece.last <= programs[rank].lengths[2]
            sent[part.message] = rank, part.piece
        else:
            view(rank, part.piece)[:] = 55
            expected[part.message] = rank, part.piece

    while running := [rank for rank in range(schedule.p) if at[rank] < len(programs[rank].instructions)]:
        able = [rank for rank in running if ready(rank)]
        assert able, "the ranks wait for each other"
        rank = random.choice(able)
        match programs[rank].instructions[at[rank]]:
            case Start() as part:
                begin(rank, part)
            case StartBatch(parts):
                last[rank] = tuple(part.message for part in parts)
                for part in parts:
                    group_of[rank, part.message] = last[rank]
                    begin(rank, part)
            case Combine(into, a, b):
                view(rank, into)[:] = view(rank, a) + view(rank, b)
            case Copy(into, source):
                view(rank, into)[:] = view(rank, source)
        at[rank] += 1
    assert all(message in over for message in sent)
    assert ahead or by_pair(schedule, sent) == by_pair(schedule, expected)
    for rank, memory in enumerate(memories):
        if not in_place(schedule.op, schedule.root, rank):
            assert np.array_equal(memory[0], inputs[rank]), "an input was written to"
    return [
        memories[rank][1] if ops.outputs(schedule.op, schedule.p, schedule.root, rank) else None for rank in range(schedule.p)
    ]


def by_pair(schedule: Schedule, messages: Iterable[int]) -> dict[tuple[int, int], list[int]]:
    """Those from each rank to each, in their order."""
    found: dict[tuple[int, int], list[int]] = defaultdict(list)
    for message in messages:
        found[schedule.messages[message].source, schedule.messages[message].target].append(message)
    return found
