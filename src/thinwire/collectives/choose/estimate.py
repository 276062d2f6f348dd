"""About how long a schedule takes in k segments, without going through its events: enough to throw out what is far off.

    T_k = max(W / k + B (1 - 1/k), k O + G) + sum over steps (alpha_t + o_t + g_t / k)

W      seconds on the wire if the steps were taken one after the other: the sum of what the fullest link of each carries,
       acknowledgements included, without what buckets let pass
B      seconds of the link that is fullest over all steps
O, o_t software of the busiest rank, in all steps and in step t; where cores are shared, what each core has to do if that is more
G, g_t additions, likewise
alpha  the longest latency of a step, and the time to wake up

Exact for a ring (W = B) and for a pipelined chain (W = (p-1) B, so (p-2+k)/k B), apart from overheads.
"""

from collections import Counter
from collections.abc import Callable, Sequence

from thinwire.cluster import Link
from thinwire.collectives.choose.call import CollectiveCall
from thinwire.collectives.choose.costs import Costs
from thinwire.collectives.choose.links import payload_burst
from thinwire.collectives.choose.simulate import chunk_bytes
from thinwire.collectives.price import link_seconds
from thinwire.collectives.schedules.schedule import Schedule


def estimate(schedule: Schedule, call: CollectiveCall, costs: Costs) -> Callable[[int], float]:
    """T_k in seconds, as a function of k; `schedule` is in one segment."""
    lengths = chunk_bytes(schedule, call.message_bytes)
    cores = costs.cores(schedule.p) or schedule.p
    total: Counter[Link] = Counter()
    full: dict[Link, float] = {}
    software: Counter[int] = Counter()
    added: Counter[int] = Counter()
    step_wires_s = steps_s = steps_added_s = 0.0
    for step in schedule.steps:
        loads: Counter[Link] = Counter()
        work: Counter[int] = Counter()
        sums: Counter[int] = Counter()
        longest_s = 0.0
        for message in step:
            size = sum(lengths[chunk] for chunk in message.chunks)
            if not size:
                continue
            work[message.source] += costs.send_s  # type: ignore[assignment]
            work[message.target] += costs.receive_s  # type: ignore[assignment]
            if message.reduce:
                sums[message.target] += size * costs.reduce_s_per_byte  # type: ignore[assignment]
            route = call.routes.between(message.source, message.target)
            slow = size - _passing(full, route, size)
            for link in route:
                loads[link] += slow  # type: ignore[assignment]
            for link in call.routes.between(message.target, message.source):
                loads[link] += costs.acknowledged * slow  # type: ignore[assignment]
            longest_s = max(longest_s, sum(link.latency_s.value for link in route))
        step_wires_s += max((link_seconds(link, size) for link, size in loads.items()), default=0.0)
        steps_s += longest_s + costs.wake_s + _busiest(work, cores)
        steps_added_s += _busiest(sums, cores)
        total.update(loads)
        software.update(work)
        added.update(sums)
    fullest_s = max((link_seconds(link, size) for link, size in total.items()), default=0.0)
    software_s, added_s = _busiest(software, cores), _busiest(added, cores)

    def seconds(k: int) -> float:
        wire_s = step_wires_s / k + fullest_s * (1 - 1 / k)
        return max(wire_s, k * software_s + added_s) + steps_s + steps_added_s / k

    return seconds


def _passing(full: dict[Link, float], route: Sequence[Link], size: int) -> float:
    """Bytes that pass at once, as in `links`; `full`: what is left in those that were asked for. They do not fill again here."""
    free = min((full.setdefault(link, payload_burst(link)) for link in route), default=0.0)
    free = min(free, size)
    for link in route:
        full[link] -= free
    return free


def _busiest(work: Counter[int], cores: int) -> float:
    return max(max(work.values(), default=0.0), sum(work.values()) / cores)
