"""Cluster -> the `ip`, `tc` and sysctl lines that build it. Plain data: nothing is run here.

A host becomes a network namespace h<i> whose k-th card is eth<k>; a network switch becomes a bridge; a cable becomes a
veth pair. Each *directed* link is a token bucket (tbf) at the end where it starts, so both ends of a pair are shaped.

The bucket: after a silence `burst` bytes of a message pass at once, and the rest flows at the line rate, so a message of n
bytes may be early by burst / n. It holds 2 ms of the rate or 16 KiB, whichever is more: at most 10 % of 256 KiB up to
100 Mbit/s. On links that send 16 KiB in more than 20 ms (below 6.5 Mbit/s) it holds 20 ms of the rate, at least two frames:
what is exchanged there in a step may be no more than 16 KiB, and would be free. A cluster file may give its own `burst_bytes`.
tbf counts whole frames: a payload cannot be faster than bandwidth_bps / FRAME_OVERHEAD.
"""

from collections import Counter
from dataclasses import dataclass, replace

from networkx.utils import UnionFind

from thinwire.cluster import Cluster, Link, Quantity
from thinwire.errors import UserError
from thinwire.units import show

BURST_BYTES = 16 * 1024
SLOW_BURST_BYTES = 3 * 1024
LEAST_BURST_BYTES = 1600
"""A bucket that cannot hold a frame never lets it pass."""
BURST_S, SLOW_BURST_S = 2e-3, 20e-3
QUEUE_S = 0.2
NEGLIGIBLE_DELAY_S = 100e-6
REFUSED_DELAY_S = 1e-3
MAX_HOSTS = 64
MAX_BPS = 100e9
TRUE_UP_TO_BPS = 500e6
"""Up to here cards send one frame at a time, so that their counters see every header; above, offload saves cores."""

_QUIET = ("net/ipv6/conf/all/disable_ipv6=1", "net/ipv6/conf/default/disable_ipv6=1")
_CORE = (*_QUIET, *(f"net/bridge/bridge-nf-call-{table}=0" for table in ("iptables", "ip6tables", "arptables")))
_HOST = (*_QUIET, "net/ipv4/tcp_no_metrics_save=1")


@dataclass(frozen=True, slots=True)
class Step:
    """Lines for one call of `tool` ("ip", "tc", "sysctl") in a host's namespace, or in the core (None)."""

    tool: str
    netns: str | None
    lines: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Card:
    """A host's network card: where it is plugged in, its address, and the two directions of its link."""

    host: str
    netns: str
    interface: str
    switch: str
    address: str
    mac: str
    out: Link
    back: Link

    @property
    def core_interface(self) -> str:
        """The other end of the cable, on the bridge."""
        return f"{self.netns}{self.interface}"


@dataclass(frozen=True, slots=True)
class Wiring:
    """All that must be run, in order, to build the network; the cards; and notes about what is not imitated."""

    steps: tuple[Step, ...]
    cards: tuple[Card, ...]
    netns: dict[str, str]
    bridges: dict[str, str]
    """By switch."""
    addresses: dict[str, str]
    delay: str
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Cable:
    a: str
    b: str
    forward: Link
    back: Link


def wire(cluster: Cluster, *, netem: bool, delay: bool = True) -> Wiring:
    """Plan the network of `cluster`. UserError where it cannot be imitated: no cards, loops, a missing direction, latency."""
    if len(cluster.hosts) > MAX_HOSTS:
        raise UserError(f"{cluster.name} has {len(cluster.hosts)} hosts; a lab holds at most {MAX_HOSTS}")
    cables, notes = _cables(cluster)
    switches, cards, uplinks = _plug(cluster, cables)
    _check_reach(cluster, cards, uplinks)
    links = [link for cable in cables for link in (cable.forward, cable.back)]
    fate = _delay(cluster, links, netem=netem, delay=delay)
    notes += _rate_notes(cluster, links)
    if fate.startswith("refused"):
        notes.append(f"delay {fate}")
    netns = {host.name: f"h{index}" for index, host in enumerate(cluster.hosts)}
    bridges = {switch: f"b{index}" for index, switch in enumerate(switches)}
    return Wiring(
        steps=_steps(bridges, cards, uplinks, netns, fate == "applied"),
        cards=tuple(cards),
        netns=netns,
        bridges=bridges,
        addresses={card.host: card.address for card in cards if card.interface == "eth0"},
        delay=fate,
        notes=tuple(notes),
    )


def imitated(cluster: Cluster, delay: str) -> Cluster:
    """`cluster` as a lab has it: with the buckets of its links, and without latencies unless `delay` is "applied"."""
    shaped = {link for cable in _cables(cluster)[0] for link in (cable.forward, cable.back)}

    def there(link: Link) -> Link:
        latency_s = link.latency_s if delay == "applied" else Quantity(0.0)
        return replace(link, burst_bytes=Quantity(burst_bytes(link)), latency_s=latency_s)

    return replace(cluster, links=tuple(there(link) if link in shaped else link for link in cluster.links))


