"""Clusters for the tests of choosing: random ones, and equal or unequal hosts on a switch."""

from collections.abc import Sequence

from hypothesis import strategies as st

from thinwire.cluster import Cluster, Device, Host, Link, Quantity, Switch

RATE = 100e6


def star(rates_bps: Sequence[float], latency_s: float = 0.0) -> Cluster:
    """A host for each rate, all on one switch."""
    return wired(
        {f"h{k}": 1 for k in range(len(rates_bps))}, [(f"h{k}", "s0", rate) for k, rate in enumerate(rates_bps)], latency_s
    )


def wired(hosts: dict[str, int], cables: Sequence[tuple[str, str, float]], latency_s: float = 0.0) -> Cluster:
    """hosts: how many ranks each has. Every other end of a cable is a switch."""
    ends = dict.fromkeys(end for a, b, _ in cables for end in (a, b) if end not in hosts)
    links = [
        Link(source=source, target=target, bandwidth_bps=Quantity(rate), latency_s=Quantity(latency_s))
        for a, b, rate in cables
        for source, target in ((a, b), (b, a))
    ]
    return Cluster(
        name="any",
        hosts=tuple(
            Host(name=name, devices=tuple(Device(name=f"{name}/{k}") for k in range(count))) for name, count in hosts.items()
        ),
        switches=tuple(Switch(name=name) for name in ends),
        links=tuple(links),
    )


@st.composite
def clusters(draw: st.DrawFn) -> Cluster:
    """1 to 3 switches in a tree, 1 to 5 hosts of one or two ranks below them, and up to 2 cables that close loops."""
    switches, hosts = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    rate = st.sampled_from([2.5e7, 1e8, 1e9])
    cables = {(f"s{k}", f"s{draw(st.integers(0, k - 1))}"): draw(rate) for k in range(1, switches)}
    cables |= {(f"h{k}", f"s{draw(st.integers(0, switches - 1))}"): draw(rate) for k in range(hosts)}
    nodes = [*(f"h{k}" for k in range(hosts)), *(f"s{k}" for k in range(switches))]
    for a, b in draw(st.lists(st.tuples(st.sampled_from(nodes), st.sampled_from(nodes)), max_size=2)):
        if a != b and (a, b) not in cables and (b, a) not in cables:
            cables[a, b] = draw(rate)
    latency_s = draw(st.sampled_from([0.0, 50e-6, 5e-3]))
    counts = {f"h{k}": draw(st.integers(1, 2)) for k in range(hosts)}
    return wired(counts, [(a, b, value) for (a, b), value in cables.items()], latency_s)
