"""Pipelines on thin links: PyTorch's own 1F1B and ours, plain and coded, in turns, each beside its prediction; held-out losses.

Time: in the lab, links shaped and compute paced as the cluster file declares; `rate` sets all links to one rate instead. Bars:
the case "1f1b, int8" at least 2.5 x the steps of PyTorch's, which sends float32; and the predicted seconds of ours off by at
most 20 %. What limits: with m micro-batches, b bytes of an activation and R the rate of a card, of which a rank in the middle
sends m activations and m gradients,

    step >= 2 m b / R        and        step >= (m + p - 1) * (forward + backward)

Learning: on loopback, unpaced; the same batches and first weights for all cases; a loss at most 0.5 % above the plain one's.
"""

from collections.abc import Mapping
from statistics import mean, median
from typing import Any

import torch

from thinwire.bench.collective_steps import small_model
from thinwire.bench.collectives import with_rates
from thinwire.bench.ranks import run_script
from thinwire.bench.registry import Rows
from thinwire.cluster import Cluster, load_cluster
from thinwire.cluster.graph import Routes
from thinwire.config.model import ModelConfig
from thinwire.config.pipeline import PipelineSection
from thinwire.errors import UserError
from thinwire.layout import Layout
from thinwire.models.transformer import Transformer
from thinwire.parallel.cut import cut_model
from thinwire.plan.pipeline import simulate
from thinwire.train.part import stages_of
from thinwire.units import parse
from thinwire.workload import Workload

DEFAULTS: Mapping[str, Any] = {
    "rate": "",
    "turns": 5,
    "steps": 1,
    "layers": 6,
    "width": 256,
    "context": 128,
    "micro_batch": 4,
    "micro_batches": 8,
    "seeds": 3,
    "ranks": 4,
    "train_steps": 200,
}
STOCK, CODED = "PyTorch's 1F1B", "1f1b, int8"
INT8 = {"activations": "int8", "gradients": "int8"}
CASES: Mapping[str, Mapping[str, Any]] = {
    STOCK: {},
    "1f1b": {},
    CODED: INT8,
    "1f1b, int8 and int4": {"activations": "int8", "gradients": "int4"},
    "zero bubble, int8": {"schedule": "zb1p", **INT8},
}
SPEED_BAR, LOSS_BAR, PREDICTION_BAR = 2.5, 1.005, 0.20


def run(cluster_name: str | None, options: Mapping[str, Any]) -> Rows:
    """A row for the time of each case if a cluster is given, and one for each loss unless seeds = 0."""
    rows = _times(load_cluster(cluster_name), options) if cluster_name else []
    return rows + (_losses(options) if options["seeds"] else [])


def _times(cluster: Cluster, options: Mapping[str, Any]) -> Rows:
    rates = cluster.declared_rates
    if rates is None:
        raise UserError(f"{cluster.name} does not declare flops_per_s for all devices; compute is paced by it")
    if options["rate"]:
        rate_bps = parse(options["rate"], "bit/s")
        cluster = with_rates(cluster, lambda link: rate_bps)
    settings = {key: options[key] for key in ("turns", "steps", "micro_batch", "micro_batches")}
    settings |= {"model": _shape(options).model_dump(), "flops_per_s": min(rates), "cases": _cases()}
    lab = run_script(cluster, "pipeline_turns", settings)
    found = lab.results["pipeline_turns"]
    stock, rows = found[STOCK]["seconds"], []
    for name, case in CASES.items():
        seconds = found[name]["seconds"]
        ratios = sorted(theirs / mine for theirs, mine in zip(stock, seconds, strict=True))
        predicted_s = None if name == STOCK else _predicted_s(cluster, PipelineSection(**case), options)
        off = None if predicted_s is None else predicted_s / median(seconds) - 1
        bar = SPEED_BAR if name == CODED else None
        rows.append(
            {
                "case": f"{cluster.name}, delay {lab.delay}: {name}",
                "ranks": cluster.world_size,
                "stock_s": median(stock),
                "ours_s": median(seconds),
                "ratio": median(ratios),
                "ratio_low": ratios[0],
                "ratio_high": ratios[-1],
                "predicted_s": predicted_s,
                "off": off,
                "card_bytes": median(found[name]["card_bytes"]),
                "late": found[name]["late"],
                "bar": bar,
                "held": (off is None or abs(off) <= PREDICTION_BAR) and (bar is None or median(ratios) >= bar),
            }
        )
    return rows


def _losses(options: Mapping[str, Any]) -> Rows:
    train = {"steps": options["train_steps"], "micro_batch": 2, "sequence": 64, "learning_rate": 2e-3, "eval_tokens": 65_536}
    model = {"layers": 4, "width": 128, "heads": 4, "context": 64, "init_std": 0.06}
    run = {"train": train | {"dtype": "float32"}, "model": model, "sync": {"accumulate": 4}}
    settings = {"cases": _cases()[1:-1], "seeds": list(range(options["seeds"])), "run": run}
    losses = run_script(options["ranks"], "pipeline_learning", settings).results["pipeline_learning"]
    plain = mean(losses["1f1b"])
    return [
        {
            "case": f"loopback: held-out loss after {options['train_steps']} steps: {name}",
            "ranks": options["ranks"],
            "plain_loss": plain,
            "ours_loss": mean(losses[name]),
            "ours_losses": losses[name],
            "ratio": mean(losses[name]) / plain,
            "bar": LOSS_BAR,
            "held": mean(losses[name]) / plain <= LOSS_BAR,
        }
        for name in losses
        if name != "1f1b"
    ]


def _cases() -> list[dict[str, Any]]:
    return [{"name": name, "stock": name == STOCK, "options": case} for name, case in CASES.items()]


def _shape(options: Mapping[str, Any]) -> ModelConfig:
    return small_model(options).model_copy(update={"tied": False})


def _predicted_s(cluster: Cluster, section: PipelineSection, options: Mapping[str, Any]) -> float:
    """Of the passes of a step."""
    shape, ranks = _shape(options), cluster.world_size
    workload = Workload.of_transformer(shape, options["micro_batch"], shape.context)
    example = torch.zeros(options["micro_batch"], shape.context, dtype=torch.int64)
    cut = cut_model(Transformer(shape), example, section, ranks, workload.chain_flops_per_token)
    stages = stages_of(workload, cut, options["micro_batches"])
    pipelines = stages.pipelines(Layout(pipe=ranks), [min(cluster.declared_rates or (1.0,))] * ranks)
    return simulate(pipelines, Routes(cluster)).seconds
