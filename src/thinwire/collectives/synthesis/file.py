"""A topology from a file: a matrix of capacities as ForestColl's, or NCCL's XML.

    .json   {"capacity": [[0, 300], ..], "switches": [8, 9], "names": ["gpu0", ..]}     GB/s from row to column, 0: no link
    .csv    the rows of the matrix; "# switches: 8, 9" and "# names: gpu0, .." in lines of their own
    .xml    what NCCL_TOPO_DUMP_FILE writes: one box, its GPUs with their NVLinks, PCIe and CPUs

Switches are the nodes that only forward, by their row, from 0; without any, all compute. Names may be left out.

Of the XML are read: system, cpu, pci (link_speed, link_width), gpu (rank or dev, sm), nvlink (target, count, tclass). Network
cards are left out: inside one box nothing is at their other end. Everything else is refused. Speeds are NCCL's own constants:
GB/s per NVLink by generation, 12 GB/s for PCIe 3.0 x16 and in proportion. What two CPUs send each other is not in the file.
"""

import re
from collections import Counter
from itertools import combinations
from pathlib import Path
from xml.etree import ElementTree

from pydantic import BaseModel, ConfigDict, ValidationError

from thinwire.collectives.synthesis.graph import Graph, matrix_graph
from thinwire.errors import UserError

_KINDS = (".json", ".csv", ".xml")
_NVLINK_GBYTES = {70: 20.0, 80: 20.0, 90: 20.6, 100: 40.1}
_PCIE_GBYTES_PER_GT = 12.0 / (8.0 * 16)
_IGNORED = {"nic", "net"}
_NVSWITCH, _GPU, _CPU = "0x0680", "0x0302", "0x0604"


class _Matrix(BaseModel):
    model_config = ConfigDict(extra="forbid")

    capacity: list[list[float]]
    switches: list[int] = []
    names: list[str] = []


def read_topology(path: Path, cpu_gbytes_per_s: float | None = None) -> Graph:
    """UserError in one line. cpu_gbytes_per_s: for an XML with several CPUs."""
    if path.suffix not in _KINDS:
        raise UserError(f"{path}: a topology is one of {', '.join(_KINDS)}")
    if path.suffix == ".xml":
        return nccl_graph(path, cpu_gbytes_per_s)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    try:
        matrix = _Matrix.model_validate_json(text) if path.suffix == ".json" else _from_csv(text, path)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "file"
        raise UserError(f"{path}: {where}: {first['msg']}") from None
    return matrix_graph(matrix.capacity, switches=matrix.switches, names=matrix.names, name=str(path))


def nccl_graph(path: Path, cpu_gbytes_per_s: float | None = None) -> Graph:
    """The graph of the box in `path`. cpu_gbytes_per_s: in each direction between two CPUs, needed where several have GPUs."""
    try:
        root = ElementTree.parse(path).getroot()
    except (OSError, ElementTree.ParseError) as error:
        raise UserError(f"{path}: not a readable XML file: {error}") from None
    return _Box(path, root).graph(cpu_gbytes_per_s)


def _from_csv(text: str, path: Path) -> _Matrix:
    found: dict[str, list[str]] = {"switches": [], "names": []}
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("#"):
            key, _, values = line[1:].partition(":")
            if key.strip() in found:
                found[key.strip()] = [value.strip() for value in values.split(",") if value.strip()]
        elif line.strip():
            try:
                rows.append([float(value) for value in line.split(",")])
            except ValueError:
                raise UserError(f"{path}: line {number}: {line.strip()[:40]!r} is not a row of numbers") from None
    return _Matrix.model_validate({"capacity": rows, **found})


