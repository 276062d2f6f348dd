"""A reference executor: the programs of all ranks on arrays in one process, in any order that their dependencies allow.

And what each op means, written without schedules.
"""

from collections.abc import Sequence
from itertools import accumulate
from random import Random

import numpy as np

from thinwire.collectives.schedules import ops
from thinwire.collectives.schedules.program import programs
from thinwire.collectives.schedules.schedule import Schedule


def execute(schedule: Schedule, inputs: Sequence[np.ndarray], sizes: Sequence[int], seed: int = 0) -> list[np.ndarray | None]:
    """The output of each rank, None where nothing is due at it. `seed` decides which of the ready actions is next."""
    random = Random(seed)
    ranges = schedule.ranges(sizes)
    slots: list[dict[int, np.ndarray]] = []
    for rank in range(schedule.p):
        at = ops.offsets(ops.inputs(schedule.op, schedule.p, schedule.root, rank), sizes)
        mine = [
            (c, r, at[chunk.block]) for c, (r, chunk) in enumerate(zip(ranges, schedule.chunks, strict=True)) if chunk.block in at
        ]
        slots.append({c: inputs[rank][first + r.start : first + r.stop] for c, r, first in mine})
    everyone = programs(schedule)
    lacking = [[len(action.after) for action in program] for program in everyone]
    followers: list[list[list[int]]] = [[[] for _ in program] for program in everyone]
    for rank, program in enumerate(everyone):
        for place, action in enumerate(program):
            for before in action.after:
                followers[rank][before].append(place)
    receivers = {
        a.message: (rank, place) for rank, prog in enumerate(everyone) for place, a in enumerate(prog) if a.kind != "send"
    }
    for tag, (rank, place) in receivers.items():
        lacking[rank][place] += 1  # for the arrival of its message
        assert everyone[rank][place].message == tag
    wire: dict[int, list[np.ndarray]] = {}
    ready = [(rank, place) for rank, counts in enumerate(lacking) for place, count in enumerate(counts) if count == 0]
    done = 0
    while ready:
        rank, place = ready.pop(random.randrange(len(ready)))
        action, held = everyone[rank][place], slots[rank]
        if action.kind == "send":
            wire[action.message] = [held[chunk] for chunk in action.chunks]
            released = [receivers[action.message]]
        else:
            for chunk, part in zip(action.chunks, wire.pop(action.message), strict=True):
                held[chunk] = held[chunk] + part if action.kind == "reduce" else part
            released = []
        done += 1
        for who, what in [*released, *((rank, follower) for follower in followers[rank][place])]:
            lacking[who][what] -= 1
            if lacking[who][what] == 0:
                ready.append((who, what))
    assert done == sum(map(len, everyone)), "the dependencies of the programs have a cycle"
    outputs: list[np.ndarray | None] = []
    for rank in range(schedule.p):
        due = ops.outputs(schedule.op, schedule.p, schedule.root, rank)
        parts = [slots[rank][chunk] for block in due for chunk, one in enumerate(schedule.chunks) if one.block == block]
        outputs.append(np.concatenate(parts) if parts else None)
    return outputs


def plain(op: str, inputs: list[np.ndarray], sizes: list[int], root: int | None) -> list[np.ndarray | None]:
    """What the op means, without schedules."""
    p = len(inputs)
    match op:
        case "all_reduce":
            return [sum(inputs)] * p
        case "reduce":
            return [sum(inputs) if rank == root else None for rank in range(p)]
        case "broadcast":
            return [inputs[root]] * p
        case "reduce_scatter":
            return list(np.split(sum(inputs), list(accumulate(sizes))[:-1]))
        case "all_gather":
            return [np.concatenate(inputs)] * p
        case "gather":
            return [np.concatenate(inputs) if rank == root else None for rank in range(p)]
        case "scatter":
            return list(np.split(inputs[root], list(accumulate(sizes))[:-1]))
        case _:
            cut = [np.split(inputs[s], list(accumulate(sizes[s * p : (s + 1) * p]))[:-1]) for s in range(p)]
            return [np.concatenate([cut[s][t] for s in range(p)]) for t in range(p)]


def input_lengths(op: str, p: int, sizes: list[int], root: int | None) -> list[int]:
    """Elements that each rank hands to the op, block b having sizes[b]."""
    match op:
        case "all_reduce" | "reduce" | "reduce_scatter":
            return [sum(sizes)] * p
        case "broadcast" | "scatter":
            return [sum(sizes) if rank == root else 0 for rank in range(p)]
        case "all_gather" | "gather":
            return sizes
        case _:
            return [sum(sizes[s * p : (s + 1) * p]) for s in range(p)]
