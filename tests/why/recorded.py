"""Traces as ranks would note them, of steps whose parts are known: each rank's passes, and calls that take what a cluster's price
says."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from thinwire.cluster import Cluster
from thinwire.cluster.graph import Routes
from thinwire.collectives.price import price
from thinwire.why.causes import Case
from thinwire.why.steps import profile
from thinwire.why.trace import BACKWARD, BACKWARD_END, DATA, DATA_END, FORWARD, OPTIMIZER, STEP, Call, Mark, Trace, Wait

OPTIMIZER_S, OUTSIDE_S = 0.001, 0.002


@dataclass(frozen=True, kw_only=True)
class Script:
    """What ranks do in a step. buckets: bytes of each all-reduce, in the backward pass, or if `late` after it."""

    cluster: Cluster
    forward_s: float = 0.05
    buckets: Sequence[int] = (1 << 20,)
    late: bool = False
    data_s: float = 0.0
    slower: Mapping[int, float] = field(default_factory=dict)
    steps: int = 8

    def traces(self, shifts_s: Sequence[float] | None = None) -> list[Trace]:
        """By rank; its clock shows `shifts_s` less than the first one's."""
        ranks = range(self.cluster.world_size)
        shifts = shifts_s or [0.0] * len(ranks)
        routes, group = Routes(self.cluster), tuple(ranks)
        traces: list[Trace] = [[Mark(-shift, STEP)] for shift in shifts]
        now, free = [0.0] * len(ranks), 0.0
        for _ in range(self.steps):
            calls: list[list[Call]] = [[] for _ in ranks]
            begun = []
            for rank in ranks:
                own = traces[rank]
                forward_s = self.forward_s * self.slower.get(rank, 1.0)
                t = now[rank] - shifts[rank]
                own += [Mark(t, DATA), Mark(t + self.data_s, DATA_END)]
                t += self.data_s + OUTSIDE_S
                own += [Mark(t, FORWARD), Mark(t + forward_s, BACKWARD)]
                t += forward_s
                for number, size in enumerate(self.buckets):
                    ready_s = 2 * forward_s if self.late else 2 * forward_s * (number + 1) / len(self.buckets)
                    calls[rank].append(Call(t + ready_s, "all_reduce", size, group))
                begun.append(t + 2 * forward_s)
                if self.late:
                    own.append(Mark(begun[-1], BACKWARD_END))
                own += calls[rank]
            for number, size in enumerate(self.buckets):
                arrived = max(calls[rank][number].issued + shifts[rank] for rank in ranks)
                free = max(free, arrived) + price(routes, "all_reduce", size, group)
                for rank in ranks:
                    calls[rank][number].ended = free - shifts[rank]
            for rank in ranks:
                t, end = begun[rank], free - shifts[rank]
                if self.late:
                    traces[rank] += [Wait(t, end, call) for call in calls[rank][-1:]]
                else:
                    traces[rank].append(Mark(end, BACKWARD_END))
                traces[rank] += [Mark(end, OPTIMIZER), Mark(end + OPTIMIZER_S, STEP)]
                now[rank] = free + OPTIMIZER_S
        return traces

    @property
    def step_s(self) -> float:
        """From the traces themselves."""
        ends = [event.at for event in self.traces()[0] if isinstance(event, Mark) and event.what == STEP]
        return ends[-1] - ends[-2]

    def case(self) -> Case:
        """As the command has it."""
        return Case(profile(self.traces(), [0.0] * self.cluster.world_size), self.cluster)
