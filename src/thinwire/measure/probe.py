"""The probe from beginning to end: every rank of a gloo group calls `measure` and gets the same findings.

Ranks of one machine are one host with several devices; the first of them sends and receives for it. First the network
(`thinwire.measure.network`), over plain TCP sockets, then the devices (`thinwire.measure.compute`). gloo only says when a
round begins and carries the results.
"""

import datetime
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, TypeVar

import torch.distributed as dist

from thinwire.cluster import FRAME_OVERHEAD
from thinwire.errors import UserError
from thinwire.measure import compute
from thinwire.measure.compute import Computed
from thinwire.measure.findings import CORE, Findings, HostFound, RackFound, unique_names
from thinwire.measure.fit import estimate
from thinwire.measure.links import Links
from thinwire.measure.network import Network, Phases, measure_network
from thinwire.measure.wire import Peer, address_towards, is_loopback, listen

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Seat:
    """This process among the ranks of the default gloo group, its machine's name, and where rank 0 is to be found."""

    rank: int
    world_size: int
    local_rank: int
    host: str
    master_address: str
    master_port: int


@dataclass(frozen=True, slots=True)
class _Told:
    """What each rank tells the others about itself."""

    host: str
    address: str
    port: int
    kind: str


@dataclass(frozen=True, slots=True)
class _Home:
    """A host: where its first rank listens, and its ranks."""

    peer: Peer
    ranks: tuple[int, ...]
    kind: str


def gather(value: T) -> list[T]:
    """The values of all ranks, on all of them. Collective."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def measure(seat: Seat, dtype: str, say: Callable[[str], None]) -> Findings:
    """Probe as one of the ranks. Collective. dtype: "float32", "bfloat16" or "auto". `say` hears a line a phase on rank 0."""
    if seat.world_size < 2:
        raise UserError("a probe measures between ranks, but only one was started; start one on each machine")
    begun = time.perf_counter()
    phase = Phases(say if seat.rank == 0 else lambda _: None)
    device = compute.find_device(seat.local_rank)
    with listen(seat.master_address) as listener:
        address = address_towards(seat.master_address, seat.master_port)
        told = gather(_Told(seat.host, address, listener.getsockname()[1], compute.kind_of(device)))
        homes = _homes(told, seat.master_address)
        phase("hosts", f"{len(homes)} host{'s' * (len(homes) > 1)}, {seat.world_size} ranks")
        network = None
        if len(homes) > 1:
            me = next((index for index, home in enumerate(homes) if home.ranks[0] == seat.rank), None)
            links = Links([home.peer for home in homes], me, listener, gather, dist.barrier)
            network = measure_network(links, [home.peer.host for home in homes], phase)
    chosen = gather(compute.fast_dtype(device) if dtype == "auto" and seat.rank == 0 else dtype)[0]
    neighbours = next(len(home.ranks) for home in homes if seat.rank in home.ranks)
    computed = gather((compute.compute(device, chosen, dist.barrier), compute.memory_bytes(device, neighbours)))
    phase("compute", f"{chosen}, all ranks at once")
    racks = _racks(network, [home.peer.host for home in homes]) if network else ()
    return Findings(
        hosts=tuple(_host(index, home, network, racks, computed) for index, home in enumerate(homes)),
        racks=racks,
        together=network.together if network else 1.0,
        dtype=chosen,
        date=datetime.date.today().isoformat(),
        seconds=time.perf_counter() - begun,
    )


def _homes(told: Sequence[_Told], master_address: str) -> list[_Home]:
    """Ranks of the same machine together. A machine that finds itself under a loopback address is the one of rank 0."""
    by_host: dict[tuple[str, str], list[int]] = defaultdict(list)
    for rank, one in enumerate(told):
        by_host[one.host, one.address].append(rank)
    homes = []
    names = unique_names([host for host, _ in by_host], [CORE])
    for name, ((_, address), ranks) in zip(names, by_host.items(), strict=True):
        seen_from_outside = master_address if len(by_host) > 1 and is_loopback(address) else address
        first = told[ranks[0]]
        homes.append(_Home(Peer(name, seen_from_outside, first.port), tuple(ranks), first.kind))
    return homes


def _racks(network: Network, hosts: Sequence[str]) -> tuple[RackFound, ...]:
    names = unique_names([f"rack{index}" for index in range(len(network.uplinks))], [CORE, *hosts])
    return tuple(
        RackFound(
            name=name,
            hosts=tuple(hosts[host] for host in uplink.hosts),
            up_bps=uplink.up_bps.scaled(FRAME_OVERHEAD),
            down_bps=uplink.down_bps.scaled(FRAME_OVERHEAD),
            latency_s=uplink.latency_s,
            cards_bps=(uplink.cards_bps[0] * FRAME_OVERHEAD, uplink.cards_bps[1] * FRAME_OVERHEAD),
        )
        for name, uplink in zip(names, network.uplinks, strict=True)
    )


def _host(
    index: int, home: _Home, network: Network | None, racks: Sequence[RackFound], computed: Sequence[tuple[Computed, float]]
) -> HostFound:
    mine = [computed[rank] for rank in home.ranks]
    rack = network.rack_of(index) if network else None
    return HostFound(
        name=home.peer.host,
        address=home.peer.address,
        ranks=home.ranks,
        kind=home.kind,
        rack=racks[rack].name if rack is not None else None,
        send_bps=network.send_bps[index].scaled(FRAME_OVERHEAD) if network else None,
        receive_bps=network.receive_bps[index].scaled(FRAME_OVERHEAD) if network else None,
        latency_s=network.latency_s[index] if network else None,
        flops_per_s=estimate([rate for done, _ in mine for rate in done.steps_flops_per_s]),
        matmul_flops_per_s=median(done.matmul_flops_per_s for done, _ in mine),
        memory_bytes=min(memory for _, memory in mine),
    )
