"""Which hosts share an uplink, from how flows slow each other down. No torch.

A flow that is slower among others than the cards at its two ends allow has met the others somewhere between. Rounds in
which everybody sends and receives make that happen on every link that can be short of bandwidth. Pairs of hosts whose
flows are never slowed belong together, those that often are stand on two sides of a shared link. The partition of the
hosts into racks minimises

    sum over pairs in one rack of  (slowed flows - TOLERANCE * flows)

(correlation clustering, Bansal, Blum and Chawla 2004, found here by moving single hosts and merging racks).
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy

from thinwire.measure.rounds import Flow

SLOWED_BELOW = 0.8
TOLERANCE = 0.2
"""Share of slowed flows that noise may cause between hosts of one rack."""
SHARED_BELOW = 0.85
"""An uplink that carries less than this part of what the cards behind it could send is what limits them."""

Rates = Iterable[tuple[Flow, float]]


def card_limits(alone: Rates, together: Rates) -> tuple[dict[int, float], dict[int, float]]:
    """The best that each host has sent and received, alone or among others; of several results among others the second best."""
    best: tuple[dict[int, list[float]], dict[int, list[float]]] = ({}, {})
    sure: tuple[dict[int, float], dict[int, float]] = ({}, {})
    for flow, rate in alone:
        for way, host in enumerate(flow):
            sure[way][host] = max(rate, sure[way].get(host, 0.0))
    for flow, rate in together:
        for way, host in enumerate(flow):
            best[way].setdefault(host, []).append(rate)
    for way in (0, 1):
        for host, rates in best[way].items():
            ordered = sorted(rates)
            seen = ordered[-2] if len(ordered) > 2 else ordered[-1]
            sure[way][host] = max(seen, sure[way].get(host, 0.0))
    return sure


def find_racks(num_hosts: int, together: Rates, send: Mapping[int, float], receive: Mapping[int, float]) -> list[list[int]]:
    """Hosts that no shared link separates, each list sorted, lists in the order of their first host."""
    cost = numpy.zeros((num_hosts, num_hosts))
    for (source, target), rate in together:
        slowed = rate < SLOWED_BELOW * min(send[source], receive[target])
        for a, b in ((source, target), (target, source)):
            cost[a, b] += float(slowed) - TOLERANCE
    starts = (list(range(num_hosts)), [0] * num_hosts)
    best = min((_settle(cost, list(start)) for start in starts), key=lambda labels: _total(cost, labels))
    racks = [[host for host in range(num_hosts) if best[host] == label] for label in dict.fromkeys(best)]
    return sorted(racks)


def together_share(together: Rates, send: Mapping[int, float], receive: Mapping[int, float]) -> float:
    """What the hosts get when all send and receive at once, over what their cards allow."""
    got, allowed = 0.0, 0.0
    for (source, target), rate in together:
        got += rate
        allowed += min(send[source], receive[target])
    return got / allowed if allowed else 1.0


def _settle(cost: numpy.ndarray, labels: list[int]) -> list[int]:
    """Move hosts and merge racks while that lowers the sum."""
    num_hosts = len(labels)
    for _ in range(4 * num_hosts + 8):
        before = _total(cost, labels)
        for host in range(num_hosts):
            joins = {label: cost[host, _members(labels, label, host)].sum() for label in {*labels}}
            fresh = next(label for label in range(num_hosts + 1) if label not in labels)
            joins[fresh] = 0.0
            wanted = min(joins, key=lambda label: (joins[label], label != labels[host]))
            if joins[wanted] < joins[labels[host]] - 1e-9:
                labels[host] = wanted
        merge = min(
            ((cost[numpy.ix_(_members(labels, a), _members(labels, b))].sum(), a, b) for a in {*labels} for b in {*labels} if a < b),
            default=(0.0, 0, 0),
        )
        if merge[0] < -1e-9:
            labels = [merge[1] if label == merge[2] else label for label in labels]
        if _total(cost, labels) >= before - 1e-9:
            break
    return labels


def _members(labels: Sequence[int], label: int, but: int = -1) -> list[int]:
    return [host for host, own in enumerate(labels) if own == label and host != but]


def _total(cost: numpy.ndarray, labels: Sequence[int]) -> float:
    same = numpy.equal.outer(labels, labels)
    numpy.fill_diagonal(same, False)
    return float(cost[same].sum() / 2)
