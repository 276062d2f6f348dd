"""The cluster file: one TOML format for all who speak of a network.

    name = "four-hosts"
    ranks = ["host0/cpu0", ...]     # default: devices in the order of the file

    [[host]]
    name = "host{i}"                # {i} counts 0 .. count-1
    count = 4
    device = { kind = "cpu", flops_per_s = "10 Gflop/s", memory_bytes = "4 GiB" }       # a list where devices differ
                                    # kind: "cpu", or any name of a GPU; memory_bytes_per_s = "2 TB/s": what a copy does
    card = { bandwidth_bps = "100 Mbit/s", latency_s = "100 us" }      # a cable to the switch of its rack, or to `to`

    [[rack]]                        # shorthand: a switch, and a cable from it to the core switch
    name = "rack0"
    uplink = { bandwidth_bps = "100 Mbit/s" }

    [[switch]]                      # switches that cards and racks name are made by themselves
    name = "dgx{i}/nvswitch"
    kind = "nvswitch"
    count = 16

    [[link]]                        # any other cable; both directions unless one_way
    source = "dgx{i}/gpu{j}"
    target = "dgx{i}/nvswitch"
    bandwidth_bps = "3.6 Tbit/s"
    each = { i = 16, j = 8 }        # one for each i and j

A quantity is a number in the base unit, a string with its unit, or, when measured, a table {value, source, low, high, date}.
The other direction of a cable may have its own back_bandwidth_bps and back_latency_s. burst_bytes = "16 KiB" on a cable whose
rate is kept by a token bucket (labs, many clouds): so much passes at once after a silence.
"""

import re
from importlib import resources
from pathlib import Path
from typing import Any

import tomli_w

from thinwire.cluster.describe import described
from thinwire.cluster.model import Cluster, Host, Quantity
from thinwire.cluster.spec import ClusterSpec, expand
from thinwire.errors import UserError
from thinwire.tomlfile import read_toml, validate


def load_cluster(source: str | Path) -> Cluster:
    """Read a cluster file: a path, the name of a shipped one ("four-hosts-100mbit"), or a line (`describe`). UserError in one
    line."""
    path = Path(source)
    if "@" in str(source) and not path.is_file():
        return described(str(source))
    if not path.suffix and not path.is_file():
        shipped = shipped_clusters()
        if str(source) not in shipped:
            raise UserError(f"there is no cluster {str(source)!r}; give a .toml file or one of: {', '.join(shipped)}")
        path = shipped[str(source)]
    spec = validate(ClusterSpec, read_toml(path), str(path))
    try:
        return expand(spec)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def shipped_clusters() -> dict[str, Path]:
    """The cluster files that come with thinwire, by name: from the installed package, else from the checkout."""
    installed = Path(str(resources.files("thinwire"))) / "clusters"
    folder = installed if installed.is_dir() else Path(__file__).parents[3] / "clusters"
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def dump_cluster(cluster: Cluster, path: Path) -> None:
    """Write `cluster` without shorthands; load_cluster gives back an equal Cluster."""
    content = {
        "name": cluster.name,
        "ranks": list(cluster.ranks),
        "host": [_table(host, ("name", "rack", "address")) | {"device": _devices(host)} for host in cluster.hosts],
        "switch": [_table(switch, ("name", "kind")) for switch in cluster.switches],
        "link": [
            _table(link, ("source", "target", "bandwidth_bps", "latency_s") + ("burst_bytes",) * bool(link.burst_bytes.value))
            | {"one_way": True}
            for link in cluster.links
        ],
    }
    path.write_text(tomli_w.dumps(content), encoding="utf-8")


def _devices(host: Host) -> dict[str, Any] | list[dict[str, Any]]:
    """One table with a count where the devices are equal and numbered from 0, else a table each."""
    names = [device.name.removeprefix(f"{host.name}/") for device in host.devices]
    tables = [_table(device, ("kind", "flops_per_s", "memory_bytes", "memory_bytes_per_s")) for device in host.devices]
    stem = re.sub(r"0$", "", names[0])
    if all(table == tables[0] for table in tables) and names == [f"{stem}{j}" for j in range(len(names))]:
        return tables[0] | {"name": stem + "{j}", "count": len(names)}
    named = [{"name": name} | table for name, table in zip(names, tables, strict=True)]
    return named[0] if len(named) == 1 else named


def _table(thing: object, fields: tuple[str, ...]) -> dict[str, Any]:
    """These fields, without those that are None; a quantity that is only declared is its number."""
    values = {name: getattr(thing, name) for name in fields}
    for name, value in values.items():
        if isinstance(value, Quantity):
            is_plain = value == Quantity(value.value)
            values[name] = value.value if is_plain else _table(value, ("value", "source", "low", "high", "date"))
    return {name: value for name, value in values.items() if value is not None}
