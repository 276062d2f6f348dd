"""NCCL's topology files: each kind's graph and the bound of its all-reduce, worked out by hand; every element read or named."""

from pathlib import Path

import pytest

from thinwire.collectives.synthesis.bounds import bound
from thinwire.collectives.synthesis.graph import Graph
from thinwire.collectives.synthesis.nccl_file import nccl_graph
from thinwire.collectives.synthesis.optimum import optimum
from thinwire.collectives.synthesis.summary import summary
from thinwire.errors import UserError

FILES = Path(__file__).parent / "topologies"
GB = 1e9


def links(graph: Graph) -> dict[tuple[str, str], float]:
    """GB/s by the names of the ends."""
    return {(graph.nodes[a], graph.nodes[b]): float(rate) for (a, b), rate in graph.capacity.items()}


def both_ways(*joined: tuple[str, str, float]) -> dict[tuple[str, str], float]:
    return {ends: rate for a, b, rate in joined for ends in ((a, b), (b, a))}


def all_reduce_s(graph: Graph) -> float:
    """Of 1 GB."""
    return bound(graph, "all_reduce", GB).seconds


def test_a_dump_has_switches_that_forward() -> None:
    """The GPUs' own PCIe 4 x16 carries 24 GB/s, the three switches' PCIe 3 x16 12; 12 NVLinks of 20 GB/s go to the NVSwitch.

    Of two GPUs the whole message must leave each: over 24 + 240 GB/s.
    """
    graph = nccl_graph(FILES / "dump.xml")
    gpus = [(gpu, other, rate) for gpu in ("gpu0", "gpu1") for other, rate in (("0000:15:00.0", 24.0), ("nvswitch", 240.0))]
    up = [("0000:15:00.0", "0000:13:00.0", 12.0), ("0000:13:00.0", "0000:11:00.0", 12.0), ("0000:11:00.0", "cpu0", 12.0)]
    assert links(graph) == both_ways(*gpus, *up)
    assert graph.world_size == 2 and graph.left_out == ("network cards: 1",)
    assert all_reduce_s(graph) == pytest.approx(1 / 264)


def hint_links(cpu: float) -> dict[tuple[str, str], float]:
    """Two GPUs behind each of four switches, one to a CPU, all at PCIe 4 x16; each CPU joined to each other CPU and no more."""
    gpus = [(f"gpu{gpu}", f"ffff:ff:0{gpu // 2 + 1}.0", 24.0) for gpu in range(8)]
    switches = [(f"ffff:ff:0{cpu + 1}.0", f"cpu{cpu}", 24.0) for cpu in range(4)]
    return both_ways(*gpus, *switches, *((f"cpu{a}", f"cpu{b}", cpu) for a in range(4) for b in range(a)))


@pytest.mark.parametrize(
    ("cpu", "seconds"),
    [
        (10.0, 14 / 192),  # eight GPUs send 2 x 7 messages over 8 x 24 GB/s; between CPUs 6 messages over 4 x 3 x 10: 6 / 120
        (4.0, 6 / 48),  # four CPUs send 2 x 3 messages over 4 x 3 x 4 GB/s
    ],
)
def test_a_hint_without_gpus_has_them_by_their_class(cpu: float, seconds: float) -> None:
    graph = nccl_graph(FILES / "hint.xml", cpu)
    assert links(graph) == hint_links(cpu)
    assert graph.nodes[:8] == tuple(f"gpu{gpu}" for gpu in range(8)) and graph.left_out == ("network cards: 4",)
    found = bound(graph, "all_reduce", GB)
    assert found.seconds == pytest.approx(seconds)
    assert (("cpu0", "cpu1") in found.links) == (cpu == 4.0)  # those that it comes from are named


def test_the_rate_between_cpus_is_asked_for_by_its_option() -> None:
    with pytest.raises(UserError, match=r"hint\.xml: 4 CPUs have GPUs, .*; give --cpu-gbytes-per-s$"):
        nccl_graph(FILES / "hint.xml")


def test_c2c_joins_a_gpu_and_its_cpu() -> None:
    """8 links of 43125 MB/s make 345 GB/s, beside PCIe 1 x16 of 3. One GPU alone has nothing to send."""
    graph = nccl_graph(FILES / "c2c.xml")
    assert links(graph) == both_ways(("gpu0", "cpu0", 348.0))
    assert all_reduce_s(graph) == 0


