"""A schedule is proven right before it may run, by following who has contributed what to every slot.

The value of a slot is the set of ranks in it and the order in which they were added, as a tree: leaf r, or the sum of two trees.
x + y and y + x are one tree, since addition gives the same bits in both orders (but for which NaN it is). Checked, step by step:

    arrival        a rank sends only what it holds
    once           a reduction joins two sets without a common rank; nothing is added to an empty slot
    progress       a copy brings all that the slot holds and more, so nothing is lost and nothing comes twice
    no waste       what a rank received it passes on, or it is due there
    complete       at the end each rank that is due a block holds the contributions of all its sources, each once
    equal bits     all of them hold the same tree

No deadlock (`check_progress`), for an executor that does no better than this: a rank works through its program step by step; on
entering a step it posts all receives and starts all sends of this step, then waits for all of them. A send ends only when the
target has entered the step in which it receives (rendezvous: the network stores nothing), and messages between two ranks arrive
in the order of their sending. One that looks ahead, or a network that stores, can only do better.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from thinwire.collectives.schedules import ops
from thinwire.collectives.schedules.program import Program, programs
from thinwire.collectives.schedules.schedule import Message, Schedule
from thinwire.errors import UserError


@dataclass(slots=True)
class _Value:
    """contributions: bit r is rank r; tree: number of the order in which they were added; used: sent on since it was received."""

    contributions: int
    tree: int
    used: bool = True


def verify(schedule: Schedule) -> None:
    """UserError with the first violation, see the top of the file."""
    slots = _Slots(schedule)
    for number, step in enumerate(schedule.steps):
        slots.step(number, step)
    slots.finish()
    check_progress(programs(schedule), schedule.name)


class _Slots:
    """All slots of all ranks, and the trees seen so far."""

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule
        self._trees: dict[tuple[int, int], int] = {}
        self._slots: list[dict[int, _Value]] = [{} for _ in range(schedule.p)]
        for number, chunk in enumerate(schedule.chunks):
            for rank in ops.sources(schedule.op, schedule.p, schedule.root, chunk.block):
                self._slots[rank][number] = _Value(1 << rank, rank)

    def step(self, number: int, step: Sequence[Message]) -> None:
        where = f"{self._schedule.name}: step {number}"
        sent = []
        for message in step:
            held = self._slots[message.source]
            for chunk in message.chunks:
                if chunk not in held:
                    raise UserError(
                        f"{where}: rank {message.source} sends chunk {chunk} to {message.target} but does not hold it yet"
                    )
                held[chunk].used = True
            sent.append([(held[chunk].contributions, held[chunk].tree) for chunk in message.chunks])
        for message, values in zip(step, sent, strict=True):
            for chunk, (contributions, tree) in zip(message.chunks, values, strict=True):
                here = f"{where}: {message.source} -> {message.target}, chunk {chunk}"
                new = self._reduced if message.reduce else self._copied
                self._slots[message.target][chunk] = new(self._slots[message.target].get(chunk), contributions, tree, here)

    def finish(self) -> None:
        """Complete, equal bits, no waste."""
        schedule = self._schedule
        for number, chunk in enumerate(schedule.chunks):
            due = ops.targets(schedule.op, schedule.p, schedule.root, chunk.block)
            wanted = sum(1 << rank for rank in ops.sources(schedule.op, schedule.p, schedule.root, chunk.block))
            trees = {}
            for rank in range(schedule.p):
                value = self._slots[rank].get(number)
                if rank in due:
                    lacks = wanted & ~(value.contributions if value else 0)
                    if lacks:
                        raise UserError(
                            f"{schedule.name}: rank {rank} ends without the contributions of {_ranks(lacks)} to chunk {number}"
                        )
                    assert value is not None
                    trees[value.tree] = rank
                elif value is not None and not value.used:
                    raise UserError(
                        f"{schedule.name}: rank {rank} is sent chunk {number} in vain: it is not due there and goes nowhere"
                    )
            if len(trees) > 1:
                one, other = list(trees.values())[:2]
                raise UserError(
                    f"{schedule.name}: ranks {one} and {other} add up chunk {number} in different orders: bits may differ"
                )

    def _reduced(self, old: _Value | None, contributions: int, tree: int, here: str) -> _Value:
        if old is None:
            raise UserError(f"{here}: reduced into an empty slot; the first arrival must be copied")
        if old.contributions & contributions:
            raise UserError(f"{here}: contributions of {_ranks(old.contributions & contributions)} would be added twice")
        key = (min(old.tree, tree), max(old.tree, tree))
        new = self._trees.setdefault(key, self._schedule.p + len(self._trees))
        return _Value(old.contributions | contributions, new, used=False)

    def _copied(self, old: _Value | None, contributions: int, tree: int, here: str) -> _Value:
        if old is not None and old.contributions & ~contributions:
            lost = old.contributions & ~contributions
            raise UserError(f"{here}: the copy would overwrite the contributions of {_ranks(lost)}")
        if old is not None and old.contributions == contributions:
            raise UserError(f"{here}: the target holds it already")
        if old is not None and not old.used:
            raise UserError(f"{here}: the copy overwrites what was received there and never used")
        return _Value(contributions, tree, used=False)


def check_progress(everyone: Sequence[Program], name: str) -> None:
    """UserError if the ranks of these programs would wait for one another for ever; the model is at the top of the file."""
    sends: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    receives: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    steps = [sorted({action.step for action in program}) for program in everyone]
    for rank, program in enumerate(everyone):
        places = {step: place for place, step in enumerate(steps[rank])}
        for action in program:
            pair, queues = ((rank, action.peer), sends) if action.kind == "send" else ((action.peer, rank), receives)
            queues[pair].append((places[action.step], action.message))
    for source, target in {*sends, *receives}:
        sent, received = sends[source, target], receives[source, target]
        if [tag for _, tag in sent] != [tag for _, tag in received]:
            raise UserError(f"{name}: what rank {source} sends to {target} is not what {target} receives from it, in this order")
    waits: dict[tuple[int, int], set[tuple[int, int]]] = defaultdict(set)
    for (source, target), sent in sends.items():
        for (mine, _), (theirs, _) in zip(sent, receives[source, target], strict=True):
            waits[source, mine].add((target, theirs))
            waits[target, theirs].add((source, mine))
    entered = [0] * len(everyone)
    ready = list(range(len(everyone)))
    while ready:
        rank = ready.pop()
        while entered[rank] < len(steps[rank]) and all(entered[peer] >= place for peer, place in waits[rank, entered[rank]]):
            entered[rank] += 1
            ready += {peer for peer, _ in waits[rank, entered[rank]]}
    stuck = [rank for rank in range(len(everyone)) if entered[rank] < len(steps[rank])]
    if stuck:
        rank = stuck[0]
        peer = next(peer for peer, place in sorted(waits[rank, entered[rank]]) if entered[peer] < place)
        step = steps[rank][entered[rank]]
        raise UserError(f"{name}: deadlock: ranks {stuck} wait for one another; rank {rank}, in step {step}, for rank {peer}")


def _ranks(contributions: int) -> str:
    some = [rank for rank in range(contributions.bit_length()) if contributions >> rank & 1]
    return f"rank {some[0]}" if len(some) == 1 else f"ranks {', '.join(map(str, some))}"
