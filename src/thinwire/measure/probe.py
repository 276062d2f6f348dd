"""The probe from beginning to end: every rank of a gloo group calls `measure` and gets the same findings.

Ranks of one machine are one host with several devices; the first of them sends and receives for it. First the network
(`thinwire.measure.network`), over plain TCP sockets, then the devices (`thinwire.measure.compute`). gloo only synchronises
the rounds and carries the results.
"""

import datetime
import socket
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import TypeVar

import torch.distributed as dist

from thinwire.errors import UserError
from thinwire.listening import listen
from thinwire.measure import compute
from thinwire.measure.findings import CORE, Findings, HostFound, HostWired, unique_names
from thinwire.measure.fit import estimate
from thinwire.measure.gather import gather
from thinwire.measure.links import Links, Peer
from thinwire.measure.network import Network, Phases, measure_network

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Home:
    """A host: where its first rank listens, its ranks, and the kind of their devices."""

    peer: Peer
    ranks: tuple[int, ...]
    kind: str


def measure(number: int, address: str, dtype: str, print_line: Callable[[str], None]) -> Findings:
    """Probe as one of the ranks of the default group. Collective.

    number: of this rank among those on this machine. address: where other hosts reach this one; it listens there. dtype:
    "float32", "bfloat16" or "auto". `print_line` gets a line a phase on rank 0.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if world_size < 2:
        raise UserError("a probe measures between ranks, but only one was started; start one on each machine")
    begun = time.perf_counter()
    phase = Phases(print_line if rank == 0 else lambda _: None)
    device = compute.find_device(number)
    hosts, network = measure_hosts(address, compute.kind_of(device), phase)
    chosen = gather(compute.fast_dtype(device) if dtype == "auto" and rank == 0 else dtype)[0]
    neighbours = next(len(host.ranks) for host in hosts if rank in host.ranks)
    computed = gather((compute.compute(device, chosen, dist.barrier), compute.memory_bytes(device, neighbours)))
    phase("compute", f"{chosen}, all ranks at once")
    return Findings(
        hosts=tuple(_with_devices(host, [computed[rank] for rank in host.ranks]) for host in hosts),
        racks=network.racks if network else (),
        together=network.together if network else 1.0,
        dtype=chosen,
        date=datetime.date.today().isoformat(),
        seconds=time.perf_counter() - begun,
    )


def measure_hosts(
    address: str, kind: str, phase: Phases, group: dist.ProcessGroup | None = None
) -> tuple[list[HostWired], Network | None]:
    """The hosts of the ranks of `group` (by default the default group), and if they are several the network between them.

    Collective.     address: where other hosts reach this one; it listens there. kind: of this rank's device.
    """
    everybody = partial(gather, group=group)
    with listen(address, 0, f"the probe at {address}") as listener:
        own = Peer(socket.gethostname(), address, listener.getsockname()[1])
        homes = _homes(everybody((own, kind)))
        names = [home.peer.host for home in homes]
        phase("hosts", f"{len(homes)} host{'s' * (len(homes) > 1)}, {dist.get_world_size(group)} ranks")
        if len(homes) == 1:
            return [_wired(0, homes[0], None)], None
        me = next((index for index, home in enumerate(homes) if home.ranks[0] == dist.get_rank(group)), None)
        links = Links([home.peer for home in homes], me, listener, everybody, partial(dist.barrier, group=group))
        network = measure_network(links, names, phase)
    return [_wired(index, home, network) for index, home in enumerate(homes)], network


def _homes(ranks: Sequence[tuple[Peer, str]]) -> list[_Home]:
    """Ranks of the same machine together."""
    by_host: dict[tuple[str, str], list[int]] = defaultdict(list)
    for rank, (peer, _) in enumerate(ranks):
        by_host[peer.host, peer.address].append(rank)
    homes = []
    names = unique_names([host for host, _ in by_host], [CORE])
    for name, own in zip(names, by_host.values(), strict=True):
        first, kind = ranks[own[0]]
        homes.append(_Home(Peer(name, first.address, first.port), tuple(own), kind))
    return homes


def _wired(index: int, home: _Home, network: Network | None) -> HostWired:
    racks = network.racks if network else ()
    return HostWired(
        name=home.peer.host,
        address=home.peer.address,
        ranks=home.ranks,
        kind=home.kind,
        rack=next((rack.name for rack in racks if home.peer.host in rack.hosts), None),
        send_bps=network.send_bps[index] if network else None,
        receive_bps=network.receive_bps[index] if network else None,
        latency_s=network.latency_s[index] if network else None,
    )


def _with_devices(host: HostWired, computed: Sequence[tuple[compute.Computed, float]]) -> HostFound:
    return HostFound(
        **vars(host),
        flops_per_s=estimate([rate for done, _ in computed for rate in done.steps_flops_per_s]),
        matmul_flops_per_s=median(done.matmul_flops_per_s for done, _ in computed),
        memory_bytes=min(memory for _, memory in computed),
        memory_bytes_per_s=median(done.memory_bytes_per_s for done, _ in computed),
    )
