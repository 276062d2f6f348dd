"""NCCL's topology files: what NCCL_TOPO_DUMP_FILE writes, the hints that clouds ship for NCCL_TOPO_FILE, and RCCL's for AMD.

    system > cpu > pci > pci > .. > gpu > nvlink, xgmi, c2c        pci > pcilink        cpu, pci > nic > net

    gpu       a rank, in the order of rank or dev; a pci of a GPU's class (0x03, AMD's 0x12) without <gpu> is one too
    pci       with GPUs below it a switch, which only forwards; to what is above it link_width x the rate of a lane
    nvlink    count x the rate of one, by sm: to a GPU (each lists its own direction), an NVSwitch (0x068000), its CPU (0x068001)
    xgmi      the same, by gcn
    c2c       between a GPU and its CPU, each way bw x count / 1000
    pcilink   from a switch to another part of its chip, its own direction
    cpu       joined to the others of its host (host_hash) that have GPUs, each pair at --cpu-gbytes-per-s

Rates are GB/s, those of NCCL's and RCCL's own src/graph/topo.h; two levels of one Broadcom switch are one, as there. Left out are
network cards, PCI devices without GPUs and links to GPUs that are not in the file. Everything else is refused.
"""

import re
from collections import defaultdict, deque
from dataclasses import replace
from itertools import combinations
from math import isfinite
from pathlib import Path
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

from thinwire.collectives.synthesis.graph import Graph, matrix_graph
from thinwire.errors import UserError

_LANE = {2.5: 0.1875, 5.0: 0.375, 8.0: 0.75, 16.0: 1.5, 32.0: 3.0, 64.0: 6.0}
"""By GT/s."""
_WIDTHS = (1, 2, 4, 8, 12, 16, 32)
_NVLINK = ((100, 40.1), (90, 20.6), (87, 20.0), (86, 12.0), (70, 20.0), (60, 18.0))
"""From this sm on."""
_XGMI = (("906", 24.0), ("908", 24.0), ("90a", 36.0), ("910", 36.0), ("94", 48.0), ("95", 48.0))
"""By the first letters of gcn, without gfx; 910 is how old files call gfx90a."""
_PCILINK = 5000.0
_GPU, _VGA, _CARD, _NVSWITCH, _CPU = ("0x03", "0x12"), "0x0300", "0x02", "0x068000", "0x068001"
_VERSIONS = ("1", "2")
_INSIDE = {"system": "cpu", "cpu": "pci, nic", "pci": "pci, gpu, nic, pcilink", "gpu": "nvlink, xgmi, c2c"}
_LINE = " line"
"""The attribute with an element's line in the file: no name in a file has a space."""


def nccl_graph(
    path: Path,
    cpu_gbytes_per_s: float | None = None,
    *,
    pcie_gbytes_per_s: float | None = None,
    nvlink_gbytes_per_s: float | None = None,
    xgmi_gbytes_per_s: float | None = None,
) -> Graph:
    """The graph of the machine in `path`, in GB/s. The rates, each way, are for what is not known: between two CPUs; of a PCIe
    link; of one NVLink; of one xGMI link. UserError in one line, with the line of the file."""
    given = {"cpu": cpu_gbytes_per_s, "pcie": pcie_gbytes_per_s, "nvlink": nvlink_gbytes_per_s, "xgmi": xgmi_gbytes_per_s}
    for kind, rate in given.items():
        if rate is not None and not (isfinite(rate) and rate > 0):
            raise UserError(f"{_option(kind)} {rate}: a rate is above 0")
    box = _Box(path, {kind: rate for kind, rate in given.items() if rate is not None})
    return box.graph(_parsed(path))


def _option(kind: str) -> str:
    return f"--{kind}-gbytes-per-s"


