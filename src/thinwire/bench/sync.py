"""Ways to synchronise gradients, PyTorch's own and ours, on one model in one run: seconds of a step, bytes, held-out loss.

Time: in the lab, compute paced by what the cluster declares, all methods in turns in the same processes; medians over the turns.
Each turn lasts about `turn_s`, one step at least. `no_exchange_step_s` is the step under no_sync, which takes turns too.

    utilisation = no_exchange_step_s / step_s

Learning: on loopback, unpaced, because results do not depend on the wire: every method from the same weights on the same batches,
one seed after another; replicas must be bit-equal at the end, hivemind's excepted. Without a cluster the turns are on loopback
too, and unpaced.

    wire_bytes_per_step   by the ledger: mean over the ranks and the later half of the steps
    card_bytes_per_step   by the network cards' counters in the turns: headers and acknowledgements included
    processor_s           of a step, on rank 0, all its threads: what a method computes shows here even where it hides in time
    wait_s                of ours: from a rank's last gradient until the exchange was over
    late                  by how much passes took longer than declared, as a fraction
    spread                of the turns: between the quartiles, as a fraction
    weights_apart         the largest difference between two replicas' values of a weight in the end
    torn                  the part of the exchanges that lacked values of a rank

`collectives` is that of run.toml; it is for ours only, stock peers stay on stock gloo.

With three links or more a table says which rate each method needs (`sync_rates`); with `target`, a part of data parallelism's
tokens, each row says how long the loss that it has then takes (`sync_target`). `learned` names a file that keeps what was learned
for later runs (`sync_learned`). Methods of other packages are in `peer_sync`.
"""

import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from thinwire.bench.local import run_local
from thinwire.bench.peer_sync import check, launches, prefix
from thinwire.bench.progress import shown
from thinwire.bench.registry import Rows, take
from thinwire.bench.sync_bars import UNCOMPRESSED, bar_rows
from thinwire.bench.sync_learned import kept, key_of
from thinwire.bench.sync_methods import Method, make_method
from thinwire.bench.sync_rates import rate_rows
from thinwire.bench.sync_target import add_targets, target_rows
from thinwire.cluster import Cluster, Quantity, load_cluster
from thinwire.collectives.ledger import Ledger
from thinwire.errors import UserError
from thinwire.lab.commands import processes_for
from thinwire.lab.run import RESULTS, LabOptions, launch
from thinwire.layout import Layout
from thinwire.plan.cost import Setting, predict
from thinwire.sync.make import make_synchroniser
from thinwire.traffic import Transfer
from thinwire.units import parse, show
from thinwire.workload import Workload

DEFAULTS: Mapping[str, Any] = {
    "methods": ["ddp", "ddp-fp16", "ddp-powersgd4", "none", "bf16", "int8", "int4", "int4-all", "sign", "topk"],
    "seeds": 1,
    "links": [],
    "ranks": 4,
    "preset": "1m",
    "model": {"layers": 8},
    "sequence": 64,
    "micro_batch": 2,
    "accumulate": 1,
    "bucket_bytes": 2**20,
    "collectives": "native",
    "fused": False,
    "steps": 300,
    "learning_rate": 2e-3,
    "warmup_steps": 20,
    "eval_tokens": 65_536,
    "turns": 5,
    "turn_s": 2.0,
    "curve_every": 0,
    "target": 0.0,
    "learned": "",
}
UNSHAPED = "unshaped"
SLOWEST_BPS, UNSHAPED_BPS = 1e3, 100e9
"""The slowest and the fastest that a lab can be told; no card of it gets to the latter."""
TIMEOUT_S, PATIENCE_S = 1800.0, 4 * 3600.0
POINTS = 20
"""Of the curve of a whole run, where a target is wanted."""
NO_EXCHANGE = "no exchange"
SCRIPT = "thinwire.bench.peers.sync_contenders"


@dataclass(frozen=True, slots=True)
class Link:
    """A rate to give to the cards of the cluster; None: unshaped. given: as the cluster has them."""

    rate_bps: float | None
    given: bool = False


