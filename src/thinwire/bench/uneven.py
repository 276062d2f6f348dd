"""One worker of several is slow: how long is a step if micro-batches are shared out by speed?

Compute is paced: a micro-batch takes `pass_s` on every rank, and `slow` times that on the last one. In one run, one after
another, with the trainer as it is; medians over the later half of the reports, when the shares have settled:

    equal workers          all at full speed                                             equal_s
    one slow               equal shares                                                  stock_s
    one slow               shares by speed, equal at first                               ours_s
    slow during the run    full speed for a third of the steps, then shared out anew     ours_s

ratio = ours_s / equal_s, and the bar is 1.20. Whole micro-batches leave a limit, ratio_limit: with 4 ranks and half the speed it
is 8/7 = 1.143 for 28 micro-batches (accumulate 7, as here), 1.25 for 16, 1.2 for 20. The exchange, the same for all, is in all of
them. late: the most by which a case's passes took longer than they should have, on rank 0, as a fraction.

With a cluster also what fewer micro-batches do for a slow link: the last host's card at `slow_link` of its rate, all workers at
full speed, with equal shares (stock_s) and with what a worker of half the speed would get (ours_s). There is no bar: it is not
done, because an all-reduce cannot begin before the others are ready.
"""

from collections.abc import Mapping
from statistics import median
from typing import Any

from thinwire.bench.collectives import scaled
from thinwire.bench.ranks import run_script
from thinwire.bench.registry import Rows
from thinwire.cluster import Cluster, load_cluster
from thinwire.errors import UserError
from thinwire.train.deal import deal, slowest_s

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
TIMEOUT_S, RUN_TIMEOUT_S = 300.0, 3600.0
EQUAL, STOCK, OURS, LATER, FEWER = "equal workers", "one slow, equal shares", "one slow", "slow during the run", "fewer"
PLAIN: Mapping[str, Any] = {"slow": 1.0, "slow_from": 0, "deal": [], "by_speed": False}
"""A case; see `peers/uneven_workers.py`."""


def run(cluster_name: str | None, options: Mapping[str, Any]) -> Rows:
    """Rows: case, deal (at the end), equal_s, stock_s, ours_s, ratio, ratio_limit, bar, held; in a lab the slow link's too."""
    cluster = load_cluster(cluster_name) if cluster_name else None
    ranks, steps = cluster.world_size if cluster else options["ranks"], options["steps"]
    if ranks < 2 or options["accumulate"] < 2 or steps < 6 * options["log_every"]:
        raise UserError(f"{ranks} ranks, accumulate {options['accumulate']}, {steps} steps: take 2, 2 and 6 log_every or more")
    slow = {**PLAIN, "slow": options["slow"]}
    cases = [
        {**PLAIN, "name": EQUAL},
        {**slow, "name": STOCK},
        {**slow, "name": OURS, "by_speed": True},
        {**slow, "name": LATER, "by_speed": True, "slow_from": steps // 3},
    ]
    found = _measure(cluster or ranks, options, cases)
    seconds = [1.0] * (ranks - 1) + [options["slow"]]
    limit = slowest_s(deal(ranks * options["accumulate"], seconds), seconds) / options["accumulate"]
    rows: Rows = []
    for name in (OURS, LATER):
        ratio = found[name]["median_s"] / found[EQUAL]["median_s"]
        row = {
            "case": f"{name}, {options['slow']:g} times as long",
            "deal": " ".join(map(str, found[name]["deal"])),
            "equal_s": found[EQUAL]["median_s"],
            "stock_s": found[STOCK]["median_s"],
            "ours_s": found[name]["median_s"],
            "ratio": ratio,
            "ratio_limit": limit,
            "late": max(case["late"] for case in found.values()),
        }
        rows.append(row | {"bar": BAR, "held": ratio <= BAR})
    return rows + ([_link_row(cluster, options)] if cluster else [])


def _link_row(cluster: Cluster, options: Mapping[str, Any]) -> dict[str, Any]:
    """All workers at full speed, one behind a slow card: equal shares, and fewer micro-batches for that one."""
    ranks, host = cluster.world_size, cluster.host_of(cluster.world_size - 1).name
    slowed = scaled(cluster, host, options["slow_link"])
    fewer = deal(ranks * options["accumulate"], [1.0] * (ranks - 1) + [2.0])
    found = _measure(slowed, options, [{**PLAIN, "name": EQUAL}, {**PLAIN, "name": FEWER, "deal": fewer}])
    stock_s, ours_s = found[EQUAL]["median_s"], found[FEWER]["median_s"]
    row = {
        "case": f"a card at {options['slow_link']:g} of its rate, fewer micro-batches for its host",
        "deal": " ".join(map(str, fewer)),
    }
    return row | {"stock_s": stock_s, "ours_s": ours_s, "ratio": ours_s / stock_s}


def _measure(where: Cluster | int, options: Mapping[str, Any], cases: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """{case: {"median_s", "deal", ...}}, in the lab if there is a cluster, else over loopback."""
    train = {key: options[key] for key in ("steps", "log_every", "sequence", "micro_batch")}
    config = {
        "model": {"preset": options["preset"], **options["model"]},
        "sync": {"accumulate": options["accumulate"], "bucket_bytes": options["bucket_bytes"]},
        "train": train | {"dtype": "float32", "eval_every": 0, "eval_tokens": 1024},
    }
    settings = {"run": config, "cases": cases, "pass_s": options["pass_s"], "timeout_s": TIMEOUT_S}
    title = "loopback" if isinstance(where, int) else where.name
    done = run_script(where, "uneven_workers", settings, title=title, timeout_s=RUN_TIMEOUT_S)
    found: dict[str, dict[str, Any]] = done.results["uneven_workers"]
    for case in found.values():
        case["median_s"] = median(case["step_s"][len(case["step_s"]) // 2 :])
    return found
