"""Compiled programs of all ranks in one process, on the worst network that is allowed.

It stores nothing and is as late as can be: the values of a message go over only when one of its two ends waits for it and the
other has begun. Memory that a receive has been promised is spoilt at once, so whoever still reads it is found out.
"""

from collections.abc import Sequence
from random import Random

import numpy as np

from thinwire.collectives.run.compiler import compile_for, in_place
from thinwire.collectives.run.instructions import Add, Arrive, Copy, Expect, Leave, Piece, Send
from thinwire.collectives.schedules import ops
from thinwire.collectives.schedules.schedule import Schedule

Memory = tuple[np.ndarray, np.ndarray, np.ndarray]


def run(schedule: Schedule, inputs: Sequence[np.ndarray], sizes: Sequence[int], seed: int) -> list[np.ndarray | None]:
    """The output of each rank, None where nothing is due at it."""
    random = Random(seed)
    programs = [compile_for(schedule, rank, sizes) for rank in range(schedule.p)]
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
        told = programs[rank].instructions[at[rank]]
        return not isinstance(told, Arrive | Leave) or goes(told.message)

    while running := [rank for rank in range(schedule.p) if at[rank] < len(programs[rank].instructions)]:
        able = [rank for rank in running if ready(rank)]
        assert able, "the ranks wait for each other"
        rank = random.choice(able)
        match programs[rank].instructions[at[rank]]:
            case Send(message, _, what):
                assert what.buffer != 2 or what.last <= programs[rank].lengths[2]
                sent[message] = rank, what
            case Expect(message, _, into):
                view(rank, into)[:] = 55
                expected[message] = rank, into
            case Add(into, a, b):
                view(rank, into)[:] = view(rank, a) + view(rank, b)
            case Copy(into, what):
                view(rank, into)[:] = view(rank, what)
        at[rank] += 1
    assert all(message in over for message in sent)
    for rank, memory in enumerate(memories):
        if not in_place(schedule.op, schedule.root, rank):
            assert np.array_equal(memory[0], inputs[rank]), "an input was written to"
    return [
        memories[rank][1] if ops.outputs(schedule.op, schedule.p, schedule.root, rank) else None for rank in range(schedule.p)
    ]