def run(cluster_name: str | None = None, options: Mapping[str, Any] | None = None) -> Rows:
    """A row for each method, link and seed, then one for each bar; link_bps is None where cards are not shaped."""
    told = take(options or {}, DEFAULTS)
    cluster = load_cluster(cluster_name) if cluster_name else None
    methods, seeds, links = _methods(told), _seeds(told["seeds"]), find_links(told["links"], cluster)
    settings = {
        "base": _base(told),
        "seeds": seeds,
        "timeout_s": TIMEOUT_S,
        **{key: told[key] for key in ("fused", "turns", "turn_s")},
        "curve": _curve(told),
    }
    ranks = told["ranks"] if cluster is None else cluster.world_size
    keys = {f"{one.name} {seed}": key_of(one, seed, ranks, settings["curve"]) for seed in seeds for one in methods}
    settings["keys"] = keys
    timed: dict[Link, dict[str, dict[str, Any]]] = {link: {} for link in links}
    with tempfile.TemporaryDirectory(prefix="thinwire-") as folder:
        path = Path(told["learned"] or f"{folder}/learned").resolve()
        settings["learned"] = str(path)
        for launch_methods in launches(methods):
            if cluster is None:
                timed[links[0]] |= _beside_silence(_on_loopback("time,learn", ranks, launch_methods, settings))
                continue
            for link in links:
                timed[link] |= _beside_silence(_in_lab(cluster, link, launch_methods, settings))
            _on_loopback("learn", ranks, launch_methods, settings)
        there = kept(path)
    learned = [there[key] for key in keys.values()]
    rows = [_row(timed[link], link, one) for link in links for one in learned]
    if told["target"]:
        unshaped = next((timed[link] for link in links if link.rate_bps is None), None)
        unshaped_s = median(unshaped[UNCOMPRESSED[0]]["step_s"]) if unshaped and UNCOMPRESSED[0] in unshaped else None
        add_targets(rows, learned, told["target"], UNCOMPRESSED[0], unshaped_s)
    others = {method.name for method in methods if method.hook is not None or method.package}
    needed = rate_rows(rows, _predicted(cluster, methods, told)) if cluster is not None and len(links) > 2 else []
    return rows + bar_rows(rows) + target_rows(rows, others) + needed


