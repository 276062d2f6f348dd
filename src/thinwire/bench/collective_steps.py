"""Training steps on stock gloo and on chosen collectives: DDP on two racks and on a slow host, FSDP2 on equal hosts, in turns.

The same PyTorch lines on both sides, only the backend of the group differs; compute is paced as the cluster declares. What to
expect, with C the seconds of compute and W those of the collectives of a step (`bench collectives`):

    DDP      about max(C, W), and the last bucket    its all-reduces overlap with the backward pass
    FSDP2    C + W                                   on CPUs its collectives are over when they return
"""

import json
import sys
from collections.abc import Mapping
from statistics import median
from typing import Any

from thinwire.bench.registry import Rows, take
from thinwire.cluster import Cluster, load_cluster
from thinwire.config.model import ModelConfig
from thinwire.errors import UserError
from thinwire.lab.commands import processes_for
from thinwire.lab.run import RESULTS, launch

DEFAULTS: Mapping[str, Any] = {"turns": 5, "steps": 1, "layers": 4, "width": 160, "context": 64, "micro_batch": 2}
CASES = (("ddp", "two-racks", 2.8), ("ddp", "one-slow-host", 1.4), ("fsdp", "eight-hosts-100mbit", 1.2))
"""Framework, cluster, bar."""
SCRIPT = "thinwire.bench.peers.step_turns"


def run(cluster_name: str | None = None, options: Mapping[str, Any] | None = None) -> Rows:
    """A row a case: seconds of a step (medians of turns), their ratio. With a cluster: both frameworks on it, without bars."""
    told = take(options or {}, DEFAULTS)
    cases = [(framework, cluster_name, None) for framework in ("ddp", "fsdp")] if cluster_name else CASES
    return [_row(framework, load_cluster(name), bar, told) for framework, name, bar in cases]


def _row(framework: str, cluster: Cluster, bar: float | None, told: Mapping[str, Any]) -> dict[str, Any]:
    rates = cluster.declared_rates
    if rates is None:
        raise UserError(f"{cluster.name} does not declare flops_per_s for all devices; compute is paced by it")
    shape = {key: told[key] for key in ("layers", "width", "context")}
    config = ModelConfig.model_validate({**shape, "heads": 4, "norm": "layer", "mlp": "gelu"})
    settings = {key: told[key] for key in ("turns", "steps", "micro_batch")}
    settings |= {"framework": framework, "model": config.model_dump(), "flops_per_s": min(rates)}
    lab = launch(cluster, processes_for(cluster, [sys.executable, "-m", SCRIPT, RESULTS, json.dumps(settings)]))
    if lab.failure:
        raise UserError(f"{framework} on {cluster.name}: {lab.failure}")
    found = json.loads(lab.results["steps.json"])
    native, ours = found["seconds"]["native"], found["seconds"]["ours"]
    ratios = sorted(theirs / mine for theirs, mine in zip(native, ours, strict=True))
    return {
        "case": f"{framework} on {cluster.name}",
        "ranks": cluster.world_size,
        "native_s": median(native),
        "ours_s": median(ours),
        "ratio": median(ratios),
        "ratio_low": ratios[0],
        "ratio_high": ratios[-1],
        "weights_apart": found["apart"],
        "native_late": found["late"]["native"],
        "ours_late": found["late"]["ours"],
        "chosen": ", ".join(f"{what}: {way}" for what, way in found["chosen"].items()),
        "bar": bar,
        "held": bar is None or median(ratios) >= bar,
    }