def test_two_superchips() -> None:
    """10 x 44.712 = 447.12 GB/s of C2C and PCIe 5 x16 of 48 to each CPU; 6 NVLinks of 20.6 = 123.6 between the GPUs.

    The whole message leaves a GPU over its NVLinks and over both CPUs, of which the link between them is the least: 123.6 + 60.
    """
    graph = nccl_graph(FILES / "superchips.xml", 60.0)
    assert links(graph) == pytest.approx(
        both_ways(("gpu0", "cpu0", 495.12), ("gpu1", "cpu1", 495.12), ("gpu0", "gpu1", 123.6), ("cpu0", "cpu1", 60.0))
    )
    assert all_reduce_s(graph) == pytest.approx(1 / 183.6)


def test_xgmi_joins_amd_gpus() -> None:
    """48 GB/s to each of the three others and PCIe 5 x16, 48, to the CPU: four GPUs send 2 x 3 messages over 4 x 192 GB/s."""
    graph = nccl_graph(FILES / "xgmi.xml")
    gpus = [f"gpu{gpu}" for gpu in range(4)]
    expected = [(a, b, 48.0) for a in gpus for b in gpus if a < b] + [(gpu, "cpu0", 48.0) for gpu in gpus]
    assert links(graph) == both_ways(*expected)
    assert all_reduce_s(graph) == pytest.approx(6 / 768)


def test_an_all_gather_on_an_nvswitch_takes_all_links(tmp_path: Path) -> None:
    """12 NVLinks of 20 GB/s to the switch and PCIe of 24 to the CPU: 264 into each of 8 GPUs, for the 7 shares of the others."""
    nvlinks = '<nvlink target="ffff" count="12" tclass="0x068000"/>'
    graph = nccl_graph(written(tmp_path, "".join(gpu(f"0{rank}", rank, nvlinks, "80") for rank in range(8))))
    assert optimum(graph).bytes_per_s(graph) == pytest.approx(8 / 7 * 264 * GB)


def test_the_links_are_printed() -> None:
    lines = summary(nccl_graph(FILES / "c2c.xml", 5.0), "all_reduce", 1 << 20)
    assert ("from gpu0", "to cpu0 348 GB/s") in lines and ("left out", "network cards: 1") in lines
    assert ("left out", "--cpu-gbytes-per-s, which nothing here asks for") in lines


def pci(bus: str, inside: str = "", kind: str = "", speed: str = "16.0 GT/s PCIe", width: str = "16") -> str:
    return f'<pci busid="{bus}" class="{kind}" link_speed="{speed}" link_width="{width}">{inside}</pci>'


def gpu(bus: str, rank: int | str, inside: str = "", sm: str = "90", speed: str = "16.0 GT/s PCIe", width: str = "16") -> str:
    return pci(bus, f'<gpu dev="0" sm="{sm}" rank="{rank}">{inside}</gpu>', "0x030200", speed, width)


def written(folder: Path, *cpus: str, hosts: tuple[str, ...] = ()) -> Path:
    """What is inside each <cpu>, from line 3 on; hosts: of each."""
    named = [f'host_hash="{host}"' for host in hosts] or [""] * len(cpus)
    texts = [f'<cpu numaid="{n}" {host}>\n{text}\n</cpu>\n' for n, (host, text) in enumerate(zip(named, cpus, strict=True))]
    path = folder / "topology.xml"
    path.write_text('<system version="1">\n' + "".join(texts) + "</system>\n")
    return path


@pytest.mark.parametrize(
    ("sm", "rate"),
    [(60, 18), (70, 20), (80, 20), (86, 12), (89, 20), (90, 20.6), (100, 40.1), (103, 40.1), (120, 40.1), (121, 40.1)],
)
def test_nvlinks_go_by_the_generation(sm: int, rate: float, tmp_path: Path) -> None:
    nvlink = '<nvlink target="0000:0{}:00.0" count="2" tclass="0x030200"/>'
    text = gpu("0000:01:00.0", 0, nvlink.format(2), str(sm)) + gpu("0000:02:00.0", 1, nvlink.format(1), str(sm))
    assert links(nccl_graph(written(tmp_path, text)))["gpu0", "gpu1"] == 2 * rate