def burst_bytes(link: Link) -> int:
    """Of the bucket that shapes `link`: what its cluster file gives, else see the top of the file."""
    declared = round(link.burst_bytes.value)
    if 0 < declared < LEAST_BURST_BYTES:
        raise UserError(
            f"burst_bytes = {show(declared, 'B')} of {link.source} -> {link.target}; a lab's bucket must hold a frame: "
            f"{LEAST_BURST_BYTES} B or more"
        )
    rate = link.bandwidth_bps.value / 8
    return declared or round(max(SLOW_BURST_BYTES, min(BURST_BYTES, SLOW_BURST_S * rate), BURST_S * rate))


def shape(interface: str, link: Link, *, with_netem: bool) -> list[str]:
    """The `tc` lines that give the sending end of `link` its bandwidth and, with netem, its latency."""
    rate = link.bandwidth_bps.value
    bucket = f"tbf rate {round(rate)}bit burst {burst_bytes(link)} latency {round(QUEUE_S * 1000)}ms"
    latency = link.latency_s.value
    if not with_netem or latency <= NEGLIGIBLE_DELAY_S:
        return [f"qdisc add dev {interface} root {bucket}"]
    in_flight = 1000 + 2 * round(rate * (latency + QUEUE_S) / 8 / 1500)
    return [
        f"qdisc add dev {interface} root handle 1: netem delay {round(latency * 1e6)}us limit {in_flight}",
        f"qdisc add dev {interface} parent 1:1 handle 10: {bucket}",
    ]


def _cables(cluster: Cluster) -> tuple[list[_Cable], list[str]]:
    """Pair the two directions of every cable between hosts and network switches; and a note about what is left out."""
    place = {switch.name: switch.name for switch in cluster.switches if switch.kind == "network"}
    for host in cluster.hosts:
        place |= {host.name: host.name} | {device.name: host.name for device in host.devices}
    directed: dict[tuple[str, str], Link] = {}
    inner = 0
    for link in cluster.links:
        a, b = place.get(link.source), place.get(link.target)
        if a is None or b is None or a == b:
            inner += 1
        else:
            directed[link.source, link.target] = link
    cables: dict[tuple[str, str], _Cable] = {}
    for (source, target), forward in directed.items():
        back = directed.get((target, source))
        if back is None:
            raise UserError(f"{cluster.name}: there is a link {source} -> {target} but none back; a cable needs both")
        if (target, source) not in cables:
            cables[source, target] = _Cable(place[source], place[target], forward, back)
    notes = [f"{inner} links inside hosts are not imitated (memory, NVLink, optical)"] if inner else []
    return list(cables.values()), notes


def _plug(cluster: Cluster, cables: list[_Cable]) -> tuple[list[str], list[Card], list[_Cable]]:
    """Plug every cable in: into cards and switches. A cable from host to host gets a small switch of its own."""
    number = {host.name: index for index, host in enumerate(cluster.hosts)}
    switches = [switch.name for switch in cluster.switches if switch.kind == "network"]
    used: Counter[str] = Counter()
    cards: list[Card] = []
    uplinks: list[_Cable] = []

    def plug(host: str, switch: str, out: Link, back: Link) -> None:
        k, i = used[host], number[host]
        used[host] += 1
        address, mac = f"10.77.{k}.{i + 1}", f"02:77:00:00:{k:02x}:{i + 1:02x}"
        cards.append(Card(host, f"h{i}", f"eth{k}", switch, address, mac, out, back))

    for cable in cables:
        ends = [end in number for end in (cable.a, cable.b)]
        if all(ends):
            switch = f"{cable.a} = {cable.b}"
            switches.append(switch)
            plug(cable.a, switch, cable.forward, cable.back)
            plug(cable.b, switch, cable.back, cable.forward)
        elif any(ends):
            host, switch = (cable.a, cable.b) if ends[0] else (cable.b, cable.a)
            out, back = (cable.forward, cable.back) if ends[0] else (cable.back, cable.forward)
            plug(host, switch, out, back)
        else:
            uplinks.append(cable)
    return switches, cards, uplinks


def _check_reach(cluster: Cluster, cards: list[Card], uplinks: list[_Cable]) -> None:
    """Bridges here run no spanning tree: a loop would never come to rest. And eth0 of every host must reach the others."""
    islands = UnionFind()
    for cable in uplinks:
        if islands[cable.a] == islands[cable.b]:
            raise UserError(f"{cluster.name}: the switches form a loop at {cable.a} - {cable.b}; the lab needs a tree")
        islands.union(cable.a, cable.b)
    first = {card.host: islands[card.switch] for card in cards if card.interface == "eth0"}
    for host in cluster.hosts:
        if host.name not in first:
            raise UserError(f"{cluster.name}: {host.name} has no network card, so a lab has nothing to shape; add `card`")
    homes = {where: host for host, where in first.items()}
    if len(homes) > 1:
        one, other, *_ = homes.values()
        raise UserError(f"{cluster.name}: the first cards of {one} and {other} are not joined by any switch")


