"""Methods to synchronise gradients, PyTorch's own and ours, on one model in one run: seconds of a step, bytes, held-out loss.

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

With three links or more a table has the rate that each method needs; with `target`, a part of data parallelism's tokens, each row
has the time to the loss that it has then (`sync_rows`). `learned` names a file that keeps what was learned for later runs.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from thinwire.bench.collectives import with_rates
from thinwire.bench.ddp import quartiles
from thinwire.bench.ranks import run_script
from thinwire.bench.registry import Rows
from thinwire.bench.sync_methods import Method, check_packages, kept, key_of, launches, make_method
from thinwire.bench.sync_rows import UNCOMPRESSED, add_targets, bar_rows, rate_rows, target_rows
from thinwire.cluster import Cluster, load_cluster
from thinwire.collectives.ledger import Ledger
from thinwire.config.data import STDLIB
from thinwire.errors import UserError
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
    "data": STDLIB,
    "model": {"layers": 8},
    "dtype": "float32",
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
"""The slowest and the fastest rate that a lab takes; no card of it gets to the latter."""
TIMEOUT_S, RUN_TIMEOUT_S = 1800.0, 4 * 3600.0
POINTS = 20
"""Of the curve of a whole run, where a target is wanted."""
NO_EXCHANGE = "no exchange"
QUIET = ("env", "HIVEMIND_LOGLEVEL=CRITICAL", "RUST_LOG=error", "PYTHONWARNINGS=ignore")
"""hivemind reports the end of its helpers as errors, torchft each exchange; both would hide the line about what failed."""
Timed = dict[str, dict[str, Any]]
"""{method: lists over the turns}."""


@dataclass(frozen=True, slots=True)
class Link:
    """A rate to give to the cards of the cluster; None: unshaped. given: as the cluster has them."""

    rate_bps: float | None
    given: bool = False


def run(cluster_name: str | None, options: Mapping[str, Any]) -> Rows:
    """A row for each method, link and seed, then one for each bar; link_bps is None where cards are not shaped."""
    cluster = load_cluster(cluster_name) if cluster_name else None
    methods, links = make_methods(options), find_links(options["links"], cluster)
    ranks = cluster.world_size if cluster else options["ranks"]
    settings = {**_shared(options), "learned": options["learned"]}
    timed, learned = compare(cluster or ranks, methods, links, settings)
    rows = [_row(timed[link][one["method"]], link, one) for link in links for one in learned]
    if options["target"]:
        unshaped = next((timed[link] for link in links if link.rate_bps is None), {}).get(UNCOMPRESSED[0])
        unshaped_s = median(unshaped["step_s"]) if unshaped else None
        add_targets(rows, learned, options["target"], UNCOMPRESSED[0], unshaped_s)
    others = {method.name for method in methods if method.hook is not None or method.package}
    needed = rate_rows(rows, _predicted(cluster, methods, options)) if cluster is not None and len(links) > 2 else []
    return rows + bar_rows(rows) + target_rows(rows, others) + needed


def compare(
    where: Cluster | int, methods: Sequence[Method], links: Sequence[Link], settings: Mapping[str, Any]
) -> tuple[dict[Link, Timed], list[dict[str, Any]]]:
    """What was timed on each link, one on loopback, and what each method has learned with each seed.

    settings: base, the sections of the run that all share; seeds; curve, steps after which the held-out part is scored; fused,
    turns, turn_s and learned as in DEFAULTS.
    """
    ranks = where if isinstance(where, int) else where.world_size
    timed: dict[Link, Timed] = {link: {} for link in links}
    with tempfile.TemporaryDirectory(prefix="thinwire-") as folder:
        settings = _keyed(methods, settings, ranks, Path(settings["learned"] or f"{folder}/learned").resolve())
        for launch_methods in launches(methods):
            if isinstance(where, int):
                timed[links[0]] |= _run(where, "loopback", ["time", "learn"], launch_methods, settings)
                continue
            for link in links:
                title = show(link.rate_bps, "bit/s") if link.rate_bps else UNSHAPED
                timed[link] |= _run(shaped(where, link), title, ["time"], launch_methods, settings)
            _run(ranks, "loopback", ["learn"], launch_methods, settings)
        return timed, _learned(settings)


def learn(methods: Sequence[Method], options: Mapping[str, Any], path: Path) -> list[dict[str, Any]]:
    """What every method has learned with every seed, on ranks of loopback: from the file, or now, and kept there."""
    settings = _keyed(methods, _shared(options), options["ranks"], path)
    known = kept(path)
    for launch_methods in launches(methods):
        if any(settings["keys"][f"{one.name} {seed}"] not in known for seed in settings["seeds"] for one in launch_methods):
            _run(options["ranks"], "loopback", ["learn"], launch_methods, settings)
    return _learned(settings)


def _shared(options: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that all methods share, but for the file of what is learned."""
    settings = {key: options[key] for key in ("fused", "turns", "turn_s")}
    return settings | {"base": _base(options), "seeds": _seeds(options["seeds"]), "curve": _curve(options)}


def _keyed(methods: Sequence[Method], settings: Mapping[str, Any], ranks: int, path: Path) -> dict[str, Any]:
    """Of the ranks' script. path: of the file that keeps what was learned."""
    curve = settings["curve"]
    keys = {f"{one.name} {seed}": key_of(one, seed, ranks, curve) for seed in settings["seeds"] for one in methods}
    return {**settings, "keys": keys, "timeout_s": TIMEOUT_S, "learned": str(path)}