@pytest.mark.parametrize(
    ("speed", "width", "rate"),
    [
        ("2.5 GT/s", "16", 3),
        ("5.0 GT/s PCIe", "16", 6),
        ("8 GT/s", "8", 6),
        ("32.0 GT/s PCIe", "0", 48),  # the width is not known: 16, as NCCL takes it
        ("64.0 GT/s PCIe", "16", 96),
    ],
)
def test_pcie_goes_by_lanes_and_speed(speed: str, width: str, rate: float, tmp_path: Path) -> None:
    assert links(nccl_graph(written(tmp_path, gpu("01", 0, speed=speed, width=width))))["gpu0", "cpu0"] == rate


@pytest.mark.parametrize(
    ("text", "option", "known"),
    [
        (gpu("01", 0, speed="Unknown", width="255"), "pcie", 7.0),
        (gpu("01", 0, speed="", width="0"), "pcie", 7.0),
        (gpu("01", 0, '<nvlink target="02" count="1" tclass="0x068001"/>', "35"), "nvlink", 24 + 7.0),
        (gpu("01", 0, '<xgmi target="02" count="1" tclass="0x068001"/>'), "xgmi", 24 + 7.0),
    ],
)
def test_what_no_rate_is_known_for_is_asked_for(text: str, option: str, known: float, tmp_path: Path) -> None:
    path = written(tmp_path, text)
    with pytest.raises(UserError, match=f"topology.xml:3: .*; give --{option}-gbytes-per-s$"):
        nccl_graph(path)
    graph = nccl_graph(path, **{f"{option}_gbytes_per_s": 7.0})
    assert links(graph)["gpu0", "cpu0"] == known and not graph.left_out
    with pytest.raises(UserError, match=f"--{option}-gbytes-per-s 0.0: a rate is above 0"):
        nccl_graph(path, **{f"{option}_gbytes_per_s": 0.0})


def test_links_to_what_is_not_there_are_left_out_and_counted(tmp_path: Path) -> None:
    """A dump of some GPUs of a machine names NVLinks to the others; one of Azure's names the GPU itself."""
    nvlinks = "".join(f'<nvlink target="0000:0{bus}:00.0" count="2" tclass="0x030200"/>' for bus in (1, 2, 3))
    text = gpu("0000:01:00.0", 0, nvlinks) + gpu("00000000:02:00.0", 1) + pci("04", kind="0x010802") + pci("05", kind="0x030000")
    graph = nccl_graph(written(tmp_path, text + "<nic/>"))
    assert links(graph) == both_ways(("gpu0", "cpu0", 24.0), ("gpu1", "cpu0", 24.0)) | {("gpu0", "gpu1"): 41.2}
    assert set(graph.left_out) == {
        "<nvlink> to the GPU itself: 1",
        "<nvlink> to a GPU that is not in it: 1",
        "PCI devices without GPUs: 2",
        "network cards: 1",
    }


def test_an_nvlink_without_a_class_goes_to_a_gpu_or_a_switch(tmp_path: Path) -> None:
    text = gpu("01", 0, '<nvlink target="02" count="1"/><nvlink target="fffffff:ffff:ff" count="1"/>') + gpu("02", 1)
    found = links(nccl_graph(written(tmp_path, text)))
    assert found["gpu0", "gpu1"] == found["gpu0", "nvswitch"] == 20.6


def test_power_joins_gpus_to_their_cpu_by_nvlink(tmp_path: Path) -> None:
    texts = [gpu(f"0{cpu}", cpu, '<nvlink target="04ea" count="3" tclass="0x068001"/>', "70") for cpu in (0, 1)]
    graph = nccl_graph(written(tmp_path, *texts), 32.0)
    assert links(graph) == both_ways(("gpu0", "cpu0", 84.0), ("gpu1", "cpu1", 84.0), ("cpu0", "cpu1", 32.0))


def test_two_levels_of_one_broadcom_switch_are_one(tmp_path: Path) -> None:
    """Of the fourth generation both levels say the same, of the fifth the lower ones say 0x1000 more; others stay two."""
    ids = 'vendor="0x1000" device="0x{}" subsystem_vendor="0x1000" subsystem_device="0x{}"'
    for upper, lower, merged in [
        (("c010", "a032"), ("c010", "a096"), True),
        (("c030", "0001"), ("c030", "1001"), True),
        (("c030", "1001"), ("c030", "1001"), False),
    ]:
        sub = pci("0000:02:00.0", gpu("0000:03:00.0", 0) + gpu("0000:04:00.0", 1), "0x060400", "8 GT/s")
        sub = sub.replace("<pci", f"<pci {ids.format(*lower)}", 1)
        top = pci("0000:01:00.0", sub, "0x060400").replace("<pci", f"<pci {ids.format(*upper)}", 1)
        names = nccl_graph(written(tmp_path, top)).nodes[2:]
        assert set(names) - {"cpu0"} == ({"0000:01:00.0"} if merged else {"0000:01:00.0", "0000:02:00.0"})


