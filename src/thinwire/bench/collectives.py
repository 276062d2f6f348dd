"""Collectives of stock gloo and ours, in turns on the ranks of a lab, beside the lower bound and what was predicted.

Stock is `torch.distributed` over gloo as it is; ours is the same calls over the backend `thinwire`, which has chosen by price and
measurement what it runs (`algorithm`; "native" where nothing was faster). A turn gives the seconds of the slowest rank; of some
turns the least counts. `bound_s` is what no algorithm can beat on these links at payload rate (line rate / 1.0466, for frame
headers). Short calls have two rows: each after a barrier, as in training, and back to back. Nothing is paced.

`error`: |predicted - measured| / measured of ours; the last row has the median and the worst over all rows.
"""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from thinwire.bench.collective_cases import NETWORKS, OTHER, Case
from thinwire.bench.registry import Rows, take
from thinwire.cluster import Cluster, load_cluster
from thinwire.collectives.synthesis.bounds import bound
from thinwire.errors import UserError
from thinwire.lab.commands import processes_for
from thinwire.lab.run import RESULTS, LabOptions, launch

DEFAULTS: Mapping[str, Any] = {"turns": 3, "repeats": 20, "short_s": 0.05, "tried": 3, "delay": True}
MEDIAN_BAR, WORST_BAR = 0.10, 0.20
SCRIPT = "thinwire.bench.peers.collective_turns"


def run(cluster_name: str | None = None, options: Mapping[str, Any] | None = None) -> Rows:
    """A row a call, then one about the predictions. Without a cluster: all networks of `collective_cases`."""
    told = take(options or {}, DEFAULTS)
    rows: Rows = []
    if cluster_name is None:
        for network in NETWORKS.values():
            rows += measure(network.make(), network.cases, told)
    elif cluster_name in NETWORKS:
        rows += measure(NETWORKS[cluster_name].make(), NETWORKS[cluster_name].cases, told)
    else:
        cluster = load_cluster(cluster_name)
        rows += measure(cluster, NETWORKS[cluster.name].cases if cluster.name in NETWORKS else OTHER, told)
    return [*rows, _predictions(rows)]


def measure(cluster: Cluster, cases: Sequence[Case], told: Mapping[str, Any]) -> Rows:
    """One lab."""
    settings = {key: told[key] for key in ("turns", "repeats", "short_s", "tried")}
    settings["cases"] = [[case.op, case.message_bytes, case.ordered is not None] for case in cases]
    settings["costs"] = {"cores_shared": cluster.world_size / (os.cpu_count() or 1)}
    command = [sys.executable, "-m", SCRIPT, RESULTS, json.dumps(settings)]
    lab = launch(cluster, processes_for(cluster, command), LabOptions(paced=False, delay=told["delay"]))
    if lab.failure:
        raise UserError(f"{cluster.name}: {lab.failure}")
    found = json.loads(lab.results["collectives.json"])
    return [row for case, one in zip(cases, found, strict=True) for row in _rows(cluster, case, one)]


def _rows(cluster: Cluster, case: Case, found: Mapping[str, Any]) -> Rows:
    bound_s = bound(cluster, case.op, case.message_bytes).seconds
    if not found["back_to_back"]:
        return [_row(cluster, case, found, bound_s, "", case.bar)]
    again = {**found, "turns": found["back_to_back"], "predicted": found["predicted_back_to_back"]}
    return [
        _row(cluster, case, found, bound_s, ", after a barrier", case.bar),
        _row(cluster, case, again, bound_s, ", back to back", case.back_to_back or case.bar),
    ]


def _row(
    cluster: Cluster,
    case: Case,
    found: Mapping[str, Any],
    bound_s: float,
    how: str,
    bar: float,
) -> dict[str, Any]:
    turns = found["turns"]
    native_s, ours_s = min(turns["native"]), min(turns["ours"])
    predicted_s = found["predicted"]["ours"]
    ordered_s = min(turns["ordered"]) if case.ordered is not None else None
    held = native_s >= bar * ours_s
    held &= case.of_bound is None or ours_s <= case.of_bound * bound_s
    held &= ordered_s is None or ordered_s >= (case.ordered or 0.0) * ours_s
    return {
        "case": f"{cluster.name}{how}",
        "op": case.op,
        "bytes": case.message_bytes,
        "hosts": len(cluster.hosts),
        "algorithm": found["algorithm"],
        "native_s": native_s,
        "ours_s": ours_s,
        "bound_s": bound_s,
        "predicted_s": predicted_s,
        "native_predicted_s": found["predicted"]["native"],
        "ordered_s": ordered_s,
        "ratio": native_s / ours_s,
        "of_bound": ours_s / bound_s,
        "error": abs(predicted_s - ours_s) / ours_s,
        "bar": bar if case.ordered is None else case.ordered,
        "held": held,
    }


def _predictions(rows: Rows) -> dict[str, Any]:
    errors = [row["error"] for row in rows]
    held = median(errors) <= MEDIAN_BAR and max(errors) <= WORST_BAR
    return {"case": "predictions", "error": median(errors), "worst_error": max(errors), "bar": MEDIAN_BAR, "held": held}