def _parsed(path: Path) -> Element:
    """The root. Each element knows its line."""
    builder, parser = TreeBuilder(), expat.ParserCreate()
    parser.StartElementHandler = lambda tag, found: builder.start(tag, found | {_LINE: str(parser.CurrentLineNumber)})
    parser.EndElementHandler = builder.end
    try:
        parser.Parse(path.read_bytes(), True)
    except OSError as error:
        raise UserError(f"{path}: not a readable XML file: {error.strerror}") from None
    except expat.ExpatError as error:
        raise UserError(f"{path}:{error.lineno}: not a readable XML file: {expat.errors.messages[error.code]}") from None
    except (ValueError, LookupError) as error:
        raise UserError(f"{path}:1: not a readable XML file: {error}") from None
    return builder.close()


class _Box:
    """gpus: their numbers, by host and bus id; cpus: their hosts; switches: the node that each is (part of); names: what is
    printed of a node; rates: GB/s by (from, to)."""

    def __init__(self, path: Path, given: dict[str, float]) -> None:
        self._path, self._given = path, given
        self._gpus: dict[str, int | None] = {}
        self._cpus: dict[str, str] = {}
        self._switches: dict[str, str] = {}
        self._names: dict[str, str] = {}
        self._rates: defaultdict[tuple[str, str], float] = defaultdict(float)
        self._links: list[tuple[str, Element, str, str]] = []
        """Those whose other end may come later in the file: from node, link, its CPU, rate's kind or "pcilink"."""
        self._left_out: defaultdict[str, int] = defaultdict(int)
        self._asked: set[str] = set()
        self._has_gpus = False

    def graph(self, root: Element) -> Graph:
        self._read(root)
        if not self._gpus:
            raise self._refused(root, "there is no <gpu> in it, and no <pci> of a GPU's class (0x03)")
        self._number()
        for link in self._links:
            self._add_link(*link)
        self._join_cpus()
        order = [*sorted(self._gpus, key=lambda gpu: self._gpus[gpu] or 0), *self._cpus, *dict.fromkeys(self._switches.values())]
        rows = [[self._rates.get((a, b), 0.0) for b in order] for a in order]
        names = [self._names[node] for node in order]
        graph = matrix_graph(rows, switches=range(len(self._gpus), len(order)), name=str(self._path), names=names)
        notes = [f"{what}: {count}" for what, count in self._left_out.items()]
        notes += [f"{_option(kind)}, which nothing here asks for" for kind in self._given if kind not in self._asked]
        return replace(graph, left_out=tuple(notes))

    def _read(self, root: Element) -> None:
        if root.tag == "graphs":
            raise self._refused(root, "these are NCCL's rings and trees (<graphs>); give what NCCL_TOPO_DUMP_FILE writes")
        if root.tag != "system":
            raise self._refused(root, f"the outermost element is <{root.tag}>; NCCL's topology begins with <system>")
        if root.get("version", "1") not in _VERSIONS:
            raise self._refused(root, f"version {root.get('version')} is not known; known: {', '.join(_VERSIONS)}")
        self._has_gpus = root.find(".//gpu") is not None
        hosts = list(dict.fromkeys(cpu.get("host_hash", "") for cpu in root))
        for cpu in root:
            if cpu.tag != "cpu":
                raise self._unknown(cpu, "system")
            host = f"host{hosts.index(cpu.get('host_hash', ''))}/" if len(hosts) > 1 else ""
            name = f"{host}cpu{cpu.get('numaid', len(self._cpus))}"
            if name in self._cpus:
                raise self._refused(cpu, f"a second <cpu> with numaid {cpu.get('numaid')}")
            self._cpus[name], self._names[name] = host, name
            self._read_below(cpu, name, host)

    def _read_below(self, cpu: Element, cpu_node: str, host: str) -> None:
        waiting = deque((child, cpu, cpu_node) for child in cpu)
        while waiting:
            child, parent, above = waiting.popleft()
            if child.tag == "pcilink" and parent.tag == "pci":
                self._links.append((above, child, cpu_node, "pcilink"))
            elif child.tag == "nic":
                self._left_out["network cards"] += 1
            elif child.tag != "pci":
                raise self._unknown(child, parent.tag)
            elif self._is_gpu(child):
                self._add_gpu(child, above, cpu_node, host)
            elif any(map(self._is_gpu, child.iter("pci"))):
                node = self._add_switch(child, parent, above, host)
                waiting.extendleft((below, child, node) for below in reversed(child))
            else:
                card = child.find("nic") is not None or child.get("class", "").startswith(_CARD)
                self._left_out["network cards" if card else "PCI devices without GPUs"] += 1

    def _is_gpu(self, pci: Element) -> bool:
        """Beside <gpu>s, what only draws the console (VGA) is none."""
        if pci.find("gpu") is not None:
            return True
        kind = pci.get("class", "")
        return kind.startswith(_GPU) and pci.find("pci") is None and not (self._has_gpus and kind.startswith(_VGA))

    def _add_gpu(self, pci: Element, above: str, cpu: str, host: str) -> None:
        node = host + _bus(self._text(pci, "busid"))
        if node in self._gpus:
            raise self._refused(pci, f"a second GPU with busid {pci.get('busid')}")
        self._gpus[node], self._names[node] = None, host
        for index, gpu in enumerate(pci):
            if gpu.tag != "gpu":
                raise self._unknown(gpu, "pci", "gpu")
            if index or gpu.get("mlopart") is not None:
                raise self._refused(gpu, f"several ranks on one GPU ({pci.get('busid')}) are not read; leave one <gpu> a <pci>")
            key = next((key for key in ("rank", "dev") if gpu.get(key, "-1") != "-1"), None)
            self._gpus[node] = self._integer(gpu, key, 0) if key else None
            for link in gpu:
                if link.tag in ("nvlink", "xgmi"):
                    self._links.append((node, link, cpu, link.tag))
                    link.attrib |= {key: gpu.get(key, "") for key in ("sm", "gcn")}
                elif link.tag == "c2c":
                    self._join(node, cpu, self._integer(link, "bw") * self._integer(link, "count") / 1000)
                else:
                    raise self._unknown(link, "gpu")
        self._join(node, above, self._pcie(pci))

    def _add_switch(self, pci: Element, parent: Element, above: str, host: str) -> str:
        """The node for what is below it."""
        key = f"{host}pci {_bus(self._text(pci, 'busid'))}"
        if _broadcom(pci, 1) and _broadcom(pci, 1) == _broadcom(parent, 0):
            del pci.attrib["device"]  # what is below it is merged no further
            return self._switches.setdefault(key, above)
        node = f"{key} {pci.get(_LINE)}"  # files written by hand give several the same busid
        self._switches.setdefault(key, node)
        self._switches[node] = node
        self._names[node] = f"{host}{pci.get('busid')}"
        self._join(node, above, self._pcie(pci))
        return node

    def _number(self) -> None:
        """Names by rank or dev; those that say neither take the numbers that are free, in the order of the file."""
        numbers = [number for number in self._gpus.values() if number is not None]
        if twice := {number for number in numbers if numbers.count(number) > 1}:
            raise self._refused(None, f"two GPUs have the rank {min(twice)}")
        free = iter(sorted(set(range(len(self._gpus))) - set(numbers)))
        for node, number in self._gpus.items():
            self._gpus[node] = next(free) if number is None else number
            self._names[node] += f"gpu{self._gpus[node]}"

    def _add_link(self, node: str, link: Element, cpu: str, kind: str) -> None:
        host = self._cpus[cpu]
        if kind == "pcilink":
            other = self._switches.get(f"{host}pci {_bus(self._text(link, 'target'))}")
            if other is not None and other != node:
                self._rates[node, other] += _PCILINK
            return
        target = host + _bus(link.get("target", ""))
        to = link.get("tclass", _GPU[0] if target in self._gpus else _NVSWITCH)
        if to.startswith(_GPU) and (target == node or target not in self._gpus):
            self._left_out[f"<{kind}> to {'the GPU itself' if target == node else 'a GPU that is not in it'}"] += 1
            return
        rate = self._integer(link, "count") * self._rate_of_one(link, kind)
        if to.startswith(_GPU):
            self._rates[node, target] += rate
        elif to.startswith(_CPU):
            self._join(node, cpu, rate)
        elif to.startswith(_NVSWITCH):
            self._switches["nvswitch"] = self._names["nvswitch"] = "nvswitch"
            self._join(node, "nvswitch", rate)
        else:
            raise self._refused(link, f"<{kind}> to a device of class {to}; known: GPU, NVSwitch ({_NVSWITCH}), CPU ({_CPU})")

    def _join_cpus(self) -> None:
        used = {end for pair in self._rates for end in pair if end in self._cpus}
        pairs = [pair for pair in combinations(sorted(used), 2) if self._cpus[pair[0]] == self._cpus[pair[1]]]
        if pairs:
            about = f"{len(used)} CPUs have GPUs, and the file does not say how fast they are joined"
            rate = self._given_or_refused(None, "cpu", about)
            for pair in pairs:
                self._join(*pair, rate)

    def _join(self, first: str, second: str, rate: float) -> None:
        self._rates[first, second] += rate
        self._rates[second, first] += rate

    def _pcie(self, pci: Element) -> float:
        speed, width = pci.get("link_speed", ""), self._integer(pci, "link_width", 0) if pci.get("link_width") else 0
        match = re.match(r"(\d+(?:\.\d+)?) ?GT/s", speed)
        lane = _LANE.get(float(match[1])) if match else None
        if lane is None or (width and width not in _WIDTHS):
            about = f"<pci busid={pci.get('busid')!r}> has link_speed {speed!r} and link_width {width}, which says no rate"
            return self._given_or_refused(pci, "pcie", about)
        return lane * (width or 16)  # 0: not known; NCCL takes 16

    def _rate_of_one(self, link: Element, kind: str) -> float:
        sm, gcn = link.get("sm", ""), link.get("gcn", "")
        if kind == "nvlink":
            known = [rate for least, rate in _NVLINK if sm.isdecimal() and int(sm) >= least]
        else:
            known = [rate for start, rate in _XGMI if gcn.removeprefix("gfx").startswith(start)]
        which = f"sm {sm or 'missing'}" if kind == "nvlink" else f"gcn {gcn or 'missing'}"
        about = f"the rate of an <{kind}> of a GPU with {which} is not known"
        return known[0] if known else self._given_or_refused(link, kind, about)

    def _given_or_refused(self, element: Element | None, kind: str, about: str) -> float:
        self._asked.add(kind)
        if kind not in self._given:
            raise self._refused(element, f"{about}; give {_option(kind)}")
        return self._given[kind]

    def _integer(self, element: Element, key: str, least: int = 1) -> int:
        text = self._text(element, key)
        if not re.fullmatch(r"-?\d{1,9}", text) or int(text) < least:
            raise self._refused(element, f"<{element.tag}> has {key} {text!r}; it is a whole number, {least} or more")
        return int(text)

    def _text(self, element: Element, key: str) -> str:
        value = element.get(key)
        if value is None:
            raise self._refused(element, f"<{element.tag}> has no {key}")
        return value

    def _unknown(self, element: Element, inside: str, known: str = "") -> UserError:
        what = f"<{element.tag}> inside <{inside}> is not understood; known there: {known or _INSIDE[inside]}"
        return self._refused(element, what)

    def _refused(self, element: Element | None, what: str) -> UserError:
        return UserError(f"{self._path}{'' if element is None else ':' + element.get(_LINE, '')}: {what}")


def _bus(busid: str) -> str:
    """Alike for the same bus, however it is written."""
    return re.sub(r"[.:]", "", busid).lstrip("0").lower()


def _broadcom(pci: Element, level: int) -> int | None:
    """The PCIe generation of a Broadcom switch that shows itself as two levels: of its upper (0) or lower (1) one."""
    keys = ("vendor", "device", "subsystem_vendor", "subsystem_device")
    numbers = "".join(pci.get(key, "").lower().removeprefix("0x").zfill(4) for key in keys)[:13]
    return {"1000c0101000a": 4, f"1000c0301000{level}": 5}.get(numbers)