def test_parts_of_a_switch_are_joined(tmp_path: Path) -> None:
    one = pci("0000:01:00.0", gpu("0000:02:00.0", 0) + '<pcilink target="0000:03:00.0"/>', "0x060400")
    two = pci("0000:03:00.0", gpu("0000:04:00.0", 1) + '<pcilink target="0000:01:00.0"/><pcilink target="0000:09:00.0"/>')
    found = links(nccl_graph(written(tmp_path, one + two)))
    assert found["0000:01:00.0", "0000:03:00.0"] == found["0000:03:00.0", "0000:01:00.0"] == 5000


def test_hosts_of_one_nvswitch_keep_their_own_cpus(tmp_path: Path) -> None:
    """The same bus ids on both; their CPUs are joined by nothing, so no rate is asked for."""
    texts = [gpu("0000:01:00.0", rank, '<nvlink target="fff" count="18" tclass="0x068000"/>', "103") for rank in (4, 5)]
    path = written(tmp_path, *texts, hosts=("0xa", "0xb"))
    assert links(nccl_graph(path)) == both_ways(("host0/gpu4", "nvswitch", 721.8), ("host1/gpu5", "nvswitch", 721.8)) | both_ways(
        ("host0/gpu4", "host0/cpu0", 24.0), ("host1/gpu5", "host1/cpu1", 24.0)
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<cpu>", ":5: not a readable XML file: mismatched tag"),
        ("<nvme/>", ":3: <nvme> inside <cpu> is not understood; known there: pci, nic"),
        (gpu("01", 0, "<nvmlink/>"), ":3: <nvmlink> inside <gpu> is not understood; known there: nvlink, xgmi, c2c"),
        (gpu("01", 0).replace("</pci>", "<pcilink/></pci>"), ":3: <pcilink> inside <pci> is not understood; known there: gpu"),
        (gpu("01", 0, '<nvlink target="02" count="x"/>'), ":3: <nvlink> has count 'x'; it is a whole number, 1 or more"),
        (gpu("01", 0, '<c2c bw="43125"/>'), ":3: <c2c> has no count"),
        (gpu("01", 0, '<nvlink target="02" count="1" tclass="0x020000"/>'), ":3: <nvlink> to a device of class 0x020000; known"),
        (gpu("01", 0).replace("<gpu", "<gpu mlopart='0'"), ":3: several ranks on one GPU"),
        (gpu("01", 0).replace("</gpu>", "</gpu><gpu/>"), ":3: several ranks on one GPU"),
        (gpu("01", 0) + "\n" + gpu("01", 1), ":4: a second GPU with busid 01"),
        (gpu("01", 0) + gpu("02", 0), ": two GPUs have the rank 0"),
        (gpu("01", "x"), ":3: <gpu> has rank 'x'"),
        (gpu("01", 0).replace('busid="01"', ""), ":3: <pci> has no busid"),
        ("</cpu><cpu numaid='0'>" + gpu("01", 0), ":3: a second <cpu> with numaid 0"),
        ("</cpu><gpu/><cpu>", ":3: <gpu> inside <system> is not understood; known there: cpu"),
        (pci("01", kind="0x010802"), ":1: there is no <gpu> in it"),
    ],
)
def test_what_is_wrong_is_said_with_its_line(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as raised:
        nccl_graph(written(tmp_path, text))
    assert message in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", ":1: not a readable XML file: no element found"),
        (b"\x00\xff", ":1: not a readable XML file"),
        (b'<?xml version="1.0" encoding="nothing"?><system/>', ":1: not a readable XML file: unknown encoding"),
        (b"<graphs version='1'/>", ":1: these are NCCL's rings and trees (<graphs>)"),
        (b"<system version='9'/>", ":1: version 9 is not known; known: 1, 2"),
    ],
)
def test_a_file_that_is_no_topology_is_refused(text: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "t.xml").write_bytes(text)
    with pytest.raises(UserError) as raised:
        nccl_graph(tmp_path / "t.xml")
    assert message in str(raised.value)
