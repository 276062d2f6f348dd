"""`thinwire bench lab`: is a link of the lab as slow as it says?

A message after one second of silence, over plain TCP sockets between two hosts on one switch, against the bound
bytes * 8 * FRAME_OVERHEAD / rate. The bucket of a shaped link lets the first bytes of a message ride free, so it may be
early, by at most 12 % at 256 KiB and 3 % at 4 MiB.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from thinwire.bench.registry import take
from thinwire.cluster import FRAME_OVERHEAD, load_cluster
from thinwire.cluster.equal import equal_hosts
from thinwire.errors import UserError
from thinwire.lab.run import RESULTS, LabResult
from thinwire.lab.run import run as run_lab

RATES_BPS = (1e6, 10e6, 100e6)
SIZES_BYTES = (256 * 1024, 4 * 1024 * 1024)
DEFAULTS = {"rates_bps": [], "sizes_bytes": SIZES_BYTES}
SCRIPT = Path(__file__).parent / "peers" / "socket_transfer.py"


def run(cluster_name: str | None = None, options: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
    """Rows: case, bytes, link_bps, measured_s, bound_s, faster_by (a fraction; negative means slower than the bound).

    Without a cluster at 1, 10 and 100 Mbit/s, else at the line rates of that cluster's links. `options` may give
    `rates_bps` and `sizes_bytes`. At 1 Mbit/s, 4 MiB take 35 s.
    """
    told = take(options or {}, DEFAULTS)
    rates: Sequence[float] = told["rates_bps"] or (_rates(cluster_name) if cluster_name else RATES_BPS)
    return [row for rate in rates for row in measure(rate, told["sizes_bytes"])]


def measure(link_bps: float, sizes_bytes: Sequence[int]) -> list[dict[str, Any]]:
    """One lab of two hosts at `link_bps`: a row for each size."""
    result = transfer(link_bps, sizes_bytes)
    rows = []
    for size, seconds in zip(sizes_bytes, json.loads(result.results["socket_transfer.json"])["seconds"], strict=True):
        bound = size * 8 * FRAME_OVERHEAD / link_bps
        rows.append(
            {
                "case": "message after 1 s of silence",
                "bytes": size,
                "link_bps": link_bps,
                "measured_s": seconds,
                "bound_s": bound,
                "faster_by": 1 - seconds / bound,
            }
        )
    return rows


def transfer(link_bps: float, sizes_bytes: Sequence[int]) -> LabResult:
    """Send one message of each size from host0 to host1; UserError if the transfer failed."""
    script = [sys.executable, "-S", str(SCRIPT)]
    send = [*script, "send", "host1", f"{RESULTS}/socket_transfer.json", *(str(size) for size in sizes_bytes)]
    result = run_lab(equal_hosts(2, link_bps), {"host0": send, "host1": [*script, "receive"]})
    if result.failure:
        raise UserError(result.failure)
    return result


def _rates(cluster_name: str) -> tuple[float, ...]:
    return tuple(sorted({link.bandwidth_bps.value for link in load_cluster(cluster_name).links}))
