"""Each task of the catalogue over thin links: plain DDP, codes in each step, rare exchange; score, seconds to it, bytes.

A task is examples/KIND.toml, the batch of its two ranks shared out to those of the cluster, for at most so many steps as BUDGETS
says. Learning and time are taken as `bench sync` does it: on loopback and unpaced, all methods on the same examples; in the lab
paced, in turns; without a cluster on loopback, and then times say nothing.

    score              on the held-out part, after as many examples for each method
    seconds_to_score   steps to a score at most 1 % (relative) short of what DDP has in the end, between two of QUARTERS on a
                       straight line, times step_s; none if that is never reached
    waits              1 - step without any exchange / step

Bars: a score beats its baseline by the task's margin; that of other methods is at most 1 % (relative) short of DDP's; where DDP
waits more than half of its step at 10 Mbit/s, int4 comes to the score at least 3 x as soon.

`tasks`: kinds, none for all. `json`: where rows are kept after each task; a task of which there are rows of as many steps for all
methods and links is not run again, and what a method has learned is kept beside it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from statistics import median
from typing import Any

from thinwire.bench.kept import keep_rows, kept_rows
from thinwire.bench.registry import Rows
from thinwire.bench.sync import Link, Timed, compare, find_links, setting_of, shaped
from thinwire.bench.sync_methods import make_method
from thinwire.bench.sync_rows import steps_to
from thinwire.cluster import Cluster, load_cluster
from thinwire.config.run import RunConfig, load_run
from thinwire.environment import read_environment
from thinwire.errors import UserError
from thinwire.layout import Layout
from thinwire.plan.cost import predict, ranks_per_core
from thinwire.record import Scored
from thinwire.tasks.catalogue import CATALOGUE, make_task
from thinwire.units import show
from thinwire.workload import Workload

DEFAULTS: Mapping[str, Any] = {
    "tasks": [],
    "methods": ["ddp", "int4", "diloco10"],
    "links": [],
    "ranks": 4,
    "steps": 0,
    "turns": 3,
    "turn_s": 2.0,
    "json": "",
}
"""links: none for those of LINKS; ranks: without a cluster; steps: of all tasks in place of BUDGETS; 0: as there."""
LINKS = ("10 Mbit/s", "100 Mbit/s")
BUDGETS: Mapping[str, tuple[int, int]] = {
    "image_classification": (300, 4000),
    "intent_slots": (150, 500),
    "lm_lstm": (200, 500),
    "recommendation": (600, 2000),
    "segmentation": (600, 1000),
    "sentiment": (300, 2000),
    "speech": (800, 435),
    "summarisation": (600, 300),
    "translation": (600, 300),
}
"""By kind: steps, and held-out examples that are scored; of others what the example has, if that is less than `MOST_STEPS`."""
MOST_STEPS = 300
EXAMPLE_RANKS = 2
"""As many as an example starts where it does not say."""
QUARTERS = 4
DDP, CODED = "ddp", "int4"
SHORT, FASTER, WAITS, SLOW_BPS = 0.01, 3.0, 0.5, 10e6


@dataclass(frozen=True, kw_only=True)
class Application:
    """A task as it is raced. base: sections of the run that all methods share."""

    kind: str
    base: Mapping[str, Any]
    steps: int
    scored: Scored
    workload: Workload

    @property
    def curve(self) -> list[int]:
        """Steps after which it is scored, the last one apart."""
        return sorted({self.steps * part // QUARTERS for part in range(1, QUARTERS)} - {0})


def run(cluster_name: str | None, options: Mapping[str, Any]) -> Rows:
    """A row for each task, link and method, and one for each bar on seconds. UserError for what is not there, before any run."""
    cluster = load_cluster(cluster_name) if cluster_name else None
    if cluster is not None and cluster.declared_rates is None:
        raise UserError(f"{cluster.name} does not declare flops_per_s for all devices; compute is paced by it")
    kinds = options["tasks"] or list(CATALOGUE)
    links = find_links(options["links"] or (LINKS if cluster else ()), cluster)
    rows = [row for row in kept_rows(options["json"]) if row["case"] == "measured"]
    wanted = [kind for kind in kinds if not _has(rows, kind, links, options)]
    changes = {"steps": options["steps"]} if options["steps"] else {}
    ranks = cluster.world_size if cluster else options["ranks"]
    applications = [read_application(kind, ranks, changes) for kind in wanted]
    for application in applications:
        found = race(application, cluster or ranks, links, options)
        rows = [row for row in rows if row["task"] != application.kind] + found
        keep_rows(options["json"], "applications", rows)
    return rows + bars(rows)


def example_of(kind: str) -> RunConfig:
    """examples/KIND.toml: from the installed package, else from the checkout. UserError for an unknown kind."""
    if kind not in CATALOGUE:
        raise UserError(f"tasks: there is no {kind!r}; there are {', '.join(CATALOGUE)}")
    installed = Path(str(resources.files("thinwire"))) / "examples"
    folder = installed if installed.is_dir() else Path(__file__).parents[3] / "examples"
    return load_run(folder / f"{kind}.toml")


def read_application(kind: str, ranks: int, changes: Mapping[str, Any]) -> Application:
    """From its example, for so many ranks; changes: of [train]. UserError if its data are not there."""
    config = example_of(kind)
    most, scored = BUDGETS.get(kind, (MOST_STEPS, config.train.eval_tokens))
    train = {
        **config.model_dump(mode="json", include={"train": {"sequence", "learning_rate", "warmup_steps"}})["train"],
        "micro_batch": max(1, config.train.micro_batch * EXAMPLE_RANKS // ranks),
        "steps": min(config.train.steps, most),
        "eval_tokens": scored,
        **changes,
    }
    base = {"task": config.task.model_dump(exclude_defaults=True), "model": {"dtype": config.model.dtype}, "train": train}
    method = make_method(DDP, base)
    task = make_task(method.config, Layout(data=ranks), read_environment().cache_folder)
    described = Scored.model_validate(task.describe()["score"])
    return Application(kind=kind, base=base, steps=train["steps"], scored=described, workload=task.workload)


def _has(rows: Rows, kind: str, links: Sequence[Link], options: Mapping[str, Any]) -> bool:
    """Whether all that is wanted of a task is there; steps of BUDGETS may have changed since, which the rows tell."""
    known = {(row["method"], row["link_bps"]) for row in rows if row["task"] == kind and options["steps"] in (0, row["steps"])}
    return known >= {(method, link.rate_bps) for method in options["methods"] for link in links}


def race(application: Application, where: Cluster | int, links: Sequence[Link], options: Mapping[str, Any]) -> Rows:
    """A row for each link and method. options: methods, turns, turn_s and json as in DEFAULTS."""
    methods = [make_method(name, application.base) for name in options["methods"]]
    learned_path = str(Path(options["json"]).with_suffix(".learned")) if options["json"] else ""
    settings = {"turns": options["turns"], "turn_s": options["turn_s"], "learned": learned_path, "fused": False}
    settings |= {"base": application.base, "seeds": [0], "curve": application.curve}
    timed, learned = compare(where, methods, links, settings)
    scores = {one["method"]: one["scores"] for one in learned}
    rows = []
    for link in links:
        for method, one in zip(methods, learned, strict=True):
            row = _row(application, method.name, link, one, timed[link], scores.get(DDP))
            if isinstance(where, Cluster):
                setting, transfers = setting_of(method, application.workload, shaped(where, link))
                crowded = replace(setting, ranks_per_core=ranks_per_core(where.world_size))
                row["predicted_step_s"] = predict(crowded, transfers).step_s
            rows.append(row)
    return rows


def _row(
    application: Application,
    method: str,
    link: Link,
    learned: Mapping[str, Any],
    timed: Timed,
    of_ddp: Sequence[tuple[int, float]] | None,
) -> dict[str, Any]:
    """of_ddp: its scores, if it is there."""
    scored, mine, score = application.scored, timed[method], learned["scores"][-1][1]
    step_s = median(mine["step_s"])
    short = seconds = None
    if of_ddp is not None:
        last = of_ddp[-1][1]
        short = (last - score if scored.higher else score - last) / (abs(last) or 1.0)
        sign = -1.0 if scored.higher else 1.0  # fewer are better to `steps_to`
        steps = steps_to([(at, sign * one) for at, one in learned["scores"]], sign * last + SHORT * abs(last))
        seconds = None if steps is None else steps * step_s
    return {
        "case": "measured",
        "task": application.kind,
        "link_bps": link.rate_bps,
        "method": method,
        "steps": application.steps,
        "score": score,
        "unit": f"{scored.name}, {scored.unit}",
        "baseline": scored.baseline.score,
        "margin": scored.margin,
        "short_of_ddp": short,
        "step_s": step_s,
        "predicted_step_s": None,
        "waits": 1.0 - mine["no_exchange_step_s"] / step_s,
        "late": mine["late"],
        "wire_bytes_per_step": learned["wire_bytes_per_step"],
        "seconds_to_score": seconds,
        "held": scored.held(score) and (short is None or short <= SHORT),
    }


def bars(rows: Sequence[Mapping[str, Any]]) -> Rows:
    """How much sooner int4 comes to the score than DDP, where both were measured and come to it."""
    found: Rows = []
    by_case = {(row["task"], row["link_bps"], row["method"]): row for row in rows}
    for (task, link_bps, method), ddp in by_case.items():
        coded = by_case.get((task, link_bps, CODED))
        if method != DDP or coded is None:
            continue
        seconds = [row["seconds_to_score"] for row in (ddp, coded)]
        ratio = seconds[0] / seconds[1] if all(seconds) else None
        asked = link_bps == SLOW_BPS and ddp["waits"] > WAITS
        found.append(
            {
                "case": f"{CODED}: times as fast to the score as {DDP}",
                "task": task,
                "link": show(link_bps, "bit/s") if link_bps else "unshaped",
                "waits": ddp["waits"],
                "ratio": ratio,
                "bar": FASTER if asked else None,
                "held": not asked or (ratio is not None and ratio >= FASTER),
            }
        )
    return found
