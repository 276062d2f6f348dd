"""Schedules from schedules: reversed, one after the other, side by side, in segments, on other ranks.

    reverse     the path along which a chunk was copied to all is, walked backwards, one along which it can be added up:
                all-gather -> reduce-scatter, broadcast -> reduce, scatter -> gather
                (the copies of a chunk form a tree out of its source; each rank adds what its children send, and sends that on)
    then        reduce-scatter, all-gather -> all-reduce;  reduce, broadcast -> all-reduce;  reduce-scatter, gather -> reduce
    together    each schedule carries an equal part of every block, at the same time
    pipelined   each chunk in k segments; segment j runs j steps behind segment 0, so steps + k - 1 steps in all
    on_ranks    what rank i did, rank order[i] does

(Duality of reduce and broadcast: Bala et al. 1995; reduce-scatter and all-gather: Chan, Heimlich, Purkayastha, van de Geijn,
Collective communication: theory, practice and experience, 2007.)
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import zip_longest
from math import lcm

from thinwire.collectives.schedules import ops
from thinwire.collectives.schedules.schedule import Chunk, Message, Schedule, Step, check_order
from thinwire.errors import UserError

_REVERSE = {"all_gather": "reduce_scatter", "broadcast": "reduce", "scatter": "gather"}
_THEN = {
    ("reduce_scatter", "all_gather"): "all_reduce",
    ("reduce", "broadcast"): "all_reduce",
    ("reduce_scatter", "gather"): "reduce",
}


def reverse(schedule: Schedule, name: str) -> Schedule:
    """The schedule backwards, every message from its target to its source."""
    if schedule.op not in _REVERSE:
        raise UserError(f"{schedule.name}: {schedule.op} cannot be reversed; only {', '.join(_REVERSE)} can")
    steps = reversed_steps(schedule.steps, reduce=schedule.op != "scatter")
    return replace(schedule, op=_REVERSE[schedule.op], steps=steps, name=name)


def reversed_steps(steps: Sequence[Step], reduce: bool) -> tuple[Step, ...]:
    """The steps backwards, every message from its target to its source."""
    return tuple(tuple(Message(m.target, m.source, m.chunks, reduce) for m in step) for step in reversed(steps))


def then(first: Schedule, second: Schedule, name: str, shares: Sequence[int] = ()) -> Schedule:
    """One after the other. shares[b] is the weight of block b in the whole (default: all equal); with 0 it is left out."""
    op = _THEN.get((first.op, second.op))
    if op is None or first.p != second.p or first.chunks != second.chunks:
        raise UserError(
            f"{first.name}, then {second.name}: {first.op} and {second.op} on these chunks do not make one collective"
        )
    if None not in (first.root, second.root) and first.root != second.root:
        raise UserError(f"{first.name}, then {second.name}: the roots {first.root} and {second.root} must be the same")
    totals = _totals(first)
    shares = shares or [1] * len(totals)
    if len(shares) != len(totals) or min(shares) < 0 or not any(shares):
        raise UserError(f"{name}: shares = {list(shares)}; there must be {len(totals)}, none below 0, and one or more above")
    unit = lcm(*totals)
    numbers: dict[int, int] = {}
    chunks: list[Chunk] = []
    for number, chunk in enumerate(first.chunks):
        if shares[chunk.block]:
            numbers[number] = len(chunks)
            chunks.append(Chunk(0, chunk.weight * shares[chunk.block] * unit // totals[chunk.block]))
    steps = [kept for step in first.steps + second.steps if (kept := tuple(_renumbered(step, numbers)))]
    return Schedule(
        op=op, p=first.p, chunks=tuple(chunks), steps=tuple(steps), name=name, root=second.root if op == "reduce" else None
    )


def together(schedules: Sequence[Schedule], name: str) -> Schedule:
    """Side by side, each carrying an equal part of every block. They have one op, p and root."""
    if len({(one.op, one.p, one.root) for one in schedules}) != 1:
        raise UserError(f"{name}: schedules side by side must have one op, one number of ranks and one root")
    op, p = schedules[0].op, schedules[0].p
    totals = [_totals(one) for one in schedules]
    chunks: list[Chunk] = []
    numbers: list[dict[int, int]] = [{} for _ in schedules]
    for block in range(ops.num_blocks(op, p)):
        unit = lcm(*(total[block] for total in totals))
        for which, one in enumerate(schedules):
            for number, chunk in enumerate(one.chunks):
                if chunk.block == block:
                    numbers[which][number] = len(chunks)
                    chunks.append(Chunk(block, chunk.weight * unit // totals[which][block]))
    renumbered = [[tuple(_renumbered(step, table)) for step in one.steps] for one, table in zip(schedules, numbers, strict=True)]
    return Schedule(op=op, p=p, chunks=tuple(chunks), steps=overlaid(renumbered), name=name, root=schedules[0].root)


def pipelined(schedule: Schedule, segments: int) -> Schedule:
    """Each chunk in `segments` equal ones, each a step behind the one before it."""
    if segments < 1:
        raise UserError(f"{schedule.name}: segments = {segments}; there must be 1 or more")
    if segments == 1:
        return schedule
    chunks = tuple(chunk for chunk in schedule.chunks for _ in range(segments))
    shifted = []
    for segment in range(segments):
        numbers = {number: number * segments + segment for number in range(len(schedule.chunks))}
        shifted.append([()] * segment + [tuple(_renumbered(step, numbers)) for step in schedule.steps])
    return replace(schedule, chunks=chunks, steps=overlaid(shifted), name=f"{schedule.name}, {segments} segments")


def on_ranks(schedule: Schedule, order: Sequence[int]) -> Schedule:
    """Rank order[i] does what rank i did, and owns what rank i owned."""
    order, p = check_order(order), schedule.p
    if len(order) != p:
        raise UserError(f"{schedule.name}: the order {list(order)} names {len(order)} ranks; there are {p}")
    count, place = ops.num_blocks(schedule.op, p), [0]
    if count == p:
        place = list(order)
    elif count == p * p:
        place = [order[b // p] * p + order[b % p] for b in range(count)]
    by_block = sorted(range(len(schedule.chunks)), key=lambda number: place[schedule.chunks[number].block])
    numbers = {old: new for new, old in enumerate(by_block)}
    chunks = tuple(Chunk(place[schedule.chunks[old].block], schedule.chunks[old].weight) for old in by_block)
    steps = tuple(
        tuple(Message(order[m.source], order[m.target], m.chunks, m.reduce) for m in _renumbered(step, numbers))
        for step in schedule.steps
    )
    root = None if schedule.root is None else order[schedule.root]
    return replace(schedule, chunks=chunks, steps=steps, root=root)


def overlaid(sequences: Iterable[Sequence[Step]]) -> tuple[Step, ...]:
    """Step t of each sequence as one step, in the order of the sequences."""
    return tuple(tuple(message for step in steps for message in step) for steps in zip_longest(*sequences, fillvalue=()))


def bundled(messages: Iterable[Message]) -> Step:
    """Messages of one step between the same two ranks as one message."""
    chunks: dict[tuple[int, int, bool], set[int]] = {}
    for message in messages:
        chunks.setdefault((message.source, message.target, message.reduce), set()).update(message.chunks)
    return tuple(Message(source, target, tuple(sorted(some)), reduce) for (source, target, reduce), some in chunks.items())


def _totals(schedule: Schedule) -> list[int]:
    totals = [0] * ops.num_blocks(schedule.op, schedule.p)
    for chunk in schedule.chunks:
        totals[chunk.block] += chunk.weight
    return totals


def _renumbered(step: Step, numbers: dict[int, int]) -> Iterable[Message]:
    """The messages with chunks renumbered; those without a number are left out, and messages of only such."""
    for message in step:
        chunks = tuple(sorted(numbers[chunk] for chunk in message.chunks if chunk in numbers))
        if chunks:
            yield Message(message.source, message.target, chunks, message.reduce)