def _learned(settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    known = kept(Path(settings["learned"]))
    return [known[key] for key in settings["keys"].values()]


def _run(where: Cluster | int, title: str, phases: list[str], methods: Sequence[Method], settings: Mapping[str, Any]) -> Timed:
    """What was measured of each method, with the step without any exchange from the same start; nothing without phase `time`."""
    names = [method.name for method in methods]
    foreign = any(method.package for method in methods)
    settings = {**settings, "methods": names, "phases": phases, "alone": ", ".join(names) if foreign else ""}
    prefix = QUIET if foreign else ()
    done = run_script(where, "sync_contenders", settings, title=title, prefix=prefix, timeout_s=RUN_TIMEOUT_S)
    timed: Timed = done.results.get("sync_contenders", {})
    silent_s = median(timed.pop(NO_EXCHANGE)["step_s"]) if timed else 0.0
    return {name: {**mine, "no_exchange_step_s": silent_s} for name, mine in timed.items()}


def _curve(options: Mapping[str, Any]) -> list[int]:
    """Steps after which the held-out loss is taken. For a target: from half of its steps on."""
    steps, every, first = options["steps"], options["curve_every"], 1
    if options["target"] and not every:
        every, first = max(1, steps // POINTS), max(1, int(options["target"] * steps / 2))
    return [step for step in range(first, steps + 1) if step % every == 0] if every else []


def _predicted(cluster: Cluster, methods: Sequence[Method], options: Mapping[str, Any]) -> dict[str, Callable[[float], float]]:
    """For each method of ours: utilisation by the cost model, of the rate of the cards, compute as declared."""

    def utilisation(setting: Setting, transfers: Sequence[Transfer], rate_bps: float) -> float:
        prediction = predict(replace(setting, cluster=shaped(cluster, Link(rate_bps))), transfers)
        return (prediction.step_s - prediction.exposed_s) / prediction.step_s

    found: dict[str, Callable[[float], float]] = {}
    for method in methods:
        if cluster.declared_rates and not method.hook and not method.package:
            config = method.config
            workload = Workload.of_transformer(config.model.shape(), config.train.micro_batch, config.train.sequence)
            found[method.name] = partial(utilisation, *setting_of(method, workload, cluster))
    return found


def setting_of(method: Method, workload: Workload, cluster: Cluster) -> tuple[Setting, list[Transfer]]:
    """Of a method of ours, or of plain DDP, for `predict`. workload: of one of its micro-batches."""
    rates, size, config = cluster.declared_rates, cluster.world_size, method.config
    assert rates is not None, "by which compute is paced"
    layout = Layout(outer=size) if config.sync.rare else Layout(data=size)
    transfers = make_synchroniser(config.sync, config.compress, layout, Ledger()).traffic(workload, layout)
    micro = config.sync.accumulate
    return Setting(cluster=cluster, layout=layout, workload=workload, micro_batches=micro, flops_per_s=rates), transfers


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
    rate_bps = link.rate_bps or UNSHAPED_BPS
    hosts = {host.name for host in cluster.hosts}
    if link.given:
        return cluster
    return with_rates(cluster, lambda cable: rate_bps if hosts & {cable.source, cable.target} else cable.bandwidth_bps.value)


def _base(options: Mapping[str, Any]) -> dict[str, Any]:
    """The sections of run.toml that all methods share."""
    train = ("sequence", "micro_batch", "steps", "learning_rate", "warmup_steps", "eval_tokens")
    return {
        "model": {"preset": options["preset"], "dtype": options["dtype"], **options["model"]},
        "data": {"source": options["data"]},
        "collectives": {"kind": options["collectives"]},
        "sync": {key: options[key] for key in ("accumulate", "bucket_bytes")},
        "train": {key: options[key] for key in train} | ({"dtype": "float32"} if options["dtype"] == "float32" else {}),
    }


def make_methods(options: Mapping[str, Any]) -> list[Method]:
    """Checked here, so that what is wrong is reported before anything is started."""
    names = list(options["methods"])
    if not names or len(set(names)) < len(names):
        raise UserError(f"methods = {names}: name one or more, each once")
    methods = [make_method(name, _base(options), fused=options["fused"]) for name in names]
    check_packages(methods)
    return methods


def _seeds(wanted: int | Sequence[int]) -> list[int]:
    seeds = list(range(wanted)) if isinstance(wanted, int) else list(wanted)
    if not seeds:
        raise UserError(f"seeds = {wanted}: give how many, one or more, or a list of them")
    return seeds


def _row(timed: Mapping[str, Any], link: Link, learned: Mapping[str, Any]) -> dict[str, Any]:
    step_s, (low_s, high_s) = median(timed["step_s"]), quartiles(timed["step_s"])
    return {
        "case": "measured",
        "method": learned["method"],
        "link_bps": link.rate_bps,
        "seed": learned["seed"],
        "step_s": step_s,
        "spread": (high_s - low_s) / step_s,
        "no_exchange_step_s": timed["no_exchange_step_s"],
        "utilisation": timed["no_exchange_step_s"] / step_s,
        "processor_s": median(timed["processor_s"]),
        "wait_s": median(timed["wait_s"]) if timed["wait_s"] else None,
        "late": timed["late"],
        "wire_bytes_per_step": learned["wire_bytes_per_step"],
        "card_bytes_per_step": median(timed["card_bytes"]) or None,
        "heldout_loss": learned["heldout_loss"],
        "weights_apart": learned["weights_apart"],
        "torn": max(timed["torn"], learned["torn"]),
    }
