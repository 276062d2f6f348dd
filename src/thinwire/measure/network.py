"""The network between hosts, from rounds of flows: cards, racks, uplinks, latencies. No torch.

    latency   round trips of one byte, all pairs, in rounds of disjoint pairs
    alone     each card once as sender and once as receiver with nothing else under way
    together  all hosts send and receive at once, in many pairings: who slows whom -> racks (four hosts or more)
    cards     disjoint pairs inside the racks, one way at a time: the rates of the cards
    uplinks   as many flows as possible out of and into each rack: the rates of the uplinks, or that there is none

Rounds grow with the number of hosts, not with its square. What cannot be seen: a card faster than every other card (it
is known only to be as fast as the second fastest), an uplink that could carry 85 % or more of what the cards behind it
send, and which of two racks is the short one where there are just two: both get the same rate.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Protocol

from thinwire.errors import UserError
from thinwire.measure import rounds
from thinwire.measure.fit import Estimate, card_rates, estimate, split_latencies
from thinwire.measure.links import Sample
from thinwire.measure.racks import SHARED_BELOW, Partition, card_limits, find_racks, together_share
from thinwire.measure.rounds import Flow, Round

ALONE_S, TOGETHER_S, CARDS_S, UPLINKS_S = 0.3, 0.4, 0.5, 0.5
REPETITIONS = 3
MANY_UPLINKS = 4
ENOUGH_BYTES = 100_000
"""A flow lasts until the slowest card has carried this much ..."""
ENOUGH_TRIPS = 20
"""... and for this many round trips, so that TCP is past its slow start; but not longer than:"""
LONGEST_S = 5.0
FIRST_PASSES, FIRST_PASSES_UP_TO, MOST_PASSES = 2, 16, 4
CERTAIN = 1.0
"""Passes of pairings: two at first (one where there are many hosts), more while a host's place hangs on less than a flow."""
SHARING_FROM = 4
"""With fewer hosts no two flows without a common end can go the same way over one link."""


class Streams(Protocol):
    """What `Links` does."""

    def stream(self, rounds: Sequence[Round], seconds: float) -> list[Sample]: ...

    def trips(self, rounds: Sequence[Round]) -> dict[Flow, list[float]]: ...


@dataclass(frozen=True, kw_only=True)
class Uplink:
    """Of a rack: hosts by index, payload rates. cards_bps: what the flows could be, out and in, if only cards limited them."""

    hosts: tuple[int, ...]
    up_bps: Estimate
    down_bps: Estimate
    cards_bps: tuple[float, float]
    latency_s: float


@dataclass(frozen=True, kw_only=True)
class Network:
    """By index of the host; payload rates. latency_s: of each host's cable. together: see `Findings`."""

    send_bps: tuple[Estimate, ...]
    receive_bps: tuple[Estimate, ...]
    latency_s: tuple[Estimate, ...]
    uplinks: tuple[Uplink, ...]
    together: float

    def rack_of(self, host: int) -> int | None:
        """Index of the uplink behind which the host stands."""
        return next((index for index, uplink in enumerate(self.uplinks) if host in uplink.hosts), None)


