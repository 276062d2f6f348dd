"""Layouts on thin links: stock PyTorch and ours, the right links and the wrong ones, in turns, beside predictions; losses.

Time: in the lab, links shaped and compute paced as the cluster file declares. On a cluster without racks, whose links `rate` sets
to one rate ("": as declared):

    pipelines    PyTorch's own 1F1B, which sends float32, and ours, plain and coded. With m micro-batches, b bytes of an
                 activation and R the rate of a card, of which a rank in the middle sends m activations and m gradients,
                 step >= 2 m b / R and step >= (m + p - 1) * (forward + backward)

On one of racks, whose uplinks all ranks of a rack share:

    tensor       each matrix shared out within a rack, replicas across, and the other way round
    shard        FSDP2 on a mesh of replicas and shards (HSDP), and our shards, plain and int8 between the racks; the model is
                 shared out within a rack on both sides

Bars: int8 pipelines at least 2.5 x, int8 shards at least 2 x the steps of stock PyTorch; predicted seconds off by at most 20 %,
and by 8 % in the median of a cluster's rows. Learning: on loopback, unpaced; the same batches and first weights for all cases; a
loss at most 0.5 % above that of the same layout without codes.
"""

from collections.abc import Mapping
from statistics import mean, median
from typing import Any

from thinwire.bench.collective_steps import small_model
from thinwire.bench.collectives import with_rates
from thinwire.bench.ranks import run_script
from thinwire.bench.registry import Rows
from thinwire.cluster import Cluster, load_cluster
from thinwire.errors import UserError
from thinwire.units import parse

DEFAULTS: Mapping[str, Any] = {
    "rate": "10 Mbit/s",
    "turns": 3,
    "layers": 6,
    "width": 256,
    "context": 128,
    "micro_batch": 4,
    "micro_batches": 8,
    "seeds": 2,
    "ranks": 4,
    "train_steps": 200,
}
PIPELINE, HYBRID, WRONG = "PyTorch's 1F1B", "PyTorch's FSDP2", "tensor across racks"
INT8 = {"activations": "int8", "gradients": "int8"}
PIPELINES: Mapping[str, Mapping[str, Any]] = {
    PIPELINE: {},
    "1f1b": {},
    "1f1b, int8": INT8,
    "1f1b, int8 and int4": {"activations": "int8", "gradients": "int4"},
    "zero bubble, int8": {"schedule": "zb1p", **INT8},
}
BARS = {"1f1b, int8": 2.5, "shard in racks, int8 across": 2.0}
LOSS_BAR, WORST_BAR, MEDIAN_BAR = 1.005, 0.20, 0.08
RACKED_BATCH, TENSOR_MICRO = 1, 4
"""Where there are racks: sequences of a micro-batch, and micro-batches of a step of tensor ranks."""


def run(cluster_name: str | None, options: Mapping[str, Any]) -> Rows:
    """Rows for the time of each case if a cluster is given, and one for each loss unless seeds = 0."""
    rows, racks = [], False
    if cluster_name:
        cluster = load_cluster(cluster_name)
        racks = any(host.rack for host in cluster.hosts)
        rows = _times(cluster, options, _racked(cluster, options) if racks else _pipelines(cluster.world_size, options))
    return rows + (_losses(options, hybrid=racks or not cluster_name, pipelines=not racks) if options["seeds"] else [])


def _times(cluster: Cluster, options: Mapping[str, Any], cases: list[dict[str, Any]]) -> Rows:
    rates = cluster.declared_rates
    if rates is None:
        raise UserError(f"{cluster.name} does not declare flops_per_s for all devices; compute is paced by it")
    if options["rate"] and not any(host.rack for host in cluster.hosts):
        rate_bps = parse(options["rate"], "bit/s")
        cluster = with_rates(cluster, lambda link: rate_bps)
    lab = run_script(cluster, "layout_turns", {"turns": options["turns"], "flops_per_s": min(rates), "cases": cases})
    found, rows = lab.results["layout_turns"], []
    for case in cases:
        name, one, beside = case["name"], found[case["name"]], found[case["beside"]]["seconds"]
        ratios = sorted(theirs / mine for theirs, mine in zip(beside, one["seconds"], strict=True))
        seconds, predicted_s, bar = median(one["seconds"]), one["predicted_s"], BARS.get(name)
        off = None if predicted_s is None else predicted_s / seconds - 1
        rows.append(
            {
                "case": f"{cluster.name}, delay {lab.delay}: {name}",
                "beside": case["beside"],
                "ranks": cluster.world_size,
                "beside_s": median(beside),
                "ours_s": seconds,
                "tokens_per_s": case["tokens"] / seconds,
                "ratio": median(ratios),
                "ratio_low": ratios[0],
                "ratio_high": ratios[-1],
                "predicted_s": predicted_s,
                "off": off,
                "card_bytes": median(one["card_bytes"]),
                "late": one["late"],
                "bar": bar,
                "held": (off is None or abs(off) <= WORST_BAR) and (bar is None or median(ratios) >= bar),
            }
        )
    errors = [abs(row["off"]) for row in rows if row["off"] is not None]
    summary = {
        "case": f"{cluster.name}: predictions of {len(errors)} rows",
        "median_off": median(errors),
        "median_bar": MEDIAN_BAR,
        "worst_off": max(errors),
        "worst_bar": WORST_BAR,
        "held": median(errors) <= MEDIAN_BAR and max(errors) <= WORST_BAR,
    }
    return [*rows, summary]


