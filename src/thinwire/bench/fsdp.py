"""FSDP2 (`fully_shard`) as it is on gloo, and with `compress_sharded`, in turns: seconds of a step, card bytes, held-out loss.

Time: in the lab, links shaped and compute paced as the cluster file declares. What to expect, with bytes b a rank sends in a
step, R the rate of its card, C the declared seconds of compute:

    stock    C + b / R        FSDP2's collectives on CPUs are over when they return: nothing overlaps. Two all-gathers of
                              float32, and gloo's reduce-scatter, which is an all-reduce inside
    ours     max(C, b / R)    at best; the first unit's weights and the last one's gradients have nothing to hide under

`expected_ratio` is the one over the other. Learning: on loopback, unpaced, as loss does not depend on the wire; the same batches
and first weights for both; the float32 weights are scored. Bars: at least 3.3 x the steps, a held-out loss at most 0.5 % higher.
"""

from collections.abc import Mapping
from statistics import mean, median
from types import SimpleNamespace
from typing import Any

from thinwire.bench.collective_steps import measure_steps, small_model
from thinwire.bench.ranks import run_script
from thinwire.bench.registry import Rows
from thinwire.cluster import FRAME_OVERHEAD, Cluster, load_cluster
from thinwire.collectives.wire import sent_bytes
from thinwire.compress.base import make_codec
from thinwire.compress.sharded.layout import Coding, UnitShape, sharded_transfers
from thinwire.workload import Workload

DEFAULTS: Mapping[str, Any] = {
    "gradients": "int4",
    "weights": "int8",
    "turns": 5,
    "steps": 1,
    "layers": 8,
    "width": 256,
    "context": 128,
    "micro_batch": 4,
    "seeds": 3,
    "ranks": 4,
    "train_steps": 200,
}
SPEED_BAR, LOSS_BAR = 3.3, 1.005


def run(cluster_name: str | None, options: Mapping[str, Any]) -> Rows:
    """A row for the time of a step if a cluster is given, and one for the loss unless seeds = 0."""
    codecs = {key: options[key] for key in ("gradients", "weights")}
    rows = [_time(load_cluster(cluster_name), codecs, options)] if cluster_name else []
    return rows + ([_loss(codecs, options)] if options["seeds"] else [])


def _time(cluster: Cluster, codecs: Mapping[str, str], options: Mapping[str, Any]) -> dict[str, Any]:
    row, found = measure_steps(cluster, "fsdp", options, codecs)
    config = small_model(options)
    workload = Workload.of_transformer(config, options["micro_batch"], config.context)
    compute_s = workload.flops_per_microbatch / min(cluster.declared_rates or ())
    slowest_bps = min(link.bandwidth_bps.value for link in cluster.links)
    predicted = {name: _step_bytes(workload, cluster.world_size, codecs, name == "native") for name in ("native", "ours")}
    wire_s = {name: size * 8 * FRAME_OVERHEAD / slowest_bps for name, size in predicted.items()}
    row |= {"case": f"{row['case']}: step", "compute_s": compute_s}
    row["expected_ratio"] = (compute_s + wire_s["native"]) / max(compute_s, wire_s["ours"])
    for name in ("native", "ours"):
        row[f"{name}_wire_s"] = wire_s[name]
        row[f"{name}_predicted_bytes"] = predicted[name]
        row[f"{name}_card_bytes"] = median(found["card_bytes"][name])
    return row | {"memory_bytes": found["memory_bytes"], "bar": SPEED_BAR, "held": row["ratio"] >= SPEED_BAR}


def _loss(codecs: Mapping[str, str], options: Mapping[str, Any]) -> dict[str, Any]:
    train = {"steps": options["train_steps"], "micro_batch": 4, "sequence": 64, "learning_rate": 2e-3, "eval_tokens": 65_536}
    model = {"layers": 4, "width": 128, "heads": 4, "context": 64, "init_std": 0.06}
    settings = {"codecs": codecs, "seeds": list(range(options["seeds"])), "run": {"train": train, "model": model}}
    losses = run_script(options["ranks"], "fsdp_learning", settings).results["fsdp_learning"]
    ratio = mean(losses["ours"]) / mean(losses["native"])
    return {
        "case": f"loopback: held-out loss after {options['train_steps']} steps",
        "ranks": options["ranks"],
        "native_loss": mean(losses["native"]),
        "ours_loss": mean(losses["ours"]),
        "native_losses": losses["native"],
        "ours_losses": losses["ours"],
        "ratio": ratio,
        "bar": LOSS_BAR,
        "held": ratio <= LOSS_BAR,
    }


def _step_bytes(workload: Workload, world_size: int, codecs: Mapping[str, str], stock: bool) -> int:
    """What rank 0 sends in a step."""
    blocks: dict[str, list[Any]] = {block: [] for block in workload.block_names}
    rest: list[Any] = []
    for parameter in workload.parameters:
        blocks.get(".".join(parameter.name.split(".")[:2]), rest).append(parameter)
    units = [UnitShape("", tuple(rest), reshards=False)]
    units += [UnitShape(block, tuple(parameters)) for block, parameters in blocks.items()]
    gradients, weights = (make_codec(SimpleNamespace(kind=codecs[key])) for key in ("gradients", "weights"))
    coding = Coding(gradients, weights, stock_gradients=stock, stock_weights=stock)
    return sum(
        transfer.calls * sent_bytes(transfer.op, transfer.message_bytes, world_size, 0)
        for transfer in sharded_transfers(units, world_size, coding)
    )
