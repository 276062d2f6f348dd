"""What a closed form needs of a Cluster: equal hosts, a device's share of what leaves them, and of what leaves their site.

    intra   the thinnest link from one device to the next of its host; data sheet where the cluster has none
    inter   devices of a host send to those of another at the same time: 1 / seconds of the fullest link for a byte of each
    site    the same for all devices of a rack, to those of another rack

Where hosts differ the slowest counts: one of each kind is looked at.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby

from thinwire.cluster import Cluster, Host
from thinwire.cluster.graph import Routes
from thinwire.errors import UserError
from thinwire.plan.gpu.priors import Device, priors


@dataclass(frozen=True, kw_only=True)
class Network:
    """Bytes a second are a device's; site_devices 0: all hosts are equally near."""

    device: Device
    devices: int
    per_host: int
    intra_bytes_per_s: float
    inter_bytes_per_s: float
    latency_s: float = 0.0
    site_devices: int = 0
    site_bytes_per_s: float = 0.0
    site_latency_s: float = 0.0


@lru_cache(maxsize=32)
def network_of(cluster: Cluster) -> Network:
    """UserError for devices that nobody knows, or hosts with different numbers of them."""
    known = priors()
    kinds = [known.device(kind) for kind in dict.fromkeys(device.kind for device in cluster.devices)]
    if None in kinds:
        kind = next(one.kind for one in cluster.devices if known.device(one.kind) is None)
        raise UserError(
            f"{cluster.name}: a device of kind {kind!r} has no flops_per_s, and no data sheet is known for it; measure the "
            f"cluster (thinwire probe), declare flops_per_s, or name one of: {', '.join(known.devices)}"
        )
    device = min((one for one in kinds if one), key=lambda one: one.flops_per_s["fp16"])
    counts = {len(host.devices) for host in cluster.hosts}
    if len(counts) > 1:
        raise UserError(
            f"{cluster.name}: hosts have {min(counts)} to {max(counts)} devices; accelerators are planned on equal hosts only"
        )
    per_host, hosts = counts.pop(), cluster.hosts
    routes, rank_of = Routes(cluster), {name: rank for rank, name in enumerate(cluster.ranks)}
    ranks = {host.name: [rank_of[one.name] for one in host.devices if one.name in rank_of] for host in hosts}
    first = ranks[hosts[0].name]
    inside = routes.between(first[0], first[1]) if per_host > 1 else ()
    intra = min((link.bandwidth_bps.value / 8 for link in inside), default=device.intra_bytes_per_s)
    racks = [list(group) for _, group in groupby(hosts, key=lambda host: host.rack)]
    sites = racks if len(racks) > 1 and hosts[0].rack is not None and len({len(rack) for rack in racks}) == 1 else [list(hosts)]
    inter, latency_s = float("inf"), 0.0
    for near in sites:
        for host in _one_of_each(cluster, near):
            other = near[near.index(host) - 1]
            if host is not other:
                share, late_s = _share(routes, ranks[host.name], ranks[other.name])
                inter, latency_s = min(inter, share), max(latency_s, late_s)
    found = Network(
        device=device,
        devices=len(hosts) * per_host,
        per_host=per_host,
        intra_bytes_per_s=intra,
        inter_bytes_per_s=inter,
        latency_s=latency_s,
    )
    if len(sites) == 1:
        return found
    everyone = [[rank for host in near for rank in ranks[host.name]] for near in sites]
    beyond = [_share(routes, everyone[number], everyone[number - 1]) for number in range(len(sites))]
    thinnest = min(share for share, _ in beyond)
    return replace(
        found,
        inter_bytes_per_s=inter if inter < float("inf") else thinnest,
        site_devices=len(everyone[0]),
        site_bytes_per_s=thinnest,
        site_latency_s=max(late_s for _, late_s in beyond),
    )


def _share(routes: Routes, sources: Sequence[int], targets: Sequence[int]) -> tuple[float, float]:
    """(bytes a second of each when all send at once, seconds of latency)."""
    pairs = [*zip(sources, targets, strict=False), *zip(targets, sources, strict=False)]
    fullest_s = max(
        (8 * size / link.bandwidth_bps.value for link, size in routes.load((*pair, 1.0) for pair in pairs).items()), default=0.0
    )
    late_s = max(sum(link.latency_s.value for link in routes.between(*pair)) for pair in pairs)
    return (1 / fullest_s if fullest_s else float("inf")), late_s


def _one_of_each(cluster: Cluster, hosts: Sequence[Host]) -> list[Host]:
    """By the rates of their links."""
    rates: dict[str, list[float]] = {}
    for link in cluster.links:
        rates.setdefault(link.source.split("/")[0], []).append(link.bandwidth_bps.value)
    return list({tuple(sorted(rates.get(host.name, ()))): host for host in hosts}.values())