class _Box:
    """gpus: rank by bus id; cpus; forwards: all other nodes that have GPUs below them; rates: GB/s by (from, to), all by name."""

    def __init__(self, path: Path, root: ElementTree.Element) -> None:
        self._path = path
        if root.tag != "system":
            raise self._refused(f"the outermost element is <{root.tag}>; NCCL's topology begins with <system>")
        self._gpus: dict[str, int] = {}
        for pci in root.iter("pci"):
            if (gpu := pci.find("gpu")) is not None:
                self._gpus[self._text(pci, "busid")] = int(gpu.get("rank", gpu.get("dev", len(self._gpus))))
        self._cpus: list[str] = []
        self._forwards: list[str] = []
        self._rates: Counter[tuple[str, str]] = Counter()
        for element in root:
            if element.tag != "cpu":
                raise self._refused(f"<{element.tag}> inside <system> is not understood; known there: cpu")
            self._cpus.append(f"cpu{element.get('numaid', len(self._cpus))}")
            self._add_children(element, self._cpus[-1])
        if not self._gpus:
            raise self._refused("there is no <gpu> in it")

    def graph(self, cpu_gbytes_per_s: float | None) -> Graph:
        used = [cpu for cpu in self._cpus if any(source == cpu for source, _ in self._rates)]
        if len(used) > 1 and cpu_gbytes_per_s is None:
            raise self._refused(
                f"{len(used)} CPUs have GPUs, and the file does not say how fast they are joined; give cpu_gbytes_per_s"
            )
        for first, second in combinations(used, 2):
            self._join(first, second, cpu_gbytes_per_s or 0.0)
        order = [*sorted(self._gpus, key=self._gpus.__getitem__), *self._cpus, *self._forwards]
        rows = [[float(self._rates[a, b]) for b in order] for a in order]
        names = [f"gpu{self._gpus[name]}" if name in self._gpus else name for name in order]
        return matrix_graph(rows, switches=range(len(self._gpus), len(order)), name=str(self._path), names=names)

    def _add_children(self, element: ElementTree.Element, above: str) -> None:
        for child in element:
            if child.tag in _IGNORED:
                continue
            if child.tag != "pci":
                raise self._refused(f"<{child.tag}> is not understood; known: cpu, pci, gpu, nvlink, nic, net")
            bus, gpu = self._text(child, "busid"), child.find("gpu")
            if gpu is not None:
                self._join(above, bus, self._pcie(child))
                for link in gpu:
                    self._add_nvlink(bus, gpu, link)
            elif child.findall(".//gpu"):
                self._join(above, bus, self._pcie(child))
                self._forwards.append(bus)
                self._add_children(child, bus)

    def _add_nvlink(self, bus: str, gpu: ElementTree.Element, link: ElementTree.Element) -> None:
        """Each GPU lists its own direction of an NVLink to another GPU; those to a switch and to a CPU are listed once."""
        if link.tag != "nvlink":
            raise self._refused(f"<{link.tag}> inside <gpu> is not understood; known there: nvlink")
        rate = int(self._text(link, "count")) * self._nvlink(gpu)
        kind, target = link.get("tclass", _GPU)[:6], self._text(link, "target")
        if kind == _GPU:
            if target not in self._gpus:
                raise self._refused(f"NVLink of {bus} leads to {target}, which is no GPU of this box")
            self._rates[bus, target] += rate  # type: ignore[assignment]
        elif kind == _NVSWITCH:
            if "nvswitch" not in self._forwards:
                self._forwards.append("nvswitch")
            self._join(bus, "nvswitch", rate)
        elif kind == _CPU:
            self._join(bus, self._cpus[-1], rate)
        else:
            raise self._refused(f"NVLink of {bus} leads to a device of class {kind}; known: GPU, NVSwitch, CPU")

    def _join(self, first: str, second: str, rate: float) -> None:
        self._rates[first, second] += rate  # type: ignore[assignment]
        self._rates[second, first] += rate  # type: ignore[assignment]

    def _pcie(self, element: ElementTree.Element) -> float:
        speed, width = re.match(r"[\d.]+", self._text(element, "link_speed")), int(self._text(element, "link_width"))
        if speed is None or width <= 0:
            raise self._refused(
                f"<pci busid={element.get('busid')}> has link_speed {element.get('link_speed')!r} and link_width {width}"
            )
        return float(speed.group()) * width * _PCIE_GBYTES_PER_GT

    def _nvlink(self, gpu: ElementTree.Element) -> float:
        generation = int(self._text(gpu, "sm")) // 10 * 10
        if generation not in _NVLINK_GBYTES:
            known = sorted(_NVLINK_GBYTES)
            raise self._refused(f"gpu with sm {gpu.get('sm')}: the rate of its NVLinks is not known; known: {known}")
        return _NVLINK_GBYTES[generation]

    def _text(self, element: ElementTree.Element, key: str) -> str:
        value = element.get(key)
        if value is None:
            raise self._refused(f"<{element.tag}> has no {key}")
        return value

    def _refused(self, what: str) -> UserError:
        return UserError(f"{self._path}: {what}")
