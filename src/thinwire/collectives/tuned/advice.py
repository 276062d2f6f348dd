"""Implementations that may be faster than the backend's own, by predicted seconds. Asked on the first rank only.

Costs of messages come from two short calls timed on the ranks themselves. An all-reduce of a few bytes is nearly all software:
recursive doubling as we run it, and the backend's own. Each time gives one factor for the costs of its side, found by bisection:
with it the simulation takes the time that was measured. The ratio of sending to receiving is left as it is. (Ours is timed inside
the runner: what a call costs before that is not in it.)
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

from thinwire.cluster import Cluster
from thinwire.cluster.equal import equal_hosts
from thinwire.collectives.choose.call import collective_call
from thinwire.collectives.choose.costs import Costs
from thinwire.collectives.choose.native import simulate_native
from thinwire.collectives.choose.select import choose
from thinwire.collectives.choose.simulate import simulate
from thinwire.collectives.schedules.doubling import recursive_doubling
from thinwire.collectives.tuned.implementation import NATIVE, Implementation
from thinwire.errors import UserError

TRIED = 3
ASSUMED_BPS, ASSUMED_LATENCY_S = 1e9, 50e-6
"""Of every card, where no cluster is known. What wins is measured, so this only says what is tried."""
PROBE_BYTES = 1024
_LEAST, _MOST, _HALVINGS = 1 / 64, 256.0, 30


class Advisor:
    """cluster: None if none is known. tried: how many implementations are advised."""

    def __init__(self, cluster: Cluster | None = None, *, tried: int = TRIED, costs: Costs | None = None) -> None:
        self.cluster, self.tried, self.costs = cluster, tried, costs or Costs()

    def calibrate(self, p: int, ours_s: float, native_s: float) -> None:
        """Take the costs of messages from what all-reduces of PROBE_BYTES take p ranks, by recursive doubling and as they are."""
        cluster = self.cluster if self.cluster is not None and self.cluster.world_size == p else _assumed(p)
        call, schedule, costs = collective_call(cluster, "all_reduce", PROBE_BYTES), recursive_doubling(p), self.costs
        inside = replace(costs, call_s=0.0)

        def native_simulated_s(factor: float) -> float:
            run = simulate_native(call, None, costs.scaled(native=factor))
            return run.seconds if run else native_s

        ours = _factor(lambda f: simulate(schedule, PROBE_BYTES, call.routes, inside.scaled(ours=f)).seconds, ours_s)
        self.costs = costs.scaled(ours=ours, native=_factor(native_simulated_s, native_s))

    def check(self, ranks: Sequence[int]) -> None:
        """UserError for global `ranks` that the cluster does not have."""
        cluster = self.cluster
        if cluster is not None and max(ranks) >= cluster.world_size:
            raise UserError(
                f"{cluster.name} has {cluster.world_size} ranks, but rank {max(ranks)} runs; give the cluster file of these ranks"
            )

    def implementations(self, op: str, message_bytes: int, ranks: Sequence[int], root: int) -> list[Implementation]:
        """The best first, the native one among them. `ranks`: global, as in the cluster."""
        self.check(ranks)
        cluster = self.cluster
        if cluster is None:
            cluster, ranks = _assumed(len(ranks)), range(len(ranks))
        selection = choose(collective_call(cluster, op, message_bytes, ranks, root), self.costs)
        found: list[Implementation] = []
        names: set[str] = set()
        for one in selection.promising:
            candidate = one.candidate
            if candidate.model is None and candidate.order is None:
                found.append(NATIVE)
            elif len(names) < self.tried and candidate.name not in names:
                names.add(candidate.name)
                found.append(Implementation(candidate.title, candidate.schedule, candidate.order))
        return found


def _assumed(count: int) -> Cluster:
    return equal_hosts(count, ASSUMED_BPS, ASSUMED_LATENCY_S)


def _factor(seconds: Callable[[float], float], measured_s: float) -> float:
    low, high = _LEAST, _MOST
    for _ in range(_HALVINGS):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if seconds(middle) < measured_s else (low, middle)
    return high
