"""Random networks: trees of switches, and such with more cables that close loops."""

from hypothesis import strategies as st

from thinwire.cluster import Cluster, Device, Host, Link, Quantity, Switch


@st.composite
def networks(draw: st.DrawFn, loops: int) -> Cluster:
    """Switches in a tree, hosts of one or two ranks below them, cables in both directions; and some more that close loops."""
    num_switches, num_hosts = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    hosts = [f"h{k}" for k in range(num_hosts)]
    cables = {(f"s{k}", f"s{draw(st.integers(0, k - 1))}") for k in range(1, num_switches)}
    cables |= {(host, f"s{draw(st.integers(0, num_switches - 1))}") for host in hosts}
    nodes = [*hosts, *(f"s{k}" for k in range(num_switches))]
    for _ in range(loops):
        a, b = draw(st.sampled_from(nodes)), draw(st.sampled_from(nodes))
        if a != b and (b, a) not in cables:
            cables.add((a, b))
    links = tuple(
        Link(source=a, target=b, bandwidth_bps=Quantity(draw(st.sampled_from([1e8, 5e7, 1e9]))), latency_s=Quantity(0.0))
        for one, other in sorted(cables)
        for a, b in ((one, other), (other, one))
    )
    devices = [[f"{host}/{k}" for k in range(draw(st.integers(1, 2)))] for host in hosts]
    return Cluster(
        name="any",
        hosts=tuple(
            Host(name=host, devices=tuple(Device(name=name) for name in names))
            for host, names in zip(hosts, devices, strict=True)
        ),
        switches=tuple(Switch(name=f"s{k}") for k in range(num_switches)),
        links=links,
        ranks=tuple(draw(st.permutations([name for names in devices for name in names]))),
    )
