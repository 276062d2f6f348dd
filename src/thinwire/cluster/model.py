"""The network as plain data: a directed graph of hosts, devices and switches.

A bandwidth is always the line rate of a card or cable. Frame headers take their share,
so at best bandwidth_bps / FRAME_OVERHEAD arrive as payload.
"""

from dataclasses import dataclass, field

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
    """What computes: `name` is global ("host0/cpu0"); flops_per_s is what a training step achieves, not the peak."""

    name: str
    kind: str = "cpu"
    flops_per_s: Quantity | None = None
    memory_bytes: Quantity | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    name: str
    devices: tuple[Device, ...]
    rack: str | None = None
    address: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Switch:
    name: str
    kind: str = "network"


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """One direction of a cable between two nodes (hosts, switches or devices)."""

    source: str
    target: str
    bandwidth_bps: Quantity
    latency_s: Quantity


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Who is wired to whom. `ranks[r]` is the name of the device on which rank r runs."""

    name: str
    hosts: tuple[Host, ...]
    switches: tuple[Switch, ...] = ()
    links: tuple[Link, ...] = ()
    ranks: tuple[str, ...] = ()
    _host_of_device: dict[str, Host] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        for host in self.hosts:
            for device in host.devices:
                self._host_of_device[device.name] = host
        if not self.ranks:
            object.__setattr__(self, "ranks", tuple(self._host_of_device))
        self._check()

    def _check(self) -> None:
        names = [node for host in self.hosts for node in (host.name, *(device.name for device in host.devices))]
        names += [switch.name for switch in self.switches]
        doubled = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
        if doubled:
            raise UserError(f"{self.name}: the name {doubled[0]!r} is given twice; names of nodes must differ")
        known = set(names)
        for link in self.links:
            for end in (link.source, link.target):
                if end not in known:
                    raise UserError(f"{self.name}: link {link.source!r} -> {link.target!r}: there is no host or switch {end!r}")
        for name in self.ranks:
            if name not in self._host_of_device:
                raise UserError(f"{self.name}: ranks: there is no device {name!r}; known: {_some(list(self._host_of_device))}")
        if len(set(self.ranks)) < len(self.ranks):
            raise UserError(f"{self.name}: ranks: a device is listed twice; each device carries one rank")

    @property
    def world_size(self) -> int:
        return len(self.ranks)

    @property
    def devices(self) -> tuple[Device, ...]:
        return tuple(device for host in self.hosts for device in host.devices)

    def host_of(self, rank: int) -> Host:
        return self._host_of_device[self.ranks[rank]]

    def device_of(self, rank: int) -> Device:
        name = self.ranks[rank]
        return next(device for device in self.host_of(rank).devices if device.name == name)

    def node_of(self, rank: int) -> str:
        """The node of the graph where the messages of `rank` start: its device if that has a link, else its host."""
        name = self.ranks[rank]
        has_link = any(name in (link.source, link.target) for link in self.links)
        return name if has_link else self.host_of(rank).name


def _some(names: list[str], limit: int = 8) -> str:
    return ", ".join(names[:limit]) + (f", ... ({len(names)} in all)" if len(names) > limit else "")
