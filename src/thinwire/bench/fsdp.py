"""FSDP2 (`fully_shard`) as it is on gloo, and with `compress_sharded`, in turns: seconds of a step, card bytes, held-out loss.

Time: in the lab, links shaped and compute paced as the cluster file declares. What to expect, with bytes b a rank sends in a
step, R the rate of its card, C the declared seconds of compute:

    stock    C + b / R        FSDP2's collectives on CPUs are over when they return: nothing overlaps. Two all-gathers of
                              float32, and gloo's reduce-scatter, which is an all-reduce inside
    ours     max(C, b / R)    at best; the first unit's weights and the last one's gradients have nothing to hide under

With `replicas` (a codec) each host holds a copy of the model, sharded over its ranks (HSDP): only the mean over the replicas
crosses the cards, stock's by an all-reduce of each chunk, and R is for all ranks of a host together. Weights are gathered once.

`expected_ratio` is the one over the other. Learning: on loopback, unpaced, as loss does not depend on the wire; the same batches
and first weights for both; the float32 weights are scored. Bars: at least 3.3 x the steps (3 x with replicas), a held-out loss at
most 0.5 % higher.
"""

from collections.abc import Mapping
from statistics import mean, median
from types import SimpleNamespace
from typing import Any

from thinwire.bench.collective_steps import measure_steps, small_model
from thinwire.bench.ranks import run_script
from thinwire.bench.registry import Rows
from thinwire.cluster import FRAME_OVERHEAD, Cluster, load_cluster
from thinwire.collectives.ledger import Ledger
from thinwire.collectives.wire import sent_bytes
from thinwire.compress.base import make_codec
from thinwire.compress.exchange import make_exchange
from thinwire.compress.sharded.layout import Coding, UnitShape, sharded_transfers
from thinwire.compress.sharded.replicas import chunk_of
from thinwire.config.compress import Coded, NoCompression
from thinwire.workload import Workload

DEFAULTS: Mapping[str, Any] = {
    "gradients": "int4",
    "weights": "int8",
    "replicas": "",
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
SPEED_BAR, HYBRID_BAR, LOSS_BAR = 3.3, 3.0, 1.005
SHARDS = 2
"""Of a replica, where loss is measured."""


def run(cluster_name: str | None, options: Mapping[str, Any]) -> Rows:
    """A row for the time of a step if a cluster is given, and one for the loss unless seeds = 0."""
    codecs = {key: options[key] for key in ("gradients", "weights")}
    if options["replicas"]:
        codecs |= {"replicas": options["replicas"]}
    rows = [_time(load_cluster(cluster_name), codecs, options)] if cluster_name else []
    return rows + ([_loss(codecs, options)] if options["seeds"] else [])


def _time(cluster: Cluster, codecs: Mapping[str, str], options: Mapping[str, Any]) -> dict[str, Any]:
    shards = len(cluster.hosts[0].devices) if "replicas" in codecs else 0
    row, found = measure_steps(cluster, "fsdp", options, codecs, shards)
    config = small_model(options)
    workload = Workload.of_transformer(config, options["micro_batch"], config.context)
    compute_s = workload.flops_per_microbatch / min(cluster.declared_rates or ())
    slowest_bps = min(link.bandwidth_bps.value for link in cluster.links)
    sides = {"native": True, "ours": False}
    predicted = {name: _sent_bytes(workload, cluster.world_size, shards, codecs, stock) for name, stock in sides.items()}
    wire_s = {name: size * 8 * FRAME_OVERHEAD / slowest_bps for name, size in predicted.items()}
    row |= {"case": f"{row['case']}: step", "compute_s": compute_s}
    row["expected_ratio"] = (compute_s + wire_s["native"]) / max(compute_s, wire_s["ours"])
    for name in sides:
        row[f"{name}_wire_s"] = wire_s[name]
        row[f"{name}_predicted_bytes"] = predicted[name]
        row[f"{name}_card_bytes"] = median(found["card_bytes"][name])
    bar = HYBRID_BAR if shards else SPEED_BAR
    return row | {"memory_bytes": found["memory_bytes"], "bar": bar, "held": row["ratio"] >= bar}


def _loss(codecs: Mapping[str, str], options: Mapping[str, Any]) -> dict[str, Any]:
    train = {"steps": options["train_steps"], "micro_batch": 4, "sequence": 64, "learning_rate": 2e-3, "eval_tokens": 65_536}
    model = {"layers": 4, "width": 128, "heads": 4, "context": 64, "init_std": 0.06}
    shards = SHARDS if "replicas" in codecs else 0
    settings = {
        "codecs": codecs,
        "shards": shards,
        "seeds": list(range(options["seeds"])),
        "run": {"train": train, "model": model},
    }
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


def _sent_bytes(workload: Workload, world_size: int, shards: int, codecs: Mapping[str, str], stock: bool) -> int:
    """What rank 0 sends in a step. With shards: what the ranks of its host send to other hosts, each its chunk's mean over the
    replicas."""
    units, senders, p = units_of(workload), max(1, shards), world_size // max(1, shards)
    if shards:
        exchange = make_exchange(NoCompression() if stock else Coded(kind=codecs["replicas"]), Ledger())
        transfers = [one for unit in units for one in exchange.transfers("", chunk_of(unit, shards), "replicate", p)]
    else:
        gradients, weights = (make_codec(SimpleNamespace(kind=codecs[key])) for key in ("gradients", "weights"))
        transfers = sharded_transfers(units, p, Coding(gradients, weights, stock_gradients=stock, stock_weights=stock))
    return senders * sum(one.calls * sent_bytes(one.op, one.message_bytes, p, 0) for one in transfers)


def units_of(workload: Workload) -> list[UnitShape]:
    """One of each block, and one of the rest."""
    blocks: dict[str, list[Any]] = {block: [] for block in workload.block_names}
    rest: list[Any] = []
    for parameter in workload.parameters:
        blocks.get(".".join(parameter.name.split(".")[:2]), rest).append(parameter)
    return [UnitShape("", tuple(rest), reshards=False), *(UnitShape(name, tuple(its)) for name, its in blocks.items())]
