"""`thinwire why` on six scripts that know nothing of it, each with a planted cause: is it named, and does the first remedy hold?

Each script runs in the lab under `thinwire why`, then once more without it and with the first remedy applied. `predicted_s` is
the step that was predicted for that, `measured_s` the median of the script's own steps; `overhead` compares its steps while it
was metered with those after. Scripts of frameworks that are not installed are left out, and named. Nothing is paced by us: the
scripts compute by sleeping.
"""

import importlib.util
import json
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

from thinwire.bench.ranks import run_commands
from thinwire.bench.registry import Rows
from thinwire.cluster import Cluster
from thinwire.cluster.equal import equal_hosts
from thinwire.cluster.spec import ClusterSpec, expand
from thinwire.lab.run import RESULTS, LabOptions

DEFAULTS = {"cases": [], "steps": 16, "warm_up": 5}
NEEDED = {"trainer": ("transformers", "accelerate"), "lightning": ("lightning",), "accelerate": ("accelerate",)}
SAME = {"buckets": "ddp"}
FAST, SLOW, FASTER = "100 Mbit/s", "25 Mbit/s", 1e9
LEFT_OUT = 3
AFTER = 10
"""Steps after the verdict, which are compared with those before."""

Applied = tuple[Cluster, dict[str, Any]]


@dataclass(frozen=True)
class _Case:
    """planted: as `why` calls it. apply: (cluster, settings, the remedy's line) -> both with the remedy."""

    script: str
    planted: str
    cluster: Cluster
    settings: dict[str, Any]
    apply: Callable[[Cluster, dict[str, Any], str], Applied] = field(compare=False)


def run(cluster_name: str | None, options: Mapping[str, Any]) -> Rows:
    """Rows: case, planted, named, found, step_s, remedy, predicted_s, measured_s, off, overhead, held.

    held: the planted cause is named, and the prediction off by at most 10 %. Clusters are the cases' own.
    """
    wanted = options["cases"] or [case.script for case in _cases()]
    return [_row(case, options) for case in _cases() if case.script in wanted]


def _row(case: _Case, options: Mapping[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = {"case": case.script, "planted": case.planted}
    if missing := [name for name in NEEDED.get(case.script, ()) if importlib.util.find_spec(name) is None]:
        return row | {"left out": f"{missing[0]} is not installed"}
    metered = options["warm_up"] + options["steps"]
    meter = ("-m", "thinwire", "why", "--warm-up", str(options["warm_up"]), "--steps", str(options["steps"]))
    found = _run(case.cluster, case, case.settings | {"steps": metered + AFTER}, [*meter, "--json", f"{RESULTS}/why.json"])
    verdict, seconds = found["why"], found["steps"]["seconds"]
    remedy = verdict["remedies"][0] if verdict["remedies"] else {"name": "none", "step_s": verdict["step_s"], "line": ""}
    cluster, settings = case.apply(case.cluster, case.settings, remedy["line"])
    again = _run(cluster, case, settings | {"steps": metered}, [])["steps"]["seconds"]
    measured_s = median(again[LEFT_OUT:])
    off = remedy["step_s"] / measured_s - 1
    return row | {
        "named": verdict["cause"],
        "found": verdict["cause"] == case.planted,
        "step_s": verdict["step_s"],
        "remedy": remedy["name"],
        "predicted_s": remedy["step_s"],
        "measured_s": measured_s,
        "off": off,
        "pause_s": verdict["pause_s"],
        "overhead": median(seconds[LEFT_OUT : metered - 1]) / median(seconds[metered:]) - 1,
        "held": verdict["cause"] == case.planted and abs(off) <= 0.1,
    }


def _run(cluster: Cluster, case: _Case, settings: Mapping[str, Any], prefix: list[str]) -> dict[str, Any]:
    """What the ranks left: `steps` of the script, and `why` if it was metered."""
    script = Path(__file__).parent / "peers" / f"plain_why_{SAME.get(case.script, case.script)}.py"
    text = json.dumps({**settings, "out": f"{RESULTS}/steps.json"})
    command = ["env", "OMP_NUM_THREADS=1", sys.executable, *prefix, str(script), text]  # as torchrun sets it
    return run_commands(cluster, [command], LabOptions(paced=False)).results


def _number(pattern: str, line: str) -> float:
    found = re.search(pattern, line)
    return float(found[1]) if found else 1.0


def _cases() -> list[_Case]:
    """Each with its own network, model and sleeps, so that the planted cause is the largest."""
    slow_card = _hosts(["a", "b", "c", "slow"], rates={"slow": SLOW})
    racks = _hosts(["a0", "a1", "b0", "b1"], uplink="30 Mbit/s")
    interleaved = replace(racks, ranks=tuple(f"{name}/cpu0" for name in ("a0", "b0", "a1", "b1")))
    fast, equal = equal_hosts(2, FASTER), equal_hosts(4, 1e8)
    return [
        _Case("ddp", "order of ranks", interleaved, {"forward_s": 0.006}, lambda _, settings, line: (racks, settings)),
        _Case(
            "fsdp2",
            "slow card",
            slow_card,
            {"blocks": 6, "width": 160, "forward_s": 0.004},
            lambda _, settings, line: (_hosts(["a", "b", "c", "slow"]), settings),
        ),
        _Case(
            "trainer",
            "slow host",
            equal,
            {"width": 96, "slow_rank": 2, "slow": 2.5, "forward_s": 0.01},
            lambda cluster, settings, line: (cluster, settings | {"slow": 1.0}),
        ),
        _Case(
            "lightning",
            "slow data loader",
            equal_hosts(2, 1e8),
            {"width": 96, "load_s": 0.3, "forward_s": 0.01},
            lambda cluster, settings, line: (cluster, settings | {"workers": int(_number(r"num_workers=(\d+)", line))}),
        ),
        _Case(
            "accelerate",
            "no overlap",
            equal,
            {"width": 160, "forward_s": 0.01},
            lambda cluster, settings, line: (
                cluster,
                settings | {"overlap": True, "bucket_mb": _number(r"bucket_cap_mb=([\d.]+)", line)},
            ),
        ),
        _Case(
            "buckets",
            "many small messages",
            fast,
            {"blocks": 150, "width": 24, "forward_s": 0.0001, "bucket_mb": 0.0005},
            lambda cluster, settings, line: (cluster, settings | {"bucket_mb": _number(r"bucket_cap_mb=([\d.]+)", line)}),
        ),
    ]


def _hosts(names: list[str], rates: Mapping[str, str] | None = None, uplink: str = "") -> Cluster:
    """Hosts with a device each; with `uplink` in racks by the first letter of their names."""
    rates = rates or {}
    hosts = [
        {"name": name, "device": {"kind": "cpu"}, "card": {"bandwidth_bps": rates.get(name, FAST)}}
        | ({"rack": f"rack-{name[0]}"} if uplink else {})
        for name in names
    ]
    racks = [{"name": f"rack-{letter}", "uplink": {"bandwidth_bps": uplink}} for letter in sorted({name[0] for name in names})]
    return expand(ClusterSpec.model_validate({"name": "planted", "host": hosts, "rack": racks if uplink else []}))
