"""What software spends on messages, from two short calls timed on the ranks themselves.

An all-reduce of a few bytes is nearly all software: recursive doubling as we run it, and the backend's own. Each time gives one
factor for the costs of its side, found by bisection: with it the simulation takes the time that was measured. The ratio of
sending to receiving is left as it is. (Ours is timed inside the runner: what a call costs before that is not in it.)
"""

from collections.abc import Callable
from dataclasses import replace

from thinwire.cluster import Cluster
from thinwire.collectives.choose.call import collective_call
from thinwire.collectives.choose.costs import Costs
from thinwire.collectives.choose.native import simulate_native
from thinwire.collectives.choose.simulate import simulate
from thinwire.collectives.schedules.doubling import recursive_doubling

PROBE_BYTES = 1024
_LEAST, _MOST, _HALVINGS = 1 / 64, 256.0, 30


def calibrated(costs: Costs, cluster: Cluster, ours_s: float, native_s: float) -> Costs:
    """ours_s, native_s: of an all-reduce of PROBE_BYTES among all ranks of `cluster`, by recursive doubling and as it is."""
    call = collective_call(cluster, "all_reduce", PROBE_BYTES)
    schedule = recursive_doubling(call.p)

    inside = replace(costs, call_s=0.0)
    ours = _factor(lambda f: simulate(schedule, PROBE_BYTES, call.routes, inside.scaled(ours=f)).seconds, ours_s)

    def native_simulated_s(factor: float) -> float:
        run = simulate_native(call, None, costs.scaled(native=factor))
        return run.seconds if run else native_s

    return costs.scaled(ours=ours, native=_factor(native_simulated_s, native_s))


def _factor(seconds: Callable[[float], float], measured_s: float) -> float:
    low, high = _LEAST, _MOST
    for _ in range(_HALVINGS):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if seconds(middle) < measured_s else (low, middle)
    return high
