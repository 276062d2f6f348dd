"""`thinwire bench lab`: is a link of the lab as slow as declared?

A message after one second of silence, over plain TCP sockets between two hosts on one switch, against the bound
bytes * 8 * FRAME_OVERHEAD / rate. The bucket of a shaped link lets the first bytes of a message through unshaped, so it may be
early, by at most 12 % at 256 KiB and 3 % at 4 MiB.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from thinwire.bench.registry import Rows
from thinwire.cluster import FRAME_OVERHEAD, load_cluster
from thinwire.cluster.equal import equal_hosts
from thinwire.errors import UserError
from thinwire.lab.run import RESULTS, LabResult
from thinwire.lab.run import run as run_lab

RATES_BPS = (1e6, 10e6, 100e6)
DEFAULTS = {"rates_bps": [], "sizes_bytes": (256 * 1024, 4 * 1024 * 1024)}
SCRIPT = Path(__file__).parent / "peers" / "socket_transfer.py"


def run(cluster_name: str | None, options: Mapping[str, Any]) -> Rows:
    """Rows: case, bytes, link_bps, measured_s, bound_s, faster_by (a fraction; negative means slower than the bound).

    Without rates at the line rates of the cluster's links, else at 1, 10 and 100 Mbit/s. At 1 Mbit/s, 4 MiB take 35 s.
    """
    links = load_cluster(cluster_name).links if cluster_name else ()
    rates = options["rates_bps"] or sorted({link.bandwidth_bps.value for link in links}) or RATES_BPS
    return [row for rate in rates for row in measure(rate, options["sizes_bytes"])]


def measure(link_bps: float, sizes_bytes: Sequence[int]) -> Rows:
    """One lab of two hosts at `link_bps`: a row for each size."""
    result = transfer(link_bps, sizes_bytes)
    rows = []
    for size, seconds in zip(sizes_bytes, json.loads(result.results["socket_transfer.json"])["seconds"], strict=True):
        bound_s = size * 8 * FRAME_OVERHEAD / link_bps
        row = {"case": "message after 1 s of silence", "bytes": size, "link_bps": link_bps, "measured_s": seconds}
        rows.append({**row, "bound_s": bound_s, "faster_by": 1 - seconds / bound_s})
    return rows


def transfer(link_bps: float, sizes_bytes: Sequence[int]) -> LabResult:
    """Send one message of each size from host0 to host1; UserError if the transfer failed."""
    script = [sys.executable, "-S", str(SCRIPT)]
    send = [*script, "send", "host1", f"{RESULTS}/socket_transfer.json", *map(str, sizes_bytes)]
    result = run_lab(equal_hosts(2, link_bps), {"host0": send, "host1": [*script, "receive"]})
    if result.failure:
        raise UserError(result.failure)
    return result