class Phases:
    """Says a line for each phase, with its seconds."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say, self._since = say, time.perf_counter()

    def __call__(self, name: str, what: str) -> None:
        now = time.perf_counter()
        self._say(f"{name:<9} {now - self._since:5.1f} s   {what}")
        self._since = now


def measure_network(links: Streams, names: Sequence[str], phase: Phases) -> Network:
    """Two hosts or more. Collective: every process calls it with the same names. UserError where nothing gets through."""
    num_hosts = len(names)
    halves = links.trips(rounds.tournament(num_hosts))
    trips_s = ENOUGH_TRIPS * 2 * max(median(samples) for samples in halves.values())
    phase("latency", f"{len(halves)} pairs")

    alone = links.stream(rounds.one_by_one(num_hosts), max(ALONE_S, min(LONGEST_S, trips_s)))
    _refuse_dead_lines(alone, names)
    slowest_bps = min(sample.mean_bps for sample in alone)
    least_s = min(LONGEST_S, max(8 * ENOUGH_BYTES / slowest_bps, trips_s))
    phase("alone", f"{num_hosts} hosts, one flow at a time")

    together: list[Sample] = []
    groups, share = [list(range(num_hosts))], 1.0
    if num_hosts >= SHARING_FROM:
        groups, share = _racks(links, num_hosts, alone, together, max(TOGETHER_S, least_s))
        phase("together", f"all {num_hosts} hosts at once, {len(together)} flows")

    # Hosts that stand alone have no uplink that could be told from their card.
    lonely = [host for group in groups if len(group) == 1 for host in group]
    groups = [group for group in groups if len(group) > 1]
    inside = links.stream(rounds.inside([*groups, lonely], REPETITIONS), max(CARDS_S, least_s))
    cards_send = card_rates(_by_end([*alone, *inside], 0), _by_end(together, 0))
    cards_receive = card_rates(_by_end([*alone, *inside], 1), _by_end(together, 1))
    phase("cards", "pairs that share no uplink, one way at a time")

    found: list[Uplink] = []
    if len(groups) > 1 or (groups and lonely):
        found = _uplinks(links, groups, lonely, (cards_send, cards_receive), max(UPLINKS_S, least_s))
        phase("uplinks", f"{len(found)} shared" if found else "none is shared")
    latencies, up_latencies = _latencies(halves, num_hosts, found)
    return Network(
        send_bps=tuple(cards_send[host] for host in range(num_hosts)),
        receive_bps=tuple(cards_receive[host] for host in range(num_hosts)),
        latency_s=latencies,
        uplinks=tuple(
            Uplink(hosts=u.hosts, up_bps=u.up_bps, down_bps=u.down_bps, cards_bps=u.cards_bps, latency_s=latency)
            for u, latency in zip(found, up_latencies, strict=True)
        ),
        together=share,
    )


def _racks(
    links: Streams, num_hosts: int, alone: Sequence[Sample], together: list[Sample], seconds: float
) -> tuple[list[list[int]], float]:
    """The racks as far as flows have slowed each other, and the share of `Network.together`. Fills `together`.

    Goes on until every host's place is certain by a flow or more.
    """
    by_round: list[list[tuple[Flow, float]]] = []
    for done in range(1, MOST_PASSES + 1):
        pairings = rounds.everybody(num_hosts, seed=done)
        samples = links.stream(pairings, seconds)
        together += samples
        by_round += [[(sample.flow, sample.mean_bps) for sample in samples if sample.round == n] for n in range(len(pairings))]
        if done < FIRST_PASSES and num_hosts <= FIRST_PASSES_UP_TO:
            continue
        rates = [flow for flows in by_round for flow in flows]
        send, receive = card_limits([(sample.flow, sample.steady_bps) for sample in alone], rates)
        found = find_racks(num_hosts, by_round, send, receive)
        if found.margin >= CERTAIN:
            break
    speed = {host: min(send[host], receive[host]) for host in send}
    return _place(links, found, speed, seconds), together_share(rates, send, receive)


def _place(links: Streams, found: Partition, speed: Mapping[int, float], seconds: float) -> list[list[int]]:
    """Put hosts that are too slow to be slowed into racks: where a flow of theirs takes away from what the others get out."""
    racks = [list(rack) for rack in found.racks]
    if len(racks) == 1:
        return [sorted([*racks[0], *found.unplaced])]
    for host in found.unplaced:
        tests: list[Round] = []
        for own in range(len(found.racks)):
            *others, (_, target) = rounds.across(found.racks, own, speed)[0]
            tests += [others, [*others, (host, target)]]
        sums = [0.0] * (2 * len(tests))
        for sample in links.stream(tests * 2, seconds):
            if sample.flow[0] != host:
                sums[sample.round] += sample.mean_bps
        half = len(tests)
        lost = [sum(sums[i] - sums[i + 1] for i in (2 * own, 2 * own + half)) / 2 for own in range(len(found.racks))]
        homes = [own for own, rate_bps in enumerate(lost) if rate_bps > 0.5 * speed[host]]
        if len(homes) == 1:
            racks[homes[0]] = sorted([*racks[homes[0]], host])
        else:  # It takes from nobody, or on the way into a rack, whoever sends there: it stands in none of them.
            racks.append([host])
    return sorted(racks)


def _uplinks(
    links: Streams,
    groups: Sequence[Sequence[int]],
    lonely: Sequence[int],
    cards: tuple[Mapping[int, Estimate], Mapping[int, Estimate]],
    seconds: float,
) -> list[Uplink]:
    """Load each group's way out and its way in. A group that gets what its cards allow both ways has no uplink of its own."""
    send, receive = cards
    speed = {host: min(send[host].value, receive[host].value) for host in send}
    others = [*groups, *([lonely] if lonely else [])]
    ways = [way for own in range(len(groups)) for way in rounds.across(others, own, speed)]
    repetitions = REPETITIONS if len(groups) <= MANY_UPLINKS else REPETITIONS - 1
    sums = [0.0] * (len(ways) * repetitions)
    for sample in links.stream(ways * repetitions, seconds):
        sums[sample.round] += sample.mean_bps
    found = []
    for own, group in enumerate(groups):
        out, back = ways[2 * own : 2 * own + 2]
        up, down = (estimate(sums[index :: len(ways)]) for index in (2 * own, 2 * own + 1))
        allowed = tuple(sum(min(send[a].value, receive[b].value) for a, b in way) for way in (out, back))
        if len(out) > 1 and (up.value < SHARED_BELOW * allowed[0] or down.value < SHARED_BELOW * allowed[1]):
            found.append(Uplink(hosts=tuple(group), up_bps=up, down_bps=down, cards_bps=(allowed[0], allowed[1]), latency_s=0.0))
    return found


def _latencies(
    halves: Mapping[Flow, Sequence[float]], num_hosts: int, found: Sequence[Uplink]
) -> tuple[tuple[Estimate, ...], list[float]]:
    """Of each host's cable, and of each uplink."""
    rack_of = {host: index for index, uplink in enumerate(found) for host in uplink.hosts}
    pairs = {pair: estimate(samples) for pair, samples in halves.items()}
    value, up = split_latencies({pair: half.value for pair, half in pairs.items()}, num_hosts, rack_of)
    low, _ = split_latencies({pair: half.low for pair, half in pairs.items()}, num_hosts, rack_of)
    high, _ = split_latencies({pair: half.high for pair, half in pairs.items()}, num_hosts, rack_of)
    cables = tuple(Estimate(v, min(v, a), max(v, b)) for v, a, b in zip(value, low, high, strict=True))
    return cables, [up[index] for index in range(len(found))]


def _refuse_dead_lines(alone: Sequence[Sample], names: Sequence[str]) -> None:
    for sample in alone:
        if sample.mean_bps <= 0:
            source, target = (names[host] for host in sample.flow)
            raise UserError(f"nothing that {source} sent arrived at {target}; the probe needs TCP between all hosts, on any port")


def _by_end(samples: Sequence[Sample], end: int) -> dict[int, list[float]]:
    """Rates of the flows that each host sends (end 0) or receives (end 1)."""
    rates: dict[int, list[float]] = defaultdict(list)
    for sample in samples:
        rates[sample.flow[end]].append(sample.steady_bps)
    return dict(rates)
