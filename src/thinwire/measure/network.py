"""The network between hosts, from rounds of flows: cards, racks, uplinks, latencies. No torch.

    latency   round trips of one byte, all pairs, in rounds of disjoint pairs
    alone     each card once as sender and once as receiver with nothing else under way
    together  all hosts send and receive at once, in many pairings: who slows whom -> racks (four hosts or more)
    cards     disjoint pairs inside the racks, one direction at a time: the rates of the cards
    uplinks   as many flows as possible out of and into each rack: the rates of the uplinks, or that there is none

Rounds grow with the number of hosts, not with its square. What cannot be seen: a card faster than every other card (it
is known only to be as fast as the second fastest), an uplink that could carry 85 % or more of what the cards behind it
send, and which of two racks is the short one where there are just two: both get the same rate.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

from thinwire.errors import UserError
from thinwire.measure import rounds
from thinwire.measure.findings import CORE, RackFound, unique_names
from thinwire.measure.fit import Estimate, by_end, card_rates, estimate, split_latencies
from thinwire.measure.links import Links, Sample
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
"""With fewer hosts no two flows without a common end can share one direction of a link."""


@dataclass(frozen=True, kw_only=True)
class Network:
    """By index of the host; line rates. latency_s: of each host's cable. together: see `Findings`."""

    send_bps: tuple[Estimate, ...]
    receive_bps: tuple[Estimate, ...]
    latency_s: tuple[Estimate, ...]
    racks: tuple[RackFound, ...]
    together: float


class Phases:
    """Prints a line for each phase, with its seconds."""

    def __init__(self, print_line: Callable[[str], None]) -> None:
        self._print_line, self._since = print_line, time.perf_counter()

    def __call__(self, name: str, what: str) -> None:
        now = time.perf_counter()
        self._print_line(f"{name:<9} {now - self._since:5.1f} s   {what}")
        self._since = now


def measure_network(links: Links, names: Sequence[str], phase: Phases) -> Network:
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

    # Hosts that stand alone have no uplink that could be distinguished from their card.
    lonely = [host for group in groups if len(group) == 1 for host in group]
    groups = [group for group in groups if len(group) > 1]
    inside = links.stream(rounds.inside([*groups, lonely], REPETITIONS), max(CARDS_S, least_s))
    undisturbed, disturbed = ([(sample.flow, sample.steady_bps) for sample in kept] for kept in ([*alone, *inside], together))
    cards_send, cards_receive = (card_rates(by_end(undisturbed, end), by_end(disturbed, end)) for end in (0, 1))
    phase("cards", "pairs that share no uplink, one direction at a time")

    racks: list[RackFound] = []
    if len(groups) > 1 or (groups and lonely):
        racks = _uplinks(links, names, (groups, lonely), (cards_send, cards_receive), max(UPLINKS_S, least_s))
        phase("uplinks", f"{len(racks)} shared" if racks else "none is shared")
    latencies, up_latencies = _latencies(halves, names, racks)
    return Network(
        send_bps=tuple(cards_send[host] for host in range(num_hosts)),
        receive_bps=tuple(cards_receive[host] for host in range(num_hosts)),
        latency_s=latencies,
        racks=tuple(replace(rack, latency_s=up_latencies[index]) for index, rack in enumerate(racks)),
        together=share,
    )


def _racks(
    links: Links, num_hosts: int, alone: Sequence[Sample], together: list[Sample], seconds: float
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


def _place(links: Links, found: Partition, speed: Mapping[int, float], seconds: float) -> list[list[int]]:
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
        else:  # It takes from nobody, or from whoever sends into its rack: it stands in none of them.
            racks.append([host])
    return sorted(racks)


def _uplinks(
    links: Links,
    names: Sequence[str],
    placed: tuple[Sequence[Sequence[int]], Sequence[int]],
    cards: tuple[Mapping[int, Estimate], Mapping[int, Estimate]],
    seconds: float,
) -> list[RackFound]:
    """Load each group's uplink in both directions. placed: the groups, and the hosts that stand alone; latencies follow later.

    A group that gets what its cards allow in both directions has no uplink of its own.
    """
    (groups, lonely), (send, receive) = placed, cards
    speed = {host: min(send[host].value, receive[host].value) for host in send}
    others = [*groups, *([lonely] if lonely else [])]
    loads = [load for own in range(len(groups)) for load in rounds.across(others, own, speed)]
    repetitions = REPETITIONS if len(groups) <= MANY_UPLINKS else REPETITIONS - 1
    sums = [0.0] * (len(loads) * repetitions)
    for sample in links.stream(loads * repetitions, seconds):
        sums[sample.round] += sample.mean_bps
    rack_names = unique_names([f"rack{index}" for index in range(len(groups))], [CORE, *names])
    found: list[RackFound] = []
    for own, group in enumerate(groups):
        up, down = (estimate(sums[index :: len(loads)]) for index in (2 * own, 2 * own + 1))
        out, back = loads[2 * own : 2 * own + 2]
        out_bps, in_bps = (sum(min(send[a].value, receive[b].value) for a, b in load) for load in (out, back))
        if len(out) > 1 and (up.value < SHARED_BELOW * out_bps or down.value < SHARED_BELOW * in_bps):
            hosts, cards_bps = tuple(names[host] for host in group), (out_bps, in_bps)
            name = rack_names[len(found)]
            found.append(RackFound(name=name, hosts=hosts, up_bps=up, down_bps=down, latency_s=0.0, cards_bps=cards_bps))
    return found


def _latencies(
    halves: Mapping[Flow, Sequence[float]], names: Sequence[str], racks: Sequence[RackFound]
) -> tuple[tuple[Estimate, ...], dict[int, float]]:
    """Of each host's cable, and of each rack's uplink by its index."""
    rack_of = {names.index(host): index for index, rack in enumerate(racks) for host in rack.hosts}
    pairs = {pair: estimate(samples) for pair, samples in halves.items()}
    value, up = split_latencies({pair: half.value for pair, half in pairs.items()}, len(names), rack_of)
    low, _ = split_latencies({pair: half.low for pair, half in pairs.items()}, len(names), rack_of)
    high, _ = split_latencies({pair: half.high for pair, half in pairs.items()}, len(names), rack_of)
    return tuple(Estimate(v, min(v, a), max(v, b)) for v, a, b in zip(value, low, high, strict=True)), up


def _refuse_dead_lines(alone: Sequence[Sample], names: Sequence[str]) -> None:
    for sample in alone:
        if sample.mean_bps <= 0:
            source, target = (names[host] for host in sample.flow)
            raise UserError(f"nothing that {source} sent arrived at {target}; the probe needs TCP between all hosts, on any port")
