"""Which hosts share an uplink, from how flows slow each other down. No torch.

A flow that is slower among others than the cards at its two ends allow has met the others somewhere between. Rounds in
which everybody sends and receives make that happen on every link that can be short of bandwidth. Pairs of hosts whose
flows are never slowed belong together, those that often are stand on two sides of a shared link. The partition of the
hosts into racks minimises

    sum over pairs in one rack of  (slowed flows - TOLERANCE * flows)

(correlation clustering, Bansal, Blum and Chawla 2004, found here by moving single hosts and merging racks).
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import numpy

from thinwire.measure.fit import Rates, by_end, second_best
from thinwire.measure.rounds import Flow

SLOWED_BELOW = 0.8
TOLERANCE = 0.3
"""Share of slowed flows that noise may cause between hosts of one rack."""
SHARED_BELOW = 0.85
"""An uplink that carries less than this part of what the cards behind it could send is what limits them."""

RESTARTS = 8
TINY = 1e-9


def card_limits(alone: Rates, together: Rates) -> tuple[dict[int, float], dict[int, float]]:
    """The best that each host has sent and received, alone or among others; of several results among others the second best."""

    def limits(end: int) -> dict[int, float]:
        sure, seen = by_end(alone, end), by_end(together, end)
        return {host: max([*sure.get(host, ()), second_best(seen.get(host, ()))]) for host in sure.keys() | seen.keys()}

    return limits(0), limits(1)


@dataclass(frozen=True, slots=True)
class Partition:
    """racks: hosts that no shared link separates, each sorted, in the order of their first host.

    unplaced: hosts whose cards are so slow that a share of a busy link is all they ever wanted; they are in no rack.
    margin: by how many flows the least certain of the others is better placed where it is than anywhere else.
    """

    racks: list[list[int]]
    unplaced: list[int]
    margin: float


def find_racks(
    num_hosts: int, together: Sequence[Sequence[tuple[Flow, float]]], send: Mapping[int, float], receive: Mapping[int, float]
) -> Partition:
    """The best partition that moving hosts and merging racks leads to, from several starts. together: rates, round by round."""
    cost = numpy.zeros((num_hosts, num_hosts))
    counted, silent = numpy.zeros(num_hosts), numpy.zeros(num_hosts)
    for flows in together:
        limits = {flow: min(send[flow[0]], receive[flow[1]]) for flow, _ in flows}
        slowed = {flow: rate for flow, rate in flows if rate < SLOWED_BELOW * limits[flow]}
        usual = median(slowed.values()) if slowed else 0.0
        for flow, _ in flows:
            ends = list(flow)
            if flow not in slowed and SLOWED_BELOW * limits[flow] < usual:
                silent[[host for host in ends if min(send[host], receive[host]) < usual / SLOWED_BELOW]] += 1
                continue
            counted[ends] += 1
            cost[ends, ends[::-1]] += float(flow in slowed) - TOLERANCE
    unplaced = [host for host in range(num_hosts) if silent[host] > counted[host]]
    kept = [host for host in range(num_hosts) if host not in unplaced]
    cost = cost[numpy.ix_(kept, kept)]
    shuffle = random.Random(0)
    starts = [numpy.zeros(len(kept), int), numpy.arange(len(kept))]
    starts += [numpy.array([shuffle.randrange(len(kept)) for _ in kept]) for _ in range(RESTARTS)]
    labels = min((_settle(cost, start) for start in starts), key=lambda found: _total(cost, found))
    racks = [[host for host, own in zip(kept, labels, strict=True) if own == label] for label in dict.fromkeys(labels.tolist())]
    return Partition(sorted(racks), unplaced, min(_margin(cost, labels, place) for place in range(len(kept))))


def together_share(together: Rates, send: Mapping[int, float], receive: Mapping[int, float]) -> float:
    """What the hosts get when all send and receive at once, over what their cards allow."""
    got, allowed = 0.0, 0.0
    for (source, target), rate in together:
        got += rate
        allowed += min(send[source], receive[target])
    return got / allowed if allowed else 1.0


def _settle(cost: numpy.ndarray, labels: numpy.ndarray) -> numpy.ndarray:
    """Move hosts and merge racks while that lowers the sum."""
    num_hosts, labels = len(labels), labels.copy()
    for _ in range(4 * num_hosts):
        changed = False
        for host in range(num_hosts):
            joins = _joins(cost, labels, host)
            wanted = int(joins.argmin())
            if joins[wanted] < joins[labels[host]] - TINY:
                labels[host], changed = wanted, True
        member = numpy.equal.outer(labels, numpy.arange(num_hosts)).astype(float)
        between = member.T @ cost @ member
        numpy.fill_diagonal(between, 0.0)
        a, b = numpy.unravel_index(int(between.argmin()), between.shape)
        if between[a, b] < -TINY:
            labels[labels == b], changed = a, True
        if not changed:
            break
    return labels


def _joins(cost: numpy.ndarray, labels: numpy.ndarray, host: int) -> numpy.ndarray:
    """What `host` would add to the sum in each rack, by label; unused labels stand for a rack of its own: 0."""
    return numpy.bincount(labels, weights=cost[host], minlength=len(labels))


def _margin(cost: numpy.ndarray, labels: numpy.ndarray, host: int) -> float:
    joins = _joins(cost, labels, host)
    own = joins[labels[host]]
    joins[labels[host]] = 0.0
    return float(joins.min() - own)


def _total(cost: numpy.ndarray, labels: numpy.ndarray) -> float:
    return float(cost[numpy.equal.outer(labels, labels)].sum() / 2)
