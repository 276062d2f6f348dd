"""The probe from beginning to end: every rank of a gloo group calls `measure` and gets the same findings.

    find      who is where; ranks of one host are one host with several devices
    latency   round trips of one byte, all pairs, in rounds of disjoint pairs
    alone     each card once as sender and once as receiver with nothing else under way
    together  all hosts send and receive at once, in many pairings: who slows whom -> racks (four hosts or more)
    cards     disjoint pairs inside the racks, one way at a time: the rates of the cards
    uplinks   as many flows as possible out of and into each rack: the rates of the uplinks, or that there is none
    compute   training steps and matrix products, all ranks at once

Rounds grow with the number of hosts, not with its square: 8 hosts take about 20 s.
"""

import datetime
import socket
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, TypeVar

import torch.distributed as dist

from thinwire.cluster import FRAME_OVERHEAD
from thinwire.errors import UserError
from thinwire.measure import compute, rounds
from thinwire.measure.findings import Findings, HostFound, RackFound, unique_names
from thinwire.measure.fit import Estimate, card_rates, estimate, split_latencies
from thinwire.measure.links import Links, Sample
from thinwire.measure.racks import SHARED_BELOW, card_limits, find_racks, together_share
from thinwire.measure.wire import Peer, address_towards, listen

ALONE_S, TOGETHER_S, CARDS_S, UPLINKS_S = 0.3, 0.4, 0.5, 0.6
REPETITIONS = 3
ENOUGH_BYTES = 100_000
"""A flow lasts until the slowest card has carried this much ..."""
ENOUGH_TRIPS = 20
"""... and for this many round trips, so that TCP is past its slow start; but not longer than:"""
LONGEST_S = 5.0
TWO_PASSES_UP_TO = 9
SHARING_FROM = 4
"""With fewer hosts no two flows without a common end can go the same way over one link."""

T = TypeVar("T")
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Seat:
    """This process among the ranks of the default gloo group, and where rank 0 is to be found."""

    rank: int
    world_size: int
    local_rank: int
    master_address: str
    master_port: int


@dataclass(frozen=True)
class _Wire:
    """All that was measured between hosts; indices of hosts, payload rates."""

    send: dict[int, Estimate]
    receive: dict[int, Estimate]
    racks: list[tuple[list[int], Estimate, Estimate, tuple[float, float]]]
    halves: dict[tuple[int, int], list[float]]
    together: float


