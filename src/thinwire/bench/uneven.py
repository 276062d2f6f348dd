"""One worker of several is slow: how long is a step if micro-batches are assigned by speed?

Compute is paced: a micro-batch takes `pass_s` on every rank, and `slow` times that on the last one. In one run, one after
another, with the trainer as it is; medians over the later half of the reports, when the assignment has settled:

    equal workers          all at full speed                                         equal_s
    one slow               equal numbers                                             stock_s
    one slow               assigned by speed, beginning with equal numbers           ours_s
    slow during the run    full speed for a third of the steps, then by speed        ours_s

ratio = ours_s / equal_s, and the bar is 1.20. Whole micro-batches leave a limit, ratio_limit: with 4 ranks and half the speed it
is 8/7 = 1.143 for 28 micro-batches (accumulate 7, as here), 1.25 for 16, 1.2 for 20. The exchange, the same for all, is in all of
them. late: the most by which a case's passes took longer than they should have, on rank 0, as a fraction.

With a cluster also what fewer micro-batches do for a slow link: the last host's card at `slow_link` of its rate and all
workers at full speed, with equal numbers (stock_s) and with what a worker of half the speed would get (ours_s). There is no bar:
it is not done, because an all-reduce cannot begin before the others are ready.
"""

import json
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from thinwire.bench.local import run_local
from thinwire.bench.progress import shown
from thinwire.bench.registry import Rows, take
from thinwire.cluster import Cluster, Quantity, load_cluster
from thinwire.errors import UserError
from thinwire.lab.commands import processes_for
from thinwire.lab.run import RESULTS, LabOptions, launch
from thinwire.train.assign import assign, slowest_s

DEFAULTS: Mapping[str, Any] = {
    "ranks": 4,
    "accumulate": 7,
    "slow": 2.0,
    "slow_link": 0.25,
    "pass_s": 0.1,
    "steps": 18,
    "log_every": 3,
    "preset": "1m",
    "model": {"layers": 2},
    "sequence": 32,
    "micro_batch": 1,
    "bucket_bytes": 2**20,
}
BAR = 1.20
TIMEOUT_S, PATIENCE_S = 300.0, 3600.0
SCRIPT = "thinwire.bench.peers.uneven_workers"
EQUAL, STOCK, OURS, LATER, FEWER = "equal workers", "one slow, equal numbers", "one slow", "slow during the run", "fewer"


def run(cluster_name: str | None = None, options: Mapping[str, Any] | None = None) -> Rows:
    """Rows: case, assignment (the last), equal_s, stock_s, ours_s, ratio, ratio_limit, bar, held; in a lab a slow link's too."""
    told = take(options or {}, DEFAULTS)
    cluster = load_cluster(cluster_name) if cluster_name else None
    ranks = cluster.world_size if cluster else told["ranks"]
    if ranks < 2 or told["accumulate"] < 2 or told["steps"] < 6 * told["log_every"]:
        raise UserError(
            f"{ranks} ranks, accumulate {told['accumulate']}, {told['steps']} steps: take 2, 2 and 6 log_every or more"
        )
    found = _measure(cluster, ranks, told, _cases(told))
    equal_s, stock_s = found[EQUAL]["median_s"], found[STOCK]["median_s"]
    seconds = [1.0] * (ranks - 1) + [told["slow"]]
    limit = slowest_s(assign(ranks * told["accumulate"], seconds), seconds) / told["accumulate"]
    rows: Rows = []
    for name in (OURS, LATER):
        ours_s = found[name]["median_s"]
        rows.append(
            {
                "case": f"{name}, {told['slow']:g} times as long",
                "assignment": " ".join(map(str, found[name]["assignment"])),
                "equal_s": equal_s,
                "stock_s": stock_s,
                "ours_s": ours_s,
                "ratio": ours_s / equal_s,
                "ratio_limit": limit,
                "late": max(case["late"] for case in found.values()),
                "bar": BAR,
                "held": ours_s / equal_s <= BAR,
            }
        )
    return rows + ([_link_row(cluster, told)] if cluster else [])


def _cases(told: Mapping[str, Any]) -> list[dict[str, Any]]:
    plain = {"slow": 1.0, "slow_from": 0, "assignment": [], "by_speed": False}
    slow = plain | {"slow": told["slow"]}
    return [
        plain | {"name": EQUAL},
        slow | {"name": STOCK},
        slow | {"name": OURS, "by_speed": True},
        slow | {"name": LATER, "by_speed": True, "slow_from": told["steps"] // 3},
    ]


def _link_row(cluster: Cluster, told: Mapping[str, Any]) -> dict[str, Any]:
    """All workers at full speed, one behind a slow card: equal numbers, and fewer for that one."""
    ranks, host = cluster.world_size, cluster.host_of(cluster.world_size - 1).name
    fewer = assign(ranks * told["accumulate"], [1.0] * (ranks - 1) + [2.0])
    plain: dict[str, Any] = {"slow": 1.0, "slow_from": 0, "by_speed": False}
    cases = [plain | {"name": EQUAL, "assignment": []}, plain | {"name": FEWER, "assignment": fewer}]
    found = _measure(_with_slow_card(cluster, host, told["slow_link"]), ranks, told, cases)
    stock_s, ours_s = found[EQUAL]["median_s"], found[FEWER]["median_s"]
    return {
        "case": f"a card at {told['slow_link']:g} of its rate, its host with fewer micro-batches",
        "assignment": " ".join(map(str, fewer)),
        "stock_s": stock_s,
        "ours_s": ours_s,
        "ratio": ours_s / stock_s,
    }


def _with_slow_card(cluster: Cluster, host: str, factor: float) -> Cluster:
    links = [
        replace(link, bandwidth_bps=Quantity(link.bandwidth_bps.value * factor)) if host in (link.source, link.target) else link
        for link in cluster.links
    ]
    return Cluster(name=cluster.name, hosts=cluster.hosts, switches=cluster.switches, links=tuple(links), ranks=cluster.ranks)


def _run_config(told: Mapping[str, Any]) -> dict[str, Any]:
    """run.toml of all cases."""
    train = {key: told[key] for key in ("steps", "log_every", "sequence", "micro_batch")} | {"dtype": "float32"}
    return {
        "model": {"preset": told["preset"], **told["model"]},
        "sync": {"accumulate": told["accumulate"], "bucket_bytes": told["bucket_bytes"]},
        "train": train | {"eval_every": 0, "eval_tokens": 1024},
    }


def _measure(
    cluster: Cluster | None, ranks: int, told: Mapping[str, Any], cases: list[dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """{case: {"median_s", "assignment", ...}}, in the lab if there is a cluster, else over loopback."""
    settings = {"run": _run_config(told), "cases": cases, "pass_s": told["pass_s"], "timeout_s": TIMEOUT_S}
    with tempfile.TemporaryDirectory(prefix="thinwire-") as folder:
        progress = Path(folder) / "progress"
        with shown(progress, cluster.name if cluster else "loopback"):
            text = json.dumps(settings | {"progress": str(progress)})
            if cluster is None:
                run_local([[sys.executable, "-m", SCRIPT, folder, text]], ranks, PATIENCE_S)
                written = (Path(folder) / "uneven.json").read_text()
            else:
                lab = launch(cluster, processes_for(cluster, [sys.executable, "-m", SCRIPT, RESULTS, text]), LabOptions())
                if lab.failure:
                    raise UserError(lab.failure)
                written = lab.results["uneven.json"]
    found: dict[str, dict[str, Any]] = json.loads(written)
    for case in found.values():
        case["median_s"] = median(case["step_s"][len(case["step_s"]) // 2 :])
    return found