def _curve(told: Mapping[str, Any]) -> list[int]:
    """Steps after which the held-out loss is taken. For a target: from half of its steps on."""
    steps = told["steps"]
    every, first = told["curve_every"], 1
    if told["target"] and not every:
        every, first = max(1, steps // POINTS), max(1, int(told["target"] * steps / 2))
    return [step for step in range(first, steps + 1) if step % every == 0] if every else []


def _predicted(cluster: Cluster, methods: Sequence[Method], told: Mapping[str, Any]) -> dict[str, Callable[[float], float]]:
    """For each method of ours: utilisation by the cost model, of the rate of the cards, compute as declared."""
    found: dict[str, Callable[[float], float]] = {}
    rates = tuple(rate.value for rank in range(cluster.world_size) if (rate := cluster.device_of(rank).flops_per_s) is not None)
    for method in methods:
        if method.hook or method.package or len(rates) < cluster.world_size:
            continue
        config, size = method.config, cluster.world_size
        layout = Layout(outer=size) if config.sync.rare else Layout(data=size)
        workload = Workload.of_transformer(config.model.shape(), config.train.micro_batch, config.train.sequence)
        transfers = make_synchroniser(config.sync, config.compress, layout, Ledger()).traffic(workload, layout)

        def utilisation(
            rate_bps: float, layout: Layout = layout, workload: Workload = workload, transfers: Sequence[Transfer] = transfers
        ) -> float:
            there = shaped(cluster, Link(rate_bps))
            setting = Setting(
                cluster=there, layout=layout, workload=workload, micro_batches=told["accumulate"], flops_per_s=rates
            )
            prediction = predict(setting, transfers)
            return (prediction.step_s - prediction.exposed_s) / prediction.step_s

        found[method.name] = utilisation
    return found


def find_links(wanted: Sequence[Any], cluster: Cluster | None) -> list[Link]:
    """["1 Mbit/s", "unshaped"] -> links; none wanted: the cluster as it is, called by its slowest link."""
    if not wanted:
        rates = [link.bandwidth_bps.value for link in cluster.links] if cluster else []
        return [Link(min(rates, default=None), given=True)]
    if cluster is None:
        raise UserError("links: the lab shapes the cards of a cluster; name one with --cluster")
    links = [Link(None if name == UNSHAPED else parse(name, "bit/s")) for name in wanted]
    for name, link in zip(wanted, links, strict=True):
        if link.rate_bps is not None and link.rate_bps < SLOWEST_BPS:
            raise UserError(f"links: {name} is {link.rate_bps:g} bit/s, too slow for the lab; name the unit, e.g. {name} Mbit/s")
    if len(set(links)) < len(links):
        raise UserError(f"links = {list(wanted)}: name each once")
    return links


def shaped(cluster: Cluster, link: Link) -> Cluster:
    """`cluster` with all its cards, not the cables between switches, at the rate of `link`."""
    if link.given:
        return cluster
    rate = Quantity(link.rate_bps or UNSHAPED_BPS)
    hosts = {host.name for host in cluster.hosts}
    links = [replace(cable, bandwidth_bps=rate) if hosts & {cable.source, cable.target} else cable for cable in cluster.links]
    return Cluster(name=cluster.name, hosts=cluster.hosts, switches=cluster.switches, links=tuple(links), ranks=cluster.ranks)


def _base(told: Mapping[str, Any]) -> dict[str, Any]:
    """The sections of run.toml that all methods share."""
    train = ("sequence", "micro_batch", "steps", "learning_rate", "warmup_steps", "eval_tokens")
    return {
        "model": {"preset": told["preset"], **told["model"]},
        "collectives": {"kind": told["collectives"]},
        "sync": {"accumulate": told["accumulate"], "bucket_bytes": told["bucket_bytes"]},
        "train": {key: told[key] for key in train} | {"dtype": "float32"},
    }


def _methods(told: Mapping[str, Any]) -> list[Method]:
    """Checked here, so that what is wrong is said before anything is started."""
    names = list(told["methods"])
    if not names or len(set(names)) < len(names):
        raise UserError(f"methods = {names}: name one or more, each once")
    methods = [make_method(name, _base(told), fused=told["fused"]) for name in names]
    check(methods)
    return methods


def _seeds(wanted: int | Sequence[int]) -> list[int]:
    seeds = list(range(wanted)) if isinstance(wanted, int) else list(wanted)
    if not seeds:
        raise UserError(f"seeds = {wanted}: give how many, one or more, or a list of them")
    return seeds


def _command(phases: str, results: str, progress: Path, methods: Sequence[Method], settings: Mapping[str, Any]) -> list[str]:
    told = {**settings, "methods": [method.name for method in methods], "progress": str(progress)}
    return [*prefix(methods), sys.executable, "-m", SCRIPT, phases, results, json.dumps(told)]


def _on_loopback(phases: str, ranks: int, methods: Sequence[Method], settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """{method: lists over the turns} if `time` is among the phases."""
    with tempfile.TemporaryDirectory(prefix="thinwire-") as folder:
        progress = Path(folder) / "progress"
        with shown(progress, "loopback"):
            run_local([_command(phases, folder, progress, methods, settings)], ranks, PATIENCE_S)
        timed = Path(folder) / "time.json"
        found: dict[str, dict[str, Any]] = json.loads(timed.read_text()) if timed.exists() else {}
        return found


def _in_lab(cluster: Cluster, link: Link, methods: Sequence[Method], settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """{method: lists over the turns}."""
    lab_cluster = shaped(cluster, link)
    with tempfile.TemporaryDirectory(prefix="thinwire-") as folder:
        progress = Path(folder) / "progress"
        processes = processes_for(lab_cluster, _command("time", RESULTS, progress, methods, settings))
        with shown(progress, show(link.rate_bps, "bit/s") if link.rate_bps else UNSHAPED):
            lab = launch(lab_cluster, processes, LabOptions())
    if lab.failure:
        raise UserError(lab.failure)
    found: dict[str, dict[str, Any]] = json.loads(lab.results["time.json"])
    return found


def _beside_silence(timed: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """What was measured of each method, with the step without any exchange from the same start."""
    silent = median(timed[NO_EXCHANGE]["step_s"])
    return {name: {**mine, "no_exchange_step_s": silent} for name, mine in timed.items() if name != NO_EXCHANGE}


def _row(timed: Mapping[str, Mapping[str, Any]], link: Link, learned: Mapping[str, Any]) -> dict[str, Any]:
    name = learned["method"]
    mine = timed[name]
    silent = mine["no_exchange_step_s"]
    step_s, turns = median(mine["step_s"]), sorted(mine["step_s"])
    quarter = len(turns) // 4
    return {
        "case": "measured",
        "method": name,
        "link_bps": link.rate_bps,
        "seed": learned["seed"],
        "step_s": step_s,
        "spread": (turns[-1 - quarter] - turns[quarter]) / step_s,
        "no_exchange_step_s": silent,
        "utilisation": silent / step_s,
        "processor_s": median(mine["processor_s"]),
        "wait_s": median(mine["wait_s"]) if mine["wait_s"] else None,
        "late": mine["late"],
        "wire_bytes_per_step": learned["wire_bytes_per_step"],
        "card_bytes_per_step": median(mine["card_bytes"]) or None,
        "heldout_loss": learned["heldout_loss"],
        "weights_apart": learned["weights_apart"],
        "torn": max(mine["torn"], learned["torn"]),
    }