def gather(value: T) -> list[T]:
    """The values of all ranks, on all of them. Collective."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def measure(seat: Seat, dtype: str, say: Say) -> Findings:
    """Probe as one of the ranks. Collective. dtype: "float32", "bfloat16" or "auto". `say` hears a line a phase on rank 0."""
    if seat.world_size < 2:
        raise UserError("a probe measures between ranks, but only one was started; start one on each machine")
    begun = time.perf_counter()
    phase = _Phases(say if seat.rank == 0 else lambda _: None)
    device = compute.find_device(seat.local_rank)
    with listen() as listener:
        address = address_towards(seat.master_address, seat.master_port)
        told = gather((socket.gethostname(), address, listener.getsockname()[1], compute.kind_of(device)))
        homes: dict[tuple[str, str], list[int]] = defaultdict(list)
        for rank, (host, host_address, _, _) in enumerate(told):
            homes[host, host_address].append(rank)
        names = unique_names([host for host, _ in homes])
        leads = [ranks[0] for ranks in homes.values()]
        several = len(homes) > 1
        peers = [
            Peer(name, seat.master_address if several and told[lead][1].startswith("127.") else told[lead][1], told[lead][2])
            for name, lead in zip(names, leads, strict=True)
        ]
        me = leads.index(seat.rank) if seat.rank in leads else None
        links = Links(peers, me, listener, gather, dist.barrier)
        phase("hosts", f"{len(peers)} hosts, {seat.world_size} ranks")
        wire = _measure_wire(links, len(peers), names, phase) if several else None
    own = next(ranks for ranks in homes.values() if seat.rank in ranks)
    chosen = gather(compute.fast_dtype(device) if dtype == "auto" and seat.rank == 0 else dtype)[0]
    computed = gather((compute.compute(device, chosen, dist.barrier), compute.memory_bytes(device, len(own))))
    phase("compute", f"{chosen}, all ranks at once")

    rack_names = unique_names([f"rack{index}" for index in range(len(wire.racks) if wire else 0)], [*names, "switch"])
    rack_of = {host: index for index, (hosts, *_) in enumerate(wire.racks) for host in hosts} if wire else {}
    latencies, up_latencies = _latencies(wire.halves, len(peers), rack_of) if wire else ([], {})
    found = []
    for index, ranks in enumerate(homes.values()):
        mine = [computed[rank] for rank in ranks]
        found.append(
            HostFound(
                name=names[index],
                address=peers[index].address,
                ranks=tuple(ranks),
                kind=told[ranks[0]][3],
                rack=rack_names[rack_of[index]] if index in rack_of else None,
                send_bps=wire.send[index].scaled(FRAME_OVERHEAD) if wire else None,
                receive_bps=wire.receive[index].scaled(FRAME_OVERHEAD) if wire else None,
                latency_s=latencies[index] if wire else None,
                flops_per_s=estimate([rate for rates, _ in mine for rate in rates.steps_flops_per_s]),
                matmul_flops_per_s=median(rates.matmul_flops_per_s for rates, _ in mine),
                memory_bytes=min(memory for _, memory in mine),
            )
        )
    racks = [
        RackFound(
            name=rack_names[index],
            hosts=tuple(names[host] for host in hosts),
            up_bps=up.scaled(FRAME_OVERHEAD),
            down_bps=down.scaled(FRAME_OVERHEAD),
            latency_s=up_latencies[index],
            cards_bps=(cards[0] * FRAME_OVERHEAD, cards[1] * FRAME_OVERHEAD),
        )
        for index, (hosts, up, down, cards) in enumerate(wire.racks if wire else [])
    ]
    return Findings(
        hosts=tuple(found),
        racks=tuple(racks),
        together=wire.together if wire else 1.0,
        dtype=chosen,
        date=datetime.date.today().isoformat(),
        seconds=time.perf_counter() - begun,
    )


class _Phases:
    """A line for each phase, with its seconds."""

    def __init__(self, say: Say) -> None:
        self._say, self._since = say, time.perf_counter()

    def __call__(self, name: str, what: str) -> None:
        now = time.perf_counter()
        self._say(f"{name:<9} {now - self._since:5.1f} s   {what}")
        self._since = now


def _measure_wire(links: Links, num_hosts: int, names: Sequence[str], phase: _Phases) -> _Wire:
    halves = links.trips(rounds.tournament(num_hosts))
    slowest_trip_s = 2 * max(median(samples) for samples in halves.values())
    phase("latency", f"{len(halves)} pairs")

    alone = links.stream(rounds.one_by_one(num_hosts), max(ALONE_S, min(LONGEST_S, ENOUGH_TRIPS * slowest_trip_s)))
    slowest_bps = max(1.0, min(sample.steady_bps for sample in alone))
    at_least_s = min(LONGEST_S, max(8 * ENOUGH_BYTES / slowest_bps, ENOUGH_TRIPS * slowest_trip_s))
    phase("alone", f"{num_hosts} hosts, one flow at a time")

    together: list[Sample] = []
    groups = [list(range(num_hosts))]
    if num_hosts >= SHARING_FROM:
        pairings = rounds.everybody(num_hosts, passes=2 if num_hosts <= TWO_PASSES_UP_TO else 1)
        together = links.stream(pairings, max(TOGETHER_S, at_least_s))
    send, receive = card_limits(_steady(alone), _mean(together))
    _refuse_dead_lines(send, receive, names)
    if together:
        groups = find_racks(num_hosts, _mean(together), send, receive)
        phase("together", f"all {num_hosts} hosts at once, {len(pairings)} pairings")

    # Hosts that stand alone have no uplink that could be told from their card.
    lonely = [host for group in groups if len(group) == 1 for host in group]
    groups = [group for group in groups if len(group) > 1]
    inside = links.stream(rounds.inside([*groups, lonely], REPETITIONS), max(CARDS_S, at_least_s))
    cards_send = card_rates(_by_end(inside, 0), _by_end([*alone, *together], 0))
    cards_receive = card_rates(_by_end(inside, 1), _by_end([*alone, *together], 1))
    phase("cards", "pairs that share no uplink, one way at a time")

    racks = _uplinks(links, [*groups, *([lonely] if lonely else [])], cards_send, cards_receive, max(UPLINKS_S, at_least_s))
    racks = [rack for rack in racks if rack[0] != lonely]
    if len(groups) > 1 or (groups and lonely):
        phase("uplinks", f"{len(racks)} shared" if racks else "none is shared")
    share = together_share(_mean(together), send, receive) if together else 1.0
    return _Wire(cards_send, cards_receive, racks, halves, share)


def _uplinks(
    links: Links, groups: list[list[int]], send: dict[int, Estimate], receive: dict[int, Estimate], seconds: float
) -> list[tuple[list[int], Estimate, Estimate, tuple[float, float]]]:
    """Load each group's way out and its way in. A group that gets what its cards allow both ways has no uplink of its own."""
    if len(groups) < 2:
        return []
    speed = {host: min(send[host].value, receive[host].value) for host in send}
    ways = [way for own in range(len(groups)) for way in rounds.across(groups, own, speed)]
    totals: list[list[float]] = [[] for _ in ways]
    samples = links.stream(ways * REPETITIONS, seconds)
    for repetition in range(REPETITIONS):
        for index in range(len(ways)):
            at = repetition * len(ways) + index
            totals[index].append(sum(sample.mean_bps for sample in samples if sample.round == at))
    racks = []
    for own, group in enumerate(groups):
        up, down = estimate(totals[2 * own]), estimate(totals[2 * own + 1])
        out, back = (sum(min(send[a].value, receive[b].value) for a, b in ways[2 * own + way]) for way in (0, 1))
        if len(ways[2 * own]) > 1 and (up.value < SHARED_BELOW * out or down.value < SHARED_BELOW * back):
            racks.append((group, up, down, (out, back)))
    return racks