def _pipelines(ranks: int, options: Mapping[str, Any]) -> list[dict[str, Any]]:
    count, size = options["micro_batches"], options["micro_batch"]
    return [
        _case(name, PIPELINE, {"pipe": ranks}, (options, count, size), pipeline=section) for name, section in PIPELINES.items()
    ]


def _racked(cluster: Cluster, options: Mapping[str, Any]) -> list[dict[str, Any]]:
    racks: dict[str | None, list[int]] = {}
    for rank in range(cluster.world_size):
        racks.setdefault(cluster.host_of(rank).rack, []).append(rank)
    sizes = {len(ranks) for ranks in racks.values()}
    if len(racks) < 2 or len(sizes) > 1 or min(sizes) % len(racks):
        numbers = ", ".join(str(len(ranks)) for ranks in racks.values())
        raise UserError(f"{cluster.name} has racks of {numbers} ranks; take racks of as many each, a multiple of their number")
    size = min(sizes)
    inside = [rank for ranks in racks.values() for rank in ranks]
    each = size // len(racks)
    across = [
        rank
        for first in range(0, size, each)
        for rank in sorted(ranks[first + place] for ranks in racks.values() for place in range(each))
    ]  # groups are in the order of ranks
    tensor = {"tensor": size, "data": len(racks)}
    shard = {"shard": size, "data": len(racks)}
    of_tensor, of_shard = (options, TENSOR_MICRO, RACKED_BATCH), (options, 1, RACKED_BATCH)
    never = {"sharded": {"reshard": "never"}}
    return [
        _case(WRONG, WRONG, tensor, of_tensor, across),
        _case("tensor in racks", WRONG, tensor, of_tensor, inside),
        _case("tensor in racks, int8 sums", WRONG, tensor, of_tensor, inside, tensor={"sums": "int8"}),
        _case(HYBRID, HYBRID, shard, of_shard, inside),
        _case("shard in racks", HYBRID, shard, of_shard, inside, **never),
        _case("shard in racks, int8 across", HYBRID, shard, of_shard, inside, **never, compress={"kind": "int8"}),
    ]


def _case(
    name: str,
    beside: str,
    layout: Mapping[str, int],
    size: tuple[Mapping[str, Any], int, int],
    order: list[int] | None = None,
    **sections: Mapping[str, Any],
) -> dict[str, Any]:
    """size: options, micro-batches of a step, sequences of one."""
    options, count, batch = size
    model = small_model(options).model_copy(update={"tied": False})
    train = {"dtype": "float32", "micro_batch": batch, "sequence": model.context, "clip": 0}
    replicas = layout.get("data", 1) * layout.get("shard", 1)
    return {
        "name": name,
        "beside": beside,
        "stock": name in (PIPELINE, HYBRID),
        "layout": layout,
        "order": order,
        "tokens": replicas * count * batch * model.context,
        "run": {"train": train, "model": model.model_dump(), "sync": {"accumulate": count}, **sections},
    }


def _losses(options: Mapping[str, Any], *, hybrid: bool, pipelines: bool) -> Rows:
    train = {"steps": options["train_steps"], "micro_batch": 2, "sequence": 64, "learning_rate": 2e-3, "eval_tokens": 65_536}
    model = {"layers": 4, "width": 128, "heads": 4, "context": 64, "init_std": 0.06}
    run = {"train": train | {"dtype": "float32"}, "model": model, "sync": {"accumulate": 4}}
    ranks, cases = options["ranks"], []
    if pipelines:
        named = ("1f1b", "1f1b, int8", "1f1b, int8 and int4")
        cases += [{"name": name, "layout": {"pipe": ranks}, "run": {"pipeline": PIPELINES[name]}} for name in named]
    if hybrid:
        layout = {"shard": ranks // 2, "data": 2}
        coded = {"compress": {"kind": "int8"}}
        cases.append({"name": "shard in racks", "layout": layout, "run": {"sync": {"accumulate": 1}}})
        cases.append({"name": "shard in racks, int8 across", "layout": layout, "run": {"sync": {"accumulate": 1}, **coded}})
    settings = {"cases": cases, "seeds": list(range(options["seeds"])), "run": run}
    losses = run_script(ranks, "layout_learning", settings).results["layout_learning"]
    rows = []
    for name in losses:
        plain = next(other for other in ("1f1b", "shard in racks") if name.startswith(other))
        if name == plain:
            continue
        ratio = mean(losses[name]) / mean(losses[plain])
        rows.append(
            {
                "case": f"loopback: held-out loss after {options['train_steps']} steps: {name}",
                "ranks": ranks,
                "plain_loss": mean(losses[plain]),
                "ours_loss": mean(losses[name]),
                "ours_losses": losses[name],
                "ratio": ratio,
                "bar": LOSS_BAR,
                "held": ratio <= LOSS_BAR,
            }
        )
    return rows
