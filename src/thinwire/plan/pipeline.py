"""One step of a pipeline on a cluster, event by event: when each stage computes which micro-batch, and what the wire holds up.

    rank         works off its order of passes, one after the other. A pass begins when the rank is free and what it needs has
                 arrived: a forward pass the activation of the stage before, a backward pass the gradient of the stage behind;
                 weights alone (W) need nothing.
    message      is handed over when the pass before it is over, and travels as in `collectives.choose.wires`; one of no bytes is
                 there at once
    latency      of the route, and MESSAGE_OVERHEAD_S of software, when the last byte has passed
    one rank     stages on it hand over without a message

All pipelines of a layout run at once and share the links. bubble: the part of the ranks' time in which they compute nothing.
(Schedules: Huang et al. 2019, Narayanan et al. 2021, Qi et al. 2024.)
"""

import heapq
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf

from thinwire.cluster import Link
from thinwire.cluster.graph import Routes
from thinwire.collectives.choose.costs import Costs
from thinwire.collectives.choose.wires import SAME_S, Message, Wires
from thinwire.collectives.price import MESSAGE_OVERHEAD_S
from thinwire.layout import Layout
from thinwire.traffic import Transfer
from thinwire.workload import BACKWARD_OVER_FORWARD

Pass = tuple[str, int, int]
"""(F forward, B backward, I backward of inputs, W of weights; stage; micro-batch)."""


@dataclass(frozen=True, kw_only=True)
class Pipelines:
    """What is simulated. orders: of each rank of a pipeline, what it computes; groups: the global ranks of each pipeline.

    seconds: of a pass, by (kind, stage); activation_bytes and gradient_bytes: of one message across each boundary.
    """

    orders: Sequence[Sequence[Pass]]
    groups: Sequence[Sequence[int]]
    seconds: Mapping[tuple[str, int], float]
    activation_bytes: Sequence[int]
    gradient_bytes: Sequence[int]

    @property
    def rank_of(self) -> dict[int, int]:
        """Position in the group by stage."""
        return {stage: rank for rank, order in enumerate(self.orders) for _, stage, _ in order}

    def flows(self, group: Sequence[int]) -> Iterator[tuple[int, int, int]]:
        """(source, target, bytes) of each message of one pipeline."""
        at, last = self.rank_of, len(self.activation_bytes)
        for kind, stage, _ in (one for order in self.orders for one in order):
            if kind == "F" and stage < last:
                yield group[at[stage]], group[at[stage + 1]], self.activation_bytes[stage]
            elif kind in "BI" and stage > 0:
                yield group[at[stage]], group[at[stage - 1]], self.gradient_bytes[stage - 1]