def _delay(cluster: Cluster, links: list[Link], *, netem: bool, delay: bool) -> str:
    """What happens to the declared latencies: "applied" (by netem), "none" or "refused: why"."""
    longest = max(links, key=lambda link: link.latency_s.value)
    latency = longest.latency_s.value
    if latency <= NEGLIGIBLE_DELAY_S:
        return "none"
    if delay and netem:
        return "applied"
    if latency <= REFUSED_DELAY_S and delay:
        return "none"
    what = f"{show(latency, 's')} of {longest.source} -> {longest.target}"
    if delay:
        raise UserError(
            f"{cluster.name}: this kernel has no netem, so the latency of {what} cannot be imitated; "
            "--no-delay goes on without latencies"
        )
    return f"refused: --no-delay, latencies up to {what} are not imitated"


def _rate_notes(cluster: Cluster, links: list[Link]) -> list[str]:
    fastest = max(links, key=lambda link: link.bandwidth_bps.value)
    rate = fastest.bandwidth_bps.value
    if rate > MAX_BPS:
        raise UserError(
            f"{cluster.name}: {fastest.source} -> {fastest.target} declares {show(rate, 'bit/s')}; "
            f"a lab imitates at most {show(MAX_BPS, 'bit/s')}"
        )
    if rate <= TRUE_UP_TO_BPS:
        return []
    return [f"links of {show(rate, 'bit/s')} may be slower here: they are carried by this machine's cores"]


def _steps(
    bridge: dict[str, str], cards: list[Card], uplinks: list[_Cable], netns: dict[str, str], with_netem: bool
) -> tuple[Step, ...]:
    make = [f"netns add {name}" for name in netns.values()]
    make += [f"link add {name} type bridge mcast_snooping 0 ageing_time 8640000" for name in bridge.values()]
    up = ["link set lo up", *(f"link set {name} up" for name in bridge.values())]
    core_shape: list[str] = []
    for card in cards:
        end = card.core_interface
        make.append(f"link add {end} type veth peer name {card.interface} netns {card.netns} address {card.mac}")
        make.append(f"link set {end}{_one_frame(card.back)} master {bridge[card.switch]}")
        core_shape += shape(end, card.back, with_netem=with_netem)
        up.append(f"link set {end} up")
    for index, cable in enumerate(uplinks):
        ends = (f"u{index}a", cable.a, cable.forward), (f"u{index}b", cable.b, cable.back)
        make.append(f"link add {ends[0][0]} type veth peer name {ends[1][0]}")
        for end, switch, link in ends:
            make.append(f"link set {end}{_one_frame(link)} master {bridge[switch]}")
            core_shape += shape(end, link, with_netem=with_netem)
            up.append(f"link set {end} up")
    steps = [Step("sysctl", None, _CORE), Step("ip", None, tuple(make)), Step("tc", None, tuple(core_shape))]
    for name in netns.values():
        own = [card for card in cards if card.netns == name]
        steps.append(Step("sysctl", name, _HOST))
        steps.append(Step("ip", name, tuple(_host_lines(own, cards))))
        lines = [line for card in own for line in shape(card.interface, card.out, with_netem=with_netem)]
        steps.append(Step("tc", name, tuple(lines)))
    return (*steps, Step("ip", None, tuple(up)))


def bridges(wiring: Wiring) -> list[Step]:
    """On each host a bridge as a container engine makes it: up, with the same address everywhere, joined to nothing."""
    lines = ("link add docker0 type bridge", "address add 172.17.0.1/16 dev docker0", "link set docker0 up")
    return [Step("ip", name, lines) for name in wiring.netns.values()]


def _host_lines(own: list[Card], cards: list[Card]) -> list[str]:
    """A host's own lines: cards up, one subnet a card, cubic on every route, all neighbours known beforehand."""
    lines = ["link set lo up"]
    for card in own:
        name = card.interface
        lines.append(f"link set {name}{_one_frame(card.out)} up")
        lines.append(f"address add {card.address}/24 dev {name} noprefixroute")
        subnet = card.address.rsplit(".", 1)[0]
        lines.append(f"route add {subnet}.0/24 dev {name} src {card.address} congctl cubic")
        lines += [
            f"neighbour add {other.address} lladdr {other.mac} dev {name} nud permanent"
            for other in cards
            if other.interface == name and other.host != card.host
        ]
    return lines


def _one_frame(link: Link) -> str:
    return " gso_max_segs 1" if link.bandwidth_bps.value <= TRUE_UP_TO_BPS else ""
