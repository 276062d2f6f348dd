"""The networks and calls of `thinwire bench collectives`, and what is asked of each.

bar         native_s / ours_s, at least
of_bound    ours_s / bound_s, at most
ordered     ordered_s / ours_s, at least: against the native collective on the best order of ranks
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from thinwire.cluster import Cluster, load_cluster

MIB = 1 << 20
SMALL_BYTES = (4, 256, 4096, 32768)


@dataclass(frozen=True, slots=True)
class Case:
    """A call and its bars. back_to_back: the bar of short calls one after the other (`bar` is that after a barrier)."""

    op: str
    message_bytes: int
    bar: float
    of_bound: float | None = None
    ordered: float | None = None
    back_to_back: float | None = None


@dataclass(frozen=True, slots=True)
class Network:
    """A cluster and the calls on it."""

    make: Callable[[], Cluster]
    cases: tuple[Case, ...]


def _equal() -> Cluster:
    return load_cluster("eight-hosts-100mbit")


def _racks() -> Cluster:
    return load_cluster("two-racks")


def _racks_half() -> Cluster:
    """The uplinks at half of their rate."""
    cluster = load_cluster("two-racks")
    return _scaled(cluster, f"{cluster.name}-half", lambda source, target: source.startswith("rack-") and target == "switch", 0.5)


def _one_slow() -> Cluster:
    return load_cluster("one-slow-host")


def _one_half() -> Cluster:
    """The slow host at half of the others' rate instead of a quarter."""
    cluster = load_cluster("one-slow-host")
    return _scaled(cluster, "one-half-host", lambda source, target: source == "slow", 2.0)


def _scaled(cluster: Cluster, name: str, which: Callable[[str, str], bool], factor: float) -> Cluster:
    links = tuple(
        replace(link, bandwidth_bps=replace(link.bandwidth_bps, value=link.bandwidth_bps.value * factor))
        if which(link.source, link.target) or which(link.target, link.source)
        else link
        for link in cluster.links
    )
    return replace(cluster, name=name, links=links)


NETWORKS: Mapping[str, Network] = {
    "eight-hosts-100mbit": Network(
        _equal,
        (
            Case("all_reduce", 4 * MIB, 0.97, of_bound=1 / 0.93),
            Case("reduce_scatter", 4 * MIB, 1.85),
            Case("broadcast", 4 * MIB, 3.3),
            Case("reduce", 4 * MIB, 1.4),
            Case("all_to_all", 4 * MIB, 1.25),
            *(Case("all_reduce", size, 2.5, back_to_back=0.97) for size in SMALL_BYTES),
        ),
    ),
    "two-racks": Network(_racks, (Case("all_reduce", 4 * MIB, 3.5),)),
    "two-racks-half": Network(_racks_half, (Case("all_reduce", 4 * MIB, 1.0, ordered=1.5),)),
    "one-slow-host": Network(_one_slow, (Case("all_reduce", 4 * MIB, 1.55, of_bound=1.15),)),
    "one-half-host": Network(_one_half, (Case("all_reduce", 4 * MIB, 1.55),)),
}

OTHER = tuple(
    Case(op, 4 * MIB, 0.97) for op in ("all_reduce", "reduce_scatter", "all_gather", "broadcast", "reduce", "all_to_all")
)
"""Calls on a network that has no bars of its own."""
