"""Every layout gives the losses of one rank: all mixtures that fit on 1, 2, 4 and 8 ranks, every schedule, in float64.

Loopback, 20 steps of AdamW with clipping on the same tokens. A pipeline of p ranks has a model of 2 p - 2 layers, which makes two
stages for each, and 2 p micro-batches a step and replica: as few as every schedule takes. What `run.toml` refuses is left out.
Models of experts have a capacity at which some choices find no slot. `error` is the largest relative difference of the loss of a
step from that of one rank with the whole model; the bar is 1e-9. Rare exchange must be equal in one case only, which is there
too: local SGD that averages after each step, under plain SGD. Each task of the catalogue shares its states over two ranks, on the
data of its example (`tasks`: kinds). `--set ranks=4` takes a part. With `--json` rows are kept there after every few, and go on.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from math import prod
from typing import Any

from thinwire.bench.applications import example_of
from thinwire.bench.kept import keep_rows, kept_rows
from thinwire.bench.ranks import run_script
from thinwire.bench.registry import Rows
from thinwire.config.pipeline import STAGES_PER_RANK
from thinwire.config.run import RunConfig
from thinwire.errors import UserError
from thinwire.layout import AXES, Layout
from thinwire.parallel.balance import shares_tied
from thinwire.tasks.catalogue import CATALOGUE
from thinwire.tomlfile import validate

DEFAULTS: Mapping[str, Any] = {"ranks": [1, 2, 4, 8], "steps": 20, "tasks": list(CATALOGUE), "json": ""}
"""json: where rows are kept after each start of the ranks, and rows are that need not be made again."""
AT_ONCE = 12
"""Cases of one start of the ranks."""
BAR = 1e-9
DEGREES = (1, 2, 4, 8)
TRAIN = {"micro_batch": 1, "sequence": 16, "learning_rate": 1e-2, "warmup_steps": 2, "eval_tokens": 256}
MODEL = {"width": 16, "heads": 8, "context": 16, "dtype": "float64", "init_std": 0.1}
EXPERTS = {"experts": 8, "capacity": 1.0}
PLAIN = {"clip": 0, "optimizer": {"kind": "sgd", "momentum": 0.0}}
"""Clipping is not linear, so replicas that differ go without."""
TIMEOUT_S = 7200.0


def run(cluster_name: str | None, options: Mapping[str, Any]) -> Rows:
    """A row a layout and schedule. No cluster is used."""
    counts = options["ranks"] if isinstance(options["ranks"], list) else [options["ranks"]]
    rows, steps = kept_rows(options["json"]), options["steps"]
    for ranks in counts:
        cases = [*_cases(ranks, steps), *_task_cases(ranks, steps, options["tasks"])]
        if not cases:
            raise UserError(f"ranks = {ranks}: there are layouts of {', '.join(map(str, DEGREES))} ranks; take some of these")
        known = {row["case"] for row in rows if (row["ranks"], row["steps"]) == (ranks, steps)}
        missing = [case for case in cases if case["name"] not in known]
        for first in range(0, len(missing), AT_ONCE):
            rows += _compared(missing[first : first + AT_ONCE], ranks, steps)
            keep_rows(options["json"], "equality", rows)
    return rows


def _compared(cases: Sequence[Mapping[str, Any]], ranks: int, steps: int) -> Rows:
    """A row for each case."""
    title = f"{ranks} rank{'s' * (ranks > 1)}"
    found = run_script(ranks, "layout_equality", {"cases": cases}, title=title, timeout_s=TIMEOUT_S)
    errors = found.results["layout_equality"]
    return [
        {
            "case": case["name"],
            "ranks": ranks,
            "steps": steps,
            "layout": str(Layout(**case["layout"])),
            "schedule": case["schedule"],
            "task": case.get("task", ""),
            "error": errors[case["name"]],
            "bar": BAR,
            "held": errors[case["name"]] <= BAR,
        }
        for case in cases
    ]


def _cases(ranks: int, steps: int) -> Iterator[dict[str, Any]]:
    """Names, degrees, and run.toml of the layout and of one rank, as far as they are not refused."""
    for degrees in product(DEGREES, repeat=len(AXES)):
        used = dict(zip(AXES, degrees, strict=True))
        if prod(degrees) != ranks:
            continue
        pipe = used["pipe"]
        for schedule in STAGES_PER_RANK if pipe > 1 else ("",):
            for reshard in ("always", "never") if used["shard"] > 1 and pipe == 1 else ("",):
                if (case := _case(used, schedule, reshard, steps)) is not None:
                    yield case


def _case(used: Mapping[str, int], schedule: str, reshard: str, steps: int) -> dict[str, Any] | None:
    layout, pipe, rare = Layout(**used), used["pipe"], used["outer"] > 1
    model = MODEL | {"layers": max(2, 2 * pipe - 2)} | (EXPERTS if used["expert"] > 1 else {})
    train = TRAIN | {"steps": steps} | (PLAIN if rare else {})
    count = 2 * pipe
    run: dict[str, Any] = {"train": train, "model": model, "layout": used}
    run["sync"] = {"accumulate": count, **({"kind": "local_sgd", "every": 1} if rare else {})}
    if schedule:
        run["pipeline"] = {"schedule": schedule}
    if reshard:
        run["sharded"] = {"reshard": reshard}
    try:
        config = validate(RunConfig, run, "a layout")
    except UserError:
        return None
    if pipe > 1:
        model["tied"] = _may_be_tied(config, layout)
    return {
        "name": ", ".join(filter(None, (str(layout), schedule, reshard and f"reshard {reshard}"))),
        "layout": used,
        "schedule": schedule,
        "run": run,
        "alone": {"train": train, "model": model, "sync": {"accumulate": count * layout.replicas}},
    }


def _task_cases(ranks: int, steps: int, kinds: Sequence[str]) -> Iterator[dict[str, Any]]:
    """As `_cases`, of tasks."""
    if ranks not in (2, 4):
        return
    layout = {"shard": 2, "data": ranks // 2}
    for kind in kinds:
        train = {"sequence": example_of(kind).train.sequence, "steps": steps, "micro_batch": 4, "learning_rate": 1e-3}
        shared = {"task": {"kind": kind}, "model": {"dtype": "float64"}, "train": train}
        yield {
            "name": f"{kind}, {Layout(**layout)}",
            "task": kind,
            "layout": layout,
            "schedule": "",
            "run": {**shared, "layout": layout},
            "alone": {**shared, "sync": {"accumulate": ranks}},
        }


def _may_be_tied(config: RunConfig, layout: Layout) -> bool:
    """Whether the first and the last stage may share the embedding."""
    try:
        shares_tied(config.compress, layout)
    except UserError:
        return False
    return True
