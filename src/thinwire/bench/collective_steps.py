"""Training steps on stock gloo and on chosen collectives: DDP on two racks and on a slow host, FSDP2 on equal hosts, in turns.

The same PyTorch lines on both sides, only the backend of the group differs; compute is paced as the cluster declares. What to
expect, with C the seconds of compute and W those of the collectives of a step (`bench collectives`):

    DDP      about max(C, W), and the last bucket    its all-reduces overlap with the backward pass
    FSDP2    C + W                                   on CPUs its collectives are over when they return
"""

from collections.abc import Mapping
from statistics import median
from typing import Any

from thinwire.bench.ranks import run_script
from thinwire.bench.registry import Rows
from thinwire.cluster import Cluster, load_cluster
from thinwire.config.model import ModelConfig
from thinwire.errors import UserError

DEFAULTS: Mapping[str, Any] = {"turns": 5, "steps": 1, "layers": 4, "width": 160, "context": 64, "micro_batch": 2}
CASES = (("ddp", "two-racks", 2.8), ("ddp", "one-slow-host", 1.4), ("fsdp", "eight-hosts-100mbit", 1.2))
"""Framework, cluster, bar."""


def run(cluster_name: str | None, options: Mapping[str, Any]) -> Rows:
    """A row a case: seconds of a step (medians of turns), their ratio. With a cluster: both frameworks on it, without bars."""
    cases = [(framework, cluster_name, None) for framework in ("ddp", "fsdp")] if cluster_name else CASES
    rows = []
    for framework, name, bar in cases:
        row, found = measure_steps(load_cluster(name), framework, options)
        chosen = ", ".join(f"{what}: {algorithm}" for what, algorithm in found["chosen"].items())
        row |= {"case": f"{framework} on {row['case']}", "weights_apart": found["apart"], "chosen": chosen}
        rows.append(row | {"bar": bar, "held": bar is None or row["ratio"] >= bar})
    return rows


def measure_steps(
    cluster: Cluster, framework: str, options: Mapping[str, Any], codecs: Mapping[str, str] | None = None, shards: int = 0
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Steps of stock PyTorch and ours in turns in the lab: the row that all such comparisons share, and what the ranks left.

    codecs: of `compress_sharded`, then ours is the metered backend with these, else the backend that chooses schedules.
    shards: of each of several replicas, which lie in the order of ranks; 0: one copy of the model.
    UserError if the cluster does not declare how fast all its devices compute.
    """
    rates = cluster.declared_rates
    if rates is None:
        raise UserError(f"{cluster.name} does not declare flops_per_s for all devices; compute is paced by it")
    settings = {key: options[key] for key in ("turns", "steps", "micro_batch")} | {"codecs": codecs, "framework": framework}
    settings |= {"shards": shards, "model": small_model(options).model_dump(), "flops_per_s": min(rates)}
    lab = run_script(cluster, "step_turns", settings)
    found = lab.results["step_turns"]
    native, ours = found["seconds"]["native"], found["seconds"]["ours"]
    ratios = sorted(theirs / mine for theirs, mine in zip(native, ours, strict=True))
    row = {
        "case": f"{cluster.name}, delay {lab.delay}" if codecs else cluster.name,
        "ranks": cluster.world_size,
        "native_s": median(native),
        "ours_s": median(ours),
        "ratio": median(ratios),
        "ratio_low": ratios[0],
        "ratio_high": ratios[-1],
        "native_late": found["late"]["native"],
        "ours_late": found["late"]["ours"],
    }
    return row, found


def small_model(options: Mapping[str, Any]) -> ModelConfig:
    """Of the layers, width and context in `options`."""
    shape = {key: options[key] for key in ("layers", "width", "context")}
    return ModelConfig.model_validate({**shape, "heads": 4, "norm": "layer", "mlp": "gelu"})