@dataclass(frozen=True, kw_only=True, eq=False)
class Stages:
    """A model in stages on the "pipe" axis of a layout. orders, activation_bytes, gradient_bytes: as in `Pipelines`.

    forward_flops: of one micro-batch on the rank for which they were made, by stage; tensor_flops: the same of each rank of the
    tensor axis, if that differs. recomputed: what backward passes compute again, as a fraction of the stage's forward_flops.
    in_passes: what a pass of one micro-batch sends to other ranks with parts of the same stage, by
    (F forward or B backward, stage); it lengthens the pass.
    """

    orders: Sequence[Sequence[Pass]]
    forward_flops: Sequence[float]
    activation_bytes: Sequence[int]
    gradient_bytes: Sequence[int]
    in_passes: Mapping[tuple[str, int], Sequence[Transfer]] = field(default_factory=dict)
    tensor_flops: Sequence[Sequence[float]] = ()
    recomputed: Sequence[float] = ()

    def pipelines(
        self,
        layout: Layout,
        flops_per_s: Sequence[float],
        *,
        idle_wires: bool = False,
        sums_s: Mapping[tuple[str, int], float] = {},
        pass_s: float = 0.0,
    ) -> Pipelines:
        """flops_per_s: by global rank; a stage is as fast as the slowest of those that have it. idle_wires: nothing is sent.

        sums_s: what `in_passes` takes, by its keys; pass_s: what a pass takes besides computing.
        """
        groups = layout.groups("pipe")
        seconds: dict[tuple[str, int], float] = {}
        for position, order in enumerate(self.orders):
            ranks = [group[position] for group in groups]
            flops = [
                self.tensor_flops[layout.coordinates(rank)["tensor"]] if self.tensor_flops else self.forward_flops
                for rank in ranks
            ]
            for stage in {stage for _, stage, _ in order}:
                forward_s = max(one[stage] / flops_per_s[rank] for rank, one in zip(ranks, flops, strict=True))
                weights_s = forward_s * BACKWARD_OVER_FORWARD / 2
                back_s = sums_s.get(("B", stage), 0.0) + (forward_s * self.recomputed[stage] if self.recomputed else 0.0)
                seconds |= {
                    ("F", stage): forward_s + sums_s.get(("F", stage), 0.0) + pass_s,
                    ("B", stage): 2 * weights_s + back_s + pass_s,
                    ("I", stage): weights_s + back_s + pass_s,
                    ("W", stage): weights_s + pass_s,
                }
        nothing = (0,) * len(self.activation_bytes)
        return Pipelines(
            orders=self.orders,
            groups=groups,
            seconds=seconds,
            activation_bytes=nothing if idle_wires else self.activation_bytes,
            gradient_bytes=nothing if idle_wires else self.gradient_bytes,
        )


@dataclass(frozen=True)
class Ran:
    """One pass as it ran, of pipeline `group`, on the rank at `position` in it."""

    group: int
    position: int
    done: Pass
    begin_s: float
    end_s: float


@dataclass(frozen=True, kw_only=True)
class Simulated:
    """seconds: until the last pass of all ranks is over."""

    seconds: float
    passes: tuple[Ran, ...]
    link_bytes: Mapping[Link, int]

    def computing_s(self, position: int, group: int = 0) -> float:
        """Of the passes of one rank."""
        return sum(ran.end_s - ran.begin_s for ran in self.passes if (ran.group, ran.position) == (group, position))

    @property
    def bubble(self) -> float:
        """1 - computing / (ranks * seconds)."""
        busy = sum(ran.end_s - ran.begin_s for ran in self.passes)
        ranks = len({(ran.group, ran.position) for ran in self.passes})
        return 1 - busy / (ranks * self.seconds) if self.seconds else 0.0


def simulate(pipelines: Pipelines, routes: Routes) -> Simulated:
    """One step, from when all ranks begin it. Pipelines without a link in common do not see each other, and take as long where
    they are wired alike."""
    groups, sent = pipelines.groups, [routes.load(pipelines.flows(group)) for group in pipelines.groups]
    apart: list[tuple[list[int], set[Link]]] = []
    for number, links in enumerate(sent):
        joined = [one for one in apart if not one[1].isdisjoint(links)]
        numbers = sorted([number, *(n for one in joined for n in one[0])])
        apart = [one for one in apart if one not in joined] + [(numbers, set(links).union(*(one[1] for one in joined)))]
    known: dict[object, list[Ran]] = {}
    passes: list[Ran] = []
    for numbers, _ in apart:
        own = [groups[number] for number in numbers]
        key = len(own), routes.pattern([rank for group in own for rank in group])
        if key not in known:
            known[key] = _Run(replace(pipelines, groups=own), routes).passes
        passes += [Ran(numbers[ran.group], ran.position, ran.done, ran.begin_s, ran.end_s) for ran in known[key]]
    seconds = max(ran.end_s for ran in passes)
    return Simulated(seconds=seconds, passes=tuple(passes), link_bytes=sum(sent, Counter()))


@dataclass(slots=True)
class _Message(Message):
    """arrives: the pass of pipeline `group` that may begin when it is there."""

    group: int = 0
    arrives: Pass = ("F", 0, 0)


