"""The network as plain data: a directed graph of hosts, devices and switches.

A bandwidth is always the line rate of a card or cable. Frame headers take their share,
so at best bandwidth_bps / FRAME_OVERHEAD arrive as payload.
"""

from collections import Counter
from dataclasses import dataclass
from functools import cached_property

from thinwire.errors import UserError

FRAME_OVERHEAD = 1.0466
"""Line bytes per payload byte on full TCP segments (MTU 1500, time stamps on), measured on a shaped veth link."""


@dataclass(frozen=True, slots=True)
class Quantity:
    """A value in its base unit, and how it is known: declared by a person, or measured (interval, date)."""

    value: float
    source: str = "declared"
    low: float | None = None
    high: float | None = None
    date: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """What computes: `name` is global ("host0/cpu0"); flops_per_s is what a training step achieves, not the peak;
    memory_bytes_per_s what a copy of a large buffer does, read and written. kind: "cpu", or that of a GPU."""

    name: str
    kind: str = "cpu"
    flops_per_s: Quantity | None = None
    memory_bytes: Quantity | None = None
    memory_bytes_per_s: Quantity | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """A machine with one or more devices. address: where to reach it, if that is known."""

    name: str
    devices: tuple[Device, ...]
    rack: str | None = None
    address: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Switch:
    """A node that only forwards. kind: "network", "nvswitch" or "optical"."""

    name: str
    kind: str = "network"


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """One direction of a cable between two nodes (hosts, switches or devices).

    burst_bytes: line bytes that pass at once after a silence, as shapers of labs and clouds let them (a token bucket: what was
    taken comes back at the rate of the link).
    """

    source: str
    target: str
    bandwidth_bps: Quantity
    latency_s: Quantity
    burst_bytes: Quantity = Quantity(0.0)

    def __hash__(self) -> int:
        return hash((self.source, self.target))  # few links join the same two, and links are counted often


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Who is wired to whom. `ranks[r]` is the name of the device on which rank r runs."""

    name: str
    hosts: tuple[Host, ...]
    switches: tuple[Switch, ...] = ()
    links: tuple[Link, ...] = ()
    ranks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.ranks:
            object.__setattr__(self, "ranks", tuple(self._host_of_device))
        self._check_names()
        self._check_links()
        self._check_ranks()

    @cached_property
    def _host_of_device(self) -> dict[str, Host]:
        return {device.name: host for host in self.hosts for device in host.devices}

    @cached_property
    def _device(self) -> dict[str, Device]:
        return {device.name: device for device in self.devices}

    @cached_property
    def _linked(self) -> set[str]:
        return {end for link in self.links for end in (link.source, link.target)}

    def _check_names(self) -> None:
        names = [node for host in self.hosts for node in (host.name, *(device.name for device in host.devices))]
        names += [switch.name for switch in self.switches]
        doubled = next((name for name, times in Counter(names).items() if times > 1), None)
        if doubled is not None:
            raise UserError(f"{self.name}: the name {doubled!r} is given twice; names of nodes must differ")
        for host in self.hosts:
            if not host.devices:
                raise UserError(f"{self.name}: host {host.name!r} has no device; a host has one or more")
            for device in host.devices:
                if not device.name.startswith(f"{host.name}/"):
                    raise UserError(f"{self.name}: device {device.name!r}: its name must begin with {host.name + '/'!r}")
        for end in sorted(self._linked.difference(names)):
            link = next(link for link in self.links if end in (link.source, link.target))
            known = _some([name for name in names if name not in self._host_of_device])
            raise UserError(
                f"{self.name}: link {link.source!r} -> {link.target!r}: there is no host or switch {end!r}; known: {known}"
            )

    def _check_links(self) -> None:
        ends = Counter((link.source, link.target) for link in self.links)
        for (source, target), times in ends.items():
            if source == target:
                raise UserError(f"{self.name}: link {source!r} -> {target!r}: a link joins two different nodes")
            if times > 1:
                raise UserError(
                    f"{self.name}: link {source!r} -> {target!r} is given {times} times; write one with the bandwidth of all"
                )

    def _check_ranks(self) -> None:
        for name in self.ranks:
            if name not in self._host_of_device:
                raise UserError(f"{self.name}: ranks: there is no device {name!r}; known: {_some(list(self._host_of_device))}")
        if len(set(self.ranks)) < len(self.ranks):
            doubled = Counter(self.ranks).most_common(1)[0][0]
            raise UserError(f"{self.name}: ranks: {doubled!r} is listed twice; each device carries one rank")

    @property
    def world_size(self) -> int:
        return len(self.ranks)

    @property
    def devices(self) -> tuple[Device, ...]:
        return tuple(device for host in self.hosts for device in host.devices)

    def host_of(self, rank: int) -> Host:
        return self._host_of_device[self.ranks[rank]]

    def device_of(self, rank: int) -> Device:
        return self._device[self.ranks[rank]]

    @property
    def declared_rates(self) -> tuple[float, ...] | None:
        """flops_per_s of each rank's device; None if one does not declare it."""
        rates = [self.device_of(rank).flops_per_s for rank in range(self.world_size)]
        known = tuple(rate.value for rate in rates if rate is not None)
        return known if len(known) == len(rates) else None

    def node_of(self, rank: int) -> str:
        """The node of the graph where the messages of `rank` start: its device if that has a link, else its host."""
        name = self.ranks[rank]
        return name if name in self._linked else self.host_of(rank).name


def _some(names: list[str], limit: int = 8) -> str:
    return ", ".join(names[:limit]) + (f", ... ({len(names)} in all)" if len(names) > limit else "")
