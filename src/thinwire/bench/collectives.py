"""Collectives of stock gloo and ours, in turns on the ranks of a lab, beside the lower bound and what was predicted.

Stock is `torch.distributed` over gloo as it is; ours is the same calls over the backend `thinwire`, which has chosen by price and
measurement what it runs (`algorithm`; "native" where nothing was faster). A turn gives the seconds of the slowest rank; of all
`turns`, fewer where calls are long (`turns_worth`), the least counts. `bound_s` is what no algorithm can beat on these links at
payload rate (line rate / 1.0466, for frame headers). Short calls have two rows: each after a barrier, as in training, and back to
back. Nothing is paced.

`error`: |predicted - measured| / measured of ours; the last row has the median and the worst over all rows.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from thinwire.bench.ranks import run_script
from thinwire.bench.registry import Rows
from thinwire.cluster import Cluster, Link, Quantity, load_cluster
from thinwire.collectives.synthesis.bounds import bound
from thinwire.lab.run import LabOptions

DEFAULTS: Mapping[str, Any] = {"turns": 3, "repeats": 20, "short_s": 0.05, "tried": 3, "delay": True}
MEDIAN_BAR, WORST_BAR = 0.10, 0.20
TURNS_S = 20.0
"""What the turns of a call may take together: by then the links set its time, not chance."""
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Case:
    """A call and its bars: native_s / ours_s is at least `bar`, ours_s / bound_s at most `of_bound`.

    ordered: the least ordered_s / ours_s, against the native collective on the best order of ranks.
    back_to_back: the bar of short calls one after the other (`bar` is that after a barrier).
    """

    op: str
    message_bytes: int
    bar: float
    of_bound: float | None = None
    ordered: float | None = None
    back_to_back: float | None = None


NETWORKS: Mapping[str, tuple[Case, ...]] = {
    "eight-hosts-100mbit": (
        Case("all_reduce", 4 * MIB, 0.97, of_bound=1 / 0.93),
        Case("reduce_scatter", 4 * MIB, 1.85),
        Case("broadcast", 4 * MIB, 3.3),
        Case("reduce", 4 * MIB, 1.4),
        Case("all_to_all", 4 * MIB, 1.25),
        *(Case("all_reduce", size, 2.5, back_to_back=0.97) for size in (4, 256, 4096, 32768)),
    ),
    "two-racks": (Case("all_reduce", 4 * MIB, 3.5),),
    "two-racks-half": (Case("all_reduce", 4 * MIB, 1.0, ordered=1.5),),
    "one-slow-host": (Case("all_reduce", 4 * MIB, 1.55, of_bound=1.15),),
    "one-half-host": (Case("all_reduce", 4 * MIB, 1.55),),
}
OTHER = tuple(
    Case(op, 4 * MIB, 0.97) for op in ("all_reduce", "reduce_scatter", "all_gather", "broadcast", "reduce", "all_to_all")
)
"""Calls on a network that has no bars of its own."""


def turns_worth(turn_s: Sequence[float], wanted: int) -> int:
    """How many turns to take with contenders of which one turn takes `turn_s` each: as many as TURNS_S has room for, 1 at least.

    All take as many: of more turns the least would be less.
    """
    return max(1, min(wanted, int(TURNS_S / sum(turn_s))))


def network(name: str) -> Cluster:
    """A shipped cluster; "two-racks-half": its uplinks at half of their rate; "one-half-host": the slow host at half of the
    others' rate instead of a quarter."""
    match name:
        case "two-racks-half":
            return scaled(load_cluster("two-racks"), "switch", 0.5, name)
        case "one-half-host":
            return scaled(load_cluster("one-slow-host"), "slow", 2.0, name)
    return load_cluster(name)


def scaled(cluster: Cluster, node: str, factor: float, name: str = "") -> Cluster:
    """`cluster` with the links of `node` at `factor` of their rate."""

    def rate_bps(link: Link) -> float:
        return link.bandwidth_bps.value * (factor if node in (link.source, link.target) else 1.0)

    return replace(with_rates(cluster, rate_bps), name=name or cluster.name)


def with_rates(cluster: Cluster, rate_bps: Callable[[Link], float]) -> Cluster:
    """`cluster` with each link at the rate that `rate_bps` gives it."""
    links = (replace(link, bandwidth_bps=Quantity(rate_bps(link))) for link in cluster.links)
    return replace(cluster, links=tuple(links))


def run(cluster_name: str | None, options: Mapping[str, Any]) -> Rows:
    """A row a call, then one about the predictions. Without a cluster: all of `NETWORKS`."""
    rows: Rows = []
    for name in [cluster_name] if cluster_name else NETWORKS:
        cluster = network(name)
        rows += measure(cluster, NETWORKS.get(cluster.name, OTHER), options)
    return [*rows, _predictions(rows)]


def measure(cluster: Cluster, cases: Sequence[Case], options: Mapping[str, Any]) -> Rows:
    """One lab."""
    settings = {key: options[key] for key in ("turns", "repeats", "short_s", "tried")}
    settings["cases"] = [[case.op, case.message_bytes, case.ordered is not None] for case in cases]
    settings["costs"] = {"cores_shared": cluster.world_size / (os.cpu_count() or 1)}
    lab = run_script(cluster, "collective_turns", settings, LabOptions(paced=False, delay=options["delay"]), title=cluster.name)
    return [row for case, one in zip(cases, lab.results["collective_turns"], strict=True) for row in _rows(cluster, case, one)]


def _rows(cluster: Cluster, case: Case, found: Mapping[str, Any]) -> Rows:
    if not found["back_to_back"]:
        return [_row(cluster, case, found)]
    again = {**found, "turns": found["back_to_back"], "predicted": found["predicted_back_to_back"]}
    rows = [_row(cluster, case, found), _row(cluster, replace(case, bar=case.back_to_back or case.bar), again)]
    return [{**row, "case": row["case"] + how} for row, how in zip(rows, (", after a barrier", ", back to back"), strict=True)]


def _row(cluster: Cluster, case: Case, found: Mapping[str, Any]) -> dict[str, Any]:
    turns = found["turns"]
    native_s, ours_s = min(turns["native"]), min(turns["ours"])
    bound_s = bound(cluster, case.op, case.message_bytes).seconds
    predicted_s = found["predicted"]["ours"]
    ordered_s = min(turns["ordered"]) if case.ordered is not None else None
    held = native_s >= case.bar * ours_s
    held &= case.of_bound is None or ours_s <= case.of_bound * bound_s
    held &= ordered_s is None or ordered_s >= (case.ordered or 0.0) * ours_s
    return {
        "case": cluster.name,
        "op": case.op,
        "bytes": case.message_bytes,
        "hosts": len(cluster.hosts),
        "algorithm": found["algorithm"],
        "turns": len(turns["native"]),
        "native_s": native_s,
        "ours_s": ours_s,
        "bound_s": bound_s,
        "predicted_s": predicted_s,
        "native_predicted_s": found["predicted"]["native"],
        "ordered_s": ordered_s,
        "ratio": native_s / ours_s,
        "of_bound": ours_s / bound_s,
        "error": abs(predicted_s - ours_s) / ours_s,
        "bar": case.bar if case.ordered is None else case.ordered,
        "held": held,
    }


def _predictions(rows: Rows) -> dict[str, Any]:
    errors = [row["error"] for row in rows]
    held = median(errors) <= MEDIAN_BAR and max(errors) <= WORST_BAR
    return {"case": "predictions", "error": median(errors), "worst_error": max(errors), "bar": MEDIAN_BAR, "held": held}
