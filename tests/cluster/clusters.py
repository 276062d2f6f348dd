"""Random clusters for properties: a tree of switches with hosts as leaves, every value declared or measured."""

from hypothesis import strategies as st

from thinwire.cluster import Cluster, Device, Host, Link, Quantity, Switch

values = st.floats(1e-3, 1e13)


@st.composite
def quantities(draw: st.DrawFn) -> Quantity:
    value = draw(values)
    if draw(st.booleans()):
        return Quantity(value)
    low = draw(st.none() | st.just(value * 0.9))
    date = draw(st.none() | st.dates().map(str))
    return Quantity(value, draw(st.sampled_from(["declared", "measured"])), low, draw(st.none() | st.just(value * 1.1)), date)


@st.composite
def devices(draw: st.DrawFn, host: str) -> tuple[Device, ...]:
    names = draw(
        st.sampled_from(
            [["cpu0"], ["cpu"], ["gpu0", "gpu1"], ["gpu1", "gpu0"], ["gpu8", "gpu9"], ["a", "b"], ["0", "1"], ["x00"]]
        )
    )
    alike = draw(st.booleans())
    common = (draw(st.none() | quantities()), draw(st.none() | quantities()), draw(st.sampled_from(["cpu", "h100"])))
    rate = draw(st.none() | quantities())
    result = []
    for name in names:
        flops, memory, kind = common if alike else (draw(st.none() | quantities()), None, name)
        result.append(Device(name=f"{host}/{name}", kind=kind, flops_per_s=flops, memory_bytes=memory, memory_bytes_per_s=rate))
    return tuple(result)


@st.composite
def clusters(draw: st.DrawFn) -> Cluster:
    """Any cluster that may be built: hosts hang on switches, switches on earlier switches, ranks in any order."""
    num_switches, num_hosts = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    kinds = st.sampled_from(["network", "nvswitch", "optical"])
    switches = tuple(Switch(name=f"switch {k}", kind=draw(kinds)) for k in range(num_switches))
    hosts = tuple(
        Host(
            name=f"host-{k}",
            devices=draw(devices(f"host-{k}")),
            rack=draw(st.none() | st.sampled_from(["r0", "r1"])),
            address=draw(st.none() | st.just(f"10.0.0.{k}")),
        )
        for k in range(num_hosts)
    )
    cables = [(f"switch {k}", f"switch {draw(st.integers(0, k - 1))}") for k in range(1, num_switches)]
    cables += [(host.name, f"switch {draw(st.integers(0, num_switches - 1))}") for host in hosts]
    links = tuple(
        Link(
            source=a,
            target=b,
            bandwidth_bps=draw(quantities()),
            latency_s=draw(quantities()),
            burst_bytes=draw(quantities() | st.just(Quantity(0.0))),
        )
        for one, other in cables
        for a, b in ((one, other), (other, one))
    )
    names = [device.name for host in hosts for device in host.devices]
    ranks = draw(st.permutations(names))[: draw(st.integers(1, len(names)))]
    return Cluster(name="any", hosts=hosts, switches=switches, links=links, ranks=tuple(ranks))
