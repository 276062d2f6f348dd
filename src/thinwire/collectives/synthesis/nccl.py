"""NCCL's topology XML (what NCCL_TOPO_DUMP_FILE writes) as a graph: one box, its GPUs with their NVLinks, PCIe and CPUs.

Read: system, cpu, pci (link_speed, link_width), gpu (rank or dev, sm), nvlink (target, count, tclass). Network cards are left
out: inside one box nothing is at their other end. Everything else is refused. Speeds are NCCL's own constants: GB/s per NVLink
by generation, 12 GB/s for PCIe 3.0 x16 and in proportion. What two CPUs say to each other is not in the file.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

from thinwire.collectives.synthesis.graph import Graph, matrix_graph
from thinwire.errors import UserError

_NVLINK_GBYTES = {70: 20.0, 80: 20.0, 90: 20.6, 100: 40.1}
_PCIE_GBYTES_PER_GT = 12.0 / (8.0 * 16)
_IGNORED = {"nic", "net"}
_NVSWITCH, _GPU, _CPU = "0x0680", "0x0302", "0x0604"


@dataclass(slots=True)
class _Box:
    """What the file says. gpus: bus id and rank; forwards: all other nodes; links: from, to, GB/s, whether both ways."""

    path: Path
    gpus: dict[str, int] = field(default_factory=dict)
    forwards: list[str] = field(default_factory=list)
    links: list[tuple[str, str, float, bool]] = field(default_factory=list)
    nvlinks: list[tuple[str, str, str, float]] = field(default_factory=list)

    def refuse(self, what: str) -> UserError:
        return UserError(f"{self.path}: {what}")


def nccl_graph(path: Path, cpu_gbytes_per_s: float | None = None) -> Graph:
    """The graph of the box in `path`. cpu_gbytes_per_s: each way between two CPUs, needed where there are several with GPUs."""
    try:
        root = ElementTree.parse(path).getroot()
    except (OSError, ElementTree.ParseError) as error:
        raise UserError(f"{path}: not a readable XML file: {error}") from None
    box = _Box(path)
    if root.tag != "system":
        raise box.refuse(f"the outermost element is <{root.tag}>; NCCL's topology begins with <system>")
    for element in root:
        if element.tag != "cpu":
            raise box.refuse(f"<{element.tag}> inside <system> is not understood; known there: cpu")
        name = f"cpu{element.get('numaid', len(box.forwards))}"
        box.forwards.append(name)
        _children(box, element, name, name)
    if not box.gpus:
        raise box.refuse("there is no <gpu> in it")
    _join_nvlinks(box)
    _join_cpus(box, cpu_gbytes_per_s)
    return _graph(box)


def _children(box: _Box, element: ElementTree.Element, above: str, cpu: str) -> None:
    for child in element:
        if child.tag in _IGNORED:
            continue
        if child.tag != "pci":
            raise box.refuse(f"<{child.tag}> is not understood; known: cpu, pci, gpu, nvlink, nic, net")
        bus, gpu = _text(box, child, "busid"), child.find("gpu")
        if gpu is None and not child.findall(".//gpu"):
            continue
        box.links.append((above, bus, _pcie(box, child), True))
        if gpu is None:
            box.forwards.append(bus)
            _children(box, child, bus, cpu)
            continue
        box.gpus[bus] = int(gpu.get("rank", gpu.get("dev", len(box.gpus))))
        for link in gpu:
            if link.tag != "nvlink":
                raise box.refuse(f"<{link.tag}> inside <gpu> is not understood; known there: nvlink")
            rate = int(_text(box, link, "count")) * _nvlink(box, gpu)
            kind, target = link.get("tclass", _GPU)[:6], _text(box, link, "target")
            box.nvlinks.append((bus, cpu if kind == _CPU else target, kind, rate))


def _text(box: _Box, element: ElementTree.Element, key: str) -> str:
    value = element.get(key)
    if value is None:
        raise box.refuse(f"<{element.tag}> has no {key}")
    return value


def _pcie(box: _Box, element: ElementTree.Element) -> float:
    speed, width = re.match(r"[\d.]+", _text(box, element, "link_speed")), int(_text(box, element, "link_width"))
    if speed is None or width <= 0:
        raise box.refuse(
            f"<pci busid={element.get('busid')}> has link_speed {element.get('link_speed')!r} and link_width {width}"
        )
    return float(speed.group()) * width * _PCIE_GBYTES_PER_GT


def _nvlink(box: _Box, gpu: ElementTree.Element) -> float:
    generation = int(_text(box, gpu, "sm")) // 10 * 10
    if generation not in _NVLINK_GBYTES:
        raise box.refuse(f"gpu with sm {gpu.get('sm')}: the rate of its NVLinks is not known; known: {sorted(_NVLINK_GBYTES)}")
    return _NVLINK_GBYTES[generation]


def _join_nvlinks(box: _Box) -> None:
    """Each GPU lists its own side of an NVLink; those to a switch and to a CPU are listed once, so they get both ways here."""
    for source, target, kind, rate in box.nvlinks:
        if kind == _NVSWITCH:
            target = "nvswitch"
            if target not in box.forwards:
                box.forwards.append(target)
        elif kind == _GPU and target not in box.gpus:
            raise box.refuse(f"NVLink of {source} leads to {target}, which is no GPU of this box")
        elif kind not in (_GPU, _CPU):
            raise box.refuse(f"NVLink of {source} leads to a device of class {kind}; known: GPU, NVSwitch, CPU")
        box.links.append((source, target, rate, kind != _GPU))


def _join_cpus(box: _Box, gbytes_per_s: float | None) -> None:
    used = [cpu for cpu in box.forwards if any(source == cpu for source, *_ in box.links)]
    if len(used) > 1 and gbytes_per_s is None:
        raise box.refuse(f"{len(used)} CPUs have GPUs, and the file does not say how fast they are joined; give cpu_gbytes_per_s")
    for place, first in enumerate(used):
        box.links += [(first, second, gbytes_per_s or 0.0, True) for second in used[place + 1 :]]


def _graph(box: _Box) -> Graph:
    order = sorted(box.gpus, key=box.gpus.__getitem__) + box.forwards
    at = {name: place for place, name in enumerate(order)}
    rows = [[0.0] * len(order) for _ in order]
    for source, target, rate, both_ways in box.links:
        rows[at[source]][at[target]] += rate
        if both_ways:
            rows[at[target]][at[source]] += rate
    names = [f"gpu{box.gpus[name]}" if name in box.gpus else name for name in order]
    return matrix_graph(rows, switches=range(len(box.gpus), len(order)), name=str(box.path), names=names)
