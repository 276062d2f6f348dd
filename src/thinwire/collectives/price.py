"""What a collective costs on a Cluster, in seconds, from what each link carries; and who carries it, as predictions see it.

    T = rounds * (alpha + o) + max over links (bytes on the link * FRAME_OVERHEAD * 8 / bandwidth)

alpha is the latency of the longest route of the round, o what the software spends on a message. The second term is exact for
patterns in which all flows run all the time (rings, all-to-all): the fullest link is then always busy. Patterns that take turns
(trees) are priced round by round. (Alpha-beta model: Hockney 1994; sharing: each link divides its rate among its flows.)
"""

from collections.abc import Iterable, Sequence
from math import ceil, log2

from thinwire.cluster import FRAME_OVERHEAD, Link
from thinwire.cluster.graph import Routes
from thinwire.collectives.wire import Flow, binomial_rounds, flows
from thinwire.traffic import Transfer

MESSAGE_OVERHEAD_S = 150e-6
"""o: what gloo and the kernel spend on one message, all ranks of a small machine busy (measured on loopback and veth)."""


def price(routes: Routes, op: str, message_bytes: int, ranks: Sequence[int], root: int = 0) -> float:
    """Seconds of one call of `op` by the group `ranks` (global, in the order of the group), nothing else on the wires."""
    return _seconds(routes, ranks, _turns(op, message_bytes, len(ranks), root))


def _seconds(routes: Routes, ranks: Sequence[int], turns: Iterable[tuple[int, tuple[Flow, ...]]]) -> float:
    seconds = 0.0
    for count, turn in turns:
        placed = [(ranks[source], ranks[target], size) for source, target, size in turn]
        busy = max((link_seconds(link, size) for link, size in routes.load(placed).items()), default=0.0)
        ways = [routes.between(source, target) for source, target, _ in placed]
        latency = max((sum(link.latency_s.value for link in way) for way in ways), default=0.0)
        seconds += count * (latency + MESSAGE_OVERHEAD_S) + busy
    return seconds


def link_seconds(link: Link, payload_bytes: float) -> float:
    """How long `link` is busy with that many payload bytes."""
    return payload_bytes * FRAME_OVERHEAD * 8 / link.bandwidth_bps.value


def _turns(op: str, message_bytes: int, p: int, root: int) -> list[tuple[int, tuple[Flow, ...]]]:
    """(rounds, flows of all these rounds together), in the order in which they happen."""
    everything = flows(op, message_bytes, p, root)
    if p == 1:
        return []
    match op:
        case "all_reduce" | "reduce_scatter":
            return [(2 * (p - 1), everything)]
        case "all_gather":
            return [(p - 1, everything)]
        case "reduce":
            return [(p - 1, everything[:p]), (1, everything[p:])]
        case "broadcast":
            return [(1, turn) for turn in binomial_rounds(message_bytes, p, root)]
        case "barrier":
            return [(ceil(log2(p)), ())]
        case _:
            return [(1, everything)]


class Carrier:
    """gloo's own algorithms. `group`: global ranks, in the order of the group; flows are between positions in it."""

    def flows(self, transfer: Transfer, group: Sequence[int]) -> tuple[Flow, ...]:
        """(source, target, payload bytes) of one call."""
        if transfer.around:
            return tuple((rank, (rank + 1) % len(group), transfer.message_bytes) for rank in range(len(group)))
        return flows(transfer.op, transfer.message_bytes, len(group))

    def seconds(self, routes: Routes, transfer: Transfer, group: Sequence[int]) -> float:
        """Of one call, nothing else on the wires."""
        if transfer.around:
            return _seconds(routes, group, [(1, self.flows(transfer, group))])
        return price(routes, transfer.op, transfer.message_bytes, group)

    def about(self) -> str:
        """In words, for the assumptions of a prediction."""
        return "gloo's own algorithms"
