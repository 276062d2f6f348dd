"""FSDP2 (`fully_shard`) as it is on gloo, and with `compress_sharded`, in turns: seconds of a step, card bytes, held-out loss.

Time: in the lab, links shaped and compute paced as the cluster file declares. What to expect, with bytes b a rank sends in a
step, R the rate of its card, C the declared seconds of compute:

    stock    C + b / R        FSDP2's collectives on CPUs are over when they return: nothing overlaps. Two all-gathers of
                              float32, and gloo's reduce-scatter, which is an all-reduce inside
    ours     max(C, b / R)    at best; the first unit's weights and the last one's gradients have nothing to hide under

`expected_ratio` is the one over the other. Learning: on loopback, unpaced, as loss does not depend on the wire; the same batches
and first weights for both; the float32 weights are scored. Bars: at least 3.3 x the steps, a held-out loss at most 0.5 % higher.
"""

import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from statistics import mean, median
from types import SimpleNamespace
from typing import Any

from thinwire.bench.local import run_local
from thinwire.bench.registry import Rows, take
from thinwire.cluster import FRAME_OVERHEAD, Cluster, load_cluster
from thinwire.collectives.wire import sent_bytes
from thinwire.compress.base import make_codec
from thinwire.compress.sharded.layout import Coding, UnitShape, sharded_transfers
from thinwire.config.model import ModelConfig
from thinwire.errors import UserError
from thinwire.lab.commands import Process, processes_for
from thinwire.lab.run import RESULTS, launch
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
SCRIPT = "thinwire.bench.peers.fsdp_contenders"
CONTENDERS = ("stock", "ours")


def run(cluster_name: str | None = None, options: Mapping[str, Any] | None = None) -> Rows:
    """A row for the time of a step if a cluster is given, and one for the loss unless seeds = 0."""
    told = take(options or {}, DEFAULTS)
    rows = []
    if cluster_name is not None:
        rows.append(_time(load_cluster(cluster_name), told))
    if told["seeds"]:
        rows.append(_loss(told))
    return rows


def _time(cluster: Cluster, told: Mapping[str, Any]) -> dict[str, Any]:
    rates = cluster.declared_rates
    if rates is None:
        raise UserError(f"{cluster.name} does not declare flops_per_s for all devices; bench fsdp paces compute by it")
    shape = {key: told[key] for key in ("layers", "width", "context")}
    config = ModelConfig.model_validate({**shape, "heads": 4, "norm": "layer", "mlp": "gelu"})
    shared = {key: told[key] for key in ("turns", "steps", "micro_batch", "gradients", "weights")}
    settings = {**shared, "model": config.model_dump(), "flops_per_s": min(rates)}
    processes: list[Process] = []
    for command in _commands("time", RESULTS, settings):
        processes += processes_for(cluster, command)
    lab = launch(cluster, processes)
    if lab.failure:
        raise UserError(lab.failure)
    stock, ours = (json.loads(lab.results[f"{name}.json"]) for name in CONTENDERS)
    ratios = sorted(theirs / mine for theirs, mine in zip(stock["seconds"], ours["seconds"], strict=True))

    workload = Workload.of_transformer(config, told["micro_batch"], config.context)
    compute_s = workload.flops_per_microbatch / min(rates)
    bytes_of = {name: _step_bytes(workload, cluster.world_size, name, told) for name in CONTENDERS}
    slowest = min(link.bandwidth_bps.value for link in cluster.links)
    wire_s = {name: size * 8 * FRAME_OVERHEAD / slowest for name, size in bytes_of.items()}
    ratio = median(ratios)
    return {
        "case": f"{cluster.name}, delay {lab.delay}: step",
        "ranks": cluster.world_size,
        "native_s": median(stock["seconds"]),
        "ours_s": median(ours["seconds"]),
        "ratio": ratio,
        "ratio_low": ratios[0],
        "ratio_high": ratios[-1],
        "expected_ratio": (compute_s + wire_s["stock"]) / max(compute_s, wire_s["ours"]),
        "compute_s": compute_s,
        "native_wire_s": wire_s["stock"],
        "ours_wire_s": wire_s["ours"],
        "native_predicted_bytes": bytes_of["stock"],
        "ours_predicted_bytes": bytes_of["ours"],
        "native_card_bytes": median(stock["card_bytes"]),
        "ours_card_bytes": median(ours["card_bytes"]),
        "native_late": stock["late"],
        "ours_late": ours["late"],
        "memory_bytes": ours["memory_bytes"],
        "bar": SPEED_BAR,
        "held": ratio >= SPEED_BAR,
    }


def _loss(told: Mapping[str, Any]) -> dict[str, Any]:
    train = {"steps": told["train_steps"], "micro_batch": 4, "sequence": 64, "learning_rate": 2e-3, "eval_tokens": 65_536}
    model = {"layers": 4, "width": 128, "heads": 4, "context": 64, "init_std": 0.06}
    settings = {"gradients": told["gradients"], "weights": told["weights"], "seeds": list(range(told["seeds"]))}
    settings["run"] = {"train": train, "model": model}
    losses = {}
    for command, name in zip(_commands("learn", "", settings), CONTENDERS, strict=True):
        with tempfile.TemporaryDirectory(prefix="thinwire-") as folder:
            run_local([[folder if part == "" else part for part in command]], told["ranks"])
            losses[name] = json.loads((Path(folder) / f"{name}.json").read_text())["losses"]
    ratio = mean(losses["ours"]) / mean(losses["stock"])
    return {
        "case": f"loopback: held-out loss after {told['train_steps']} steps",
        "ranks": told["ranks"],
        "native_loss": mean(losses["stock"]),
        "ours_loss": mean(losses["ours"]),
        "native_losses": losses["stock"],
        "ours_losses": losses["ours"],
        "ratio": ratio,
        "bar": LOSS_BAR,
        "held": ratio <= LOSS_BAR,
    }


def _commands(what: str, results: str, settings: Mapping[str, Any]) -> list[list[str]]:
    """Of the two contenders, for one rank each."""
    made = []
    for index, name in enumerate(CONTENDERS):
        told = json.dumps({**settings, "name": name, "index": index, "port": 29620 + index})
        made.append([sys.executable, "-m", SCRIPT, what, results, told])
    return made


def _step_bytes(workload: Workload, world_size: int, name: str, told: Mapping[str, Any]) -> int:
    """What rank 0 sends in a step."""
    blocks: dict[str, list[Any]] = {block: [] for block in workload.block_names}
    rest: list[Any] = []
    for parameter in workload.parameters:
        blocks.get(".".join(parameter.name.split(".")[:2]), rest).append(parameter)
    units = [UnitShape("", tuple(rest), reshards=False)]
    units += [UnitShape(block, tuple(parameters)) for block, parameters in blocks.items()]
    stock = name == "stock"
    gradients, weights = (make_codec(SimpleNamespace(kind=told[key])) for key in ("gradients", "weights"))
    coding = Coding(gradients, weights, stock_gradients=stock, stock_weights=stock)
    return sum(
        transfer.calls * sent_bytes(transfer.op, transfer.message_bytes, world_size, 0)
        for transfer in sharded_transfers(units, world_size, coding)
    )