class _Run:
    def __init__(self, pipelines: Pipelines, routes: Routes) -> None:
        self._pipelines = pipelines
        self._stages = len(pipelines.activation_bytes) + 1
        self._rank_of = pipelines.rank_of
        neighbours = [pair for group in pipelines.groups for pair in self._neighbours(group)]
        self._wires: Wires[_Message] = Wires(neighbours, routes, Costs().acknowledged)
        self._there: set[tuple[int, Pass]] = set()
        self._at = {(group, rank): 0 for group in range(len(pipelines.groups)) for rank in range(len(pipelines.orders))}
        self._busy: set[tuple[int, int]] = set()
        self._events: list[tuple[float, int, Ran | _Message]] = []
        self._number = 0
        self.passes: list[Ran] = []
        self._work()
        unfinished = [key for key, place in self._at.items() if place < len(pipelines.orders[key[1]])]
        assert not unfinished, f"the schedule never gets to what ranks {unfinished} wait for"

    def _neighbours(self, group: Sequence[int]) -> list[tuple[int, int]]:
        pairs = []
        for stage in range(self._stages - 1):
            one, other = group[self._rank_of[stage]], group[self._rank_of[stage + 1]]
            if one != other:
                pairs += [(one, other), (other, one)]
        return pairs

    def _work(self) -> None:
        for group, rank in self._at:
            self._begin_next(group, rank, 0.0)
        while self._events or self._wires.busy:
            now = min(self._wires.soonest, self._events[0][0] if self._events else inf)
            for pair, message in self._wires.left(now):
                self._later(now + self._wires.latency_s(pair) + MESSAGE_OVERHEAD_S, message)
            while self._events and self._events[0][0] <= now + SAME_S:
                time, _, happened = heapq.heappop(self._events)
                if isinstance(happened, Ran):
                    self._pass_over(happened)
                else:
                    self._arrived(happened, time)
            self._wires.settle(now)

    def _later(self, time: float, happening: Ran | _Message) -> None:
        self._number += 1
        heapq.heappush(self._events, (time, self._number, happening))

    def _begin_next(self, group: int, rank: int, time: float) -> None:
        place, order = self._at[group, rank], self._pipelines.orders[rank]
        if (group, rank) in self._busy or place == len(order) or not self._ready(group, order[place]):
            return
        self._busy.add((group, rank))
        self._at[group, rank] += 1
        takes = self._pipelines.seconds[order[place][:2]]
        self._later(time + takes, Ran(group, rank, order[place], time, time + takes))

    def _ready(self, group: int, one: Pass) -> bool:
        kind, stage, _ = one
        if kind == "W" or (kind == "F" and stage == 0) or (kind != "F" and stage == self._stages - 1):
            return True
        return (group, _arrival(one)) in self._there

    def _pass_over(self, ran: Ran) -> None:
        self.passes.append(ran)
        self._busy.discard((ran.group, ran.position))
        kind, stage, micro = ran.done
        if kind == "F" and stage < self._stages - 1:
            self._hand_over(ran, ("F", stage + 1, micro), self._pipelines.activation_bytes[stage])
        elif kind in "BI" and stage > 0:
            self._hand_over(ran, ("B", stage - 1, micro), self._pipelines.gradient_bytes[stage - 1])
        self._begin_next(ran.group, ran.position, ran.end_s)

    def _hand_over(self, ran: Ran, arrives: Pass, size: int) -> None:
        group = self._pipelines.groups[ran.group]
        message = _Message(size, group=ran.group, arrives=arrives)
        pair = self._wires.connection(group[ran.position], group[self._rank_of[arrives[1]]])
        if pair is None or not size:
            self._arrived(message, ran.end_s)
        else:
            self._wires.post(pair, message, ran.end_s)

    def _arrived(self, message: _Message, time: float) -> None:
        self._there.add((message.group, message.arrives))
        self._begin_next(message.group, self._rank_of[message.arrives[1]], time)


def _arrival(one: Pass) -> Pass:
    """What a pass waits for: gradients are there for B and for I alike."""
    kind, stage, micro = one
    return ("F" if kind == "F" else "B", stage, micro)