def _latencies(
    halves: dict[tuple[int, int], list[float]], num_hosts: int, rack_of: dict[int, int]
) -> tuple[list[Estimate], dict[int, float]]:
    pairs = {pair: estimate(samples) for pair, samples in halves.items()}
    value, up = split_latencies({pair: found.value for pair, found in pairs.items()}, num_hosts, rack_of)
    low, _ = split_latencies({pair: found.low for pair, found in pairs.items()}, num_hosts, rack_of)
    high, _ = split_latencies({pair: found.high for pair, found in pairs.items()}, num_hosts, rack_of)
    return [Estimate(v, min(v, a), max(v, b)) for v, a, b in zip(value, low, high, strict=True)], up


def _refuse_dead_lines(send: dict[int, float], receive: dict[int, float], names: Sequence[str]) -> None:
    for rates, what in ((send, "sent nothing that arrived"), (receive, "received nothing")):
        for host, rate in rates.items():
            if rate <= 0:
                raise UserError(f"{names[host]} {what} in {LONGEST_S:g} s; the probe needs TCP between all hosts, on any port")


def _steady(samples: Sequence[Sample]) -> list[tuple[rounds.Flow, float]]:
    return [(sample.flow, sample.steady_bps) for sample in samples]


def _mean(samples: Sequence[Sample]) -> list[tuple[rounds.Flow, float]]:
    return [(sample.flow, sample.mean_bps) for sample in samples]


def _by_end(samples: Sequence[Sample], end: int) -> dict[int, list[float]]:
    """Rates of the flows that each host sends (end 0) or receives (end 1)."""
    rates: dict[int, list[float]] = defaultdict(list)
    for sample in samples:
        rates[sample.flow[end]].append(sample.steady_bps)
    return dict(rates)
