"""Bytes against steps: what each method sends for a token, and how many steps it needs to the loss that data parallelism has.

Every method learns on loopback, unpaced, as in `thinwire bench sync`, by the same names and options; `learned` names the file
that keeps the curves, so that a comparison that takes hours goes on where it was stopped. A row a method, means over the seeds:

    wire_bytes_per_token   by the ledger, in the run that got to the target: bytes that a rank sends / tokens of all replicas
    steps_over_ddp         steps to the held-out loss that `ddp` has at the part `target` of its tokens, over those of `ddp`
    final_loss_ratio       held-out loss after as many tokens as `ddp` has had / that of `ddp`
    on_front               whether no other method sends as little and needs as few steps

A seed that does not get to the target with as many steps as `ddp` trains once more, with the first of `longer` times as many and
a schedule of the learning rate over all of them, then with the next; where none is enough, steps_over_ddp is not known.

`table` names a file for the rows as CSV, in the form of the front that comes along (`thinwire.sync.front`), `commit` what it says
of their origin; `picture` names one for an SVG.
"""

import csv
import io
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from thinwire.bench import sync
from thinwire.bench.registry import Rows
from thinwire.bench.sync_methods import Method
from thinwire.bench.sync_rows import UNCOMPRESSED, loss_at, steps_to
from thinwire.errors import UserError
from thinwire.report.scatter import Dot, scatter
from thinwire.sync.front import COLUMNS
from thinwire.workload import Workload

TIMED = ("turns", "turn_s", "links", "collectives", "curve_every")
"""Options of `sync` that are about seconds."""
TUNED = "overlap1-layers1-outer100-momentum0-rate130"
DEFAULTS: Mapping[str, Any] = {
    **{key: value for key, value in sync.DEFAULTS.items() if key not in TIMED},
    "methods": [
        *("ddp", "bf16", "int8", "int4", "int4-all", "powersgd4"),
        "streaming1-overlap0-layers1-outer100-momentum0-int4-all",
        *(f"streaming2-overlap1-layers1-outer100-momentum0-mixing75-rate130-{code}-all" for code in ("int8", "int4")),
        *(f"streaming{every}-{TUNED}-{code}-all" for every in (5, 10) for code in ("int8", "int4")),
        f"streaming10-{TUNED}-first60x2-int4-all",
        *("streaming30-layers1-int4-all", "diloco10-int4-all", "diloco30-int4-all"),
        *("sparseloco15", "sparseloco30", "muloco30-int4", "noloco30"),
    ],
    "model": {"layers": 2},
    "micro_batch": 8,
    "steps": 240,
    "learning_rate": 3e-3,
    "eval_tokens": 16_384,
    "target": 0.8,
    "longer": [2, 4],
    "table": "",
    "picture": "",
    "commit": "",
}
REFERENCE = UNCOMPRESSED[0]
TUNING = re.compile(r"-(overlap|layers|outer|momentum|mixing|rate)\d+")


def run(cluster_name: str | None, options: Mapping[str, Any]) -> Rows:
    """A row a method. UserError for a cluster, or without `ddp`."""
    if cluster_name:
        raise UserError("bench front learns on loopback, since results do not depend on the wire; leave --cluster out")
    options = {**{key: sync.DEFAULTS[key] for key in TIMED}, **options}
    if REFERENCE not in options["methods"] or not 0 < options["target"] < 1 or any(times <= 1 for times in options["longer"]):
        raise UserError(
            f"bench front compares with {REFERENCE}, which methods must name, at a target between 0 and 1, not "
            f"{options['target']:g}, and goes on with more steps, not {options['longer']} times as many"
        )
    methods = sync.make_methods(options)
    with tempfile.TemporaryDirectory(prefix="thinwire-") as folder:
        path = Path(options["learned"] or f"{folder}/learned").resolve()
        once = _by_method(sync.learn(methods, options, path))
        there = {name: list(learned) for name, learned in once.items()}
        found = {name: steps_over(learned, once[REFERENCE], options["target"]) for name, learned in once.items()}
        for times in options["longer"]:
            slow = [name for name, over in found.items() if None in over]
            more = {**options, "methods": slow, "steps": round(options["steps"] * times)}
            more["target"] = options["target"] / times  # so curves begin where they do for the others
            learned = _by_method(sync.learn(sync.make_methods(more), more, path)) if slow else {}
            for name, mine in learned.items():
                for place, over in enumerate(steps_over(mine, once[REFERENCE], options["target"])):
                    if found[name][place] is None and over is not None:
                        found[name][place], there[name][place] = over, mine[place]
    rows = marked([_row(one, once, there[one.name], found[one.name], options) for one in methods])
    if options["table"]:
        Path(options["table"]).write_text(as_table(rows), encoding="utf-8")
    if options["picture"]:
        Path(options["picture"]).write_text(picture(rows), encoding="utf-8")
    return [{key: value for key, value in row.items() if key not in ("run", "learning_rate_percent", "commit")} for row in rows]


def steps_over(learned: Sequence[Mapping[str, Any]], reference: Sequence[Mapping[str, Any]], part: float) -> list[float | None]:
    """Of each seed; None for one that does not get there."""
    ratios: list[float | None] = []
    for mine, base in zip(learned, reference, strict=True):
        target = loss_at(base["curve"], part * base["curve"][-1][0])
        steps, best = steps_to(mine["curve"], target), steps_to(base["curve"], target)
        ratios.append(None if steps is None or best is None else steps / best)
    return ratios


def marked(rows: Rows) -> Rows:
    """With `on_front`: of rows whose bytes and steps are known."""
    points = {row["method"]: (row["wire_bytes_per_token"], row["steps_over_ddp"]) for row in rows}
    known = [point for point in points.values() if None not in point]

    def beaten(mine: tuple[float, float]) -> bool:
        return any(other != mine and other[0] <= mine[0] and other[1] <= mine[1] for other in known)

    return [{**row, "on_front": None not in points[row["method"]] and not beaten(points[row["method"]])} for row in rows]


def as_table(rows: Rows) -> str:
    """CSV, of the methods that a run.toml can have."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        if row["run"]:
            writer.writerow({key: f"{value:.5g}" if isinstance(value, float) else value for key, value in row.items()})
    return text.getvalue()


def picture(rows: Rows) -> str:
    """SVG, with names without the settings of outer steps."""
    known = [row for row in rows if row["steps_over_ddp"] is not None and row["wire_bytes_per_token"]]
    dots = [
        Dot(TUNING.sub("", row["method"]), row["wire_bytes_per_token"], row["steps_over_ddp"], row["on_front"]) for row in known
    ]
    first = rows[0]
    about = f"{first['parameters']:,} parameters, {first['replicas']} replicas, {first['steps']} steps, seeds: {first['seeds']}"
    return scatter(dots, f"bytes against steps: {about}", "bytes that a rank sends for a token", "steps over data parallelism's")


def _by_method(learned: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    found: dict[str, list[Mapping[str, Any]]] = {}
    for one in learned:
        found.setdefault(one["method"], []).append(one)
    return found


def _row(
    method: Method,
    learned: Mapping[str, Sequence[Mapping[str, Any]]],
    there: Sequence[Mapping[str, Any]],
    over: Sequence[float | None],
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """learned: with as many steps as data parallelism; there: of each seed by the run that got to the target; over: its steps."""
    train, mine = method.config.train, learned[method.name]
    tokens = options["ranks"] * options["micro_batch"] * options["sequence"] * options["accumulate"]
    sent, known = [one["wire_bytes_per_step"] for one in there], [one for one in over if one is not None]
    return {
        "case": "measured",
        "method": method.name,
        "wire_bytes_per_token": mean(sent) / tokens if None not in sent else None,
        "steps_over_ddp": mean(known) if len(known) == len(over) else None,
        "final_loss_ratio": mean(one["heldout_loss"] for one in mine) / mean(one["heldout_loss"] for one in learned[REFERENCE]),
        "parameters": Workload.of_transformer(method.config.model.shape(), 1, train.sequence).num_parameters,
        "replicas": options["ranks"],
        "steps": options["steps"],
        "seeds": len(mine),
        "data": str(method.config.data),
        "run": settings(method, options) if not (method.hook or method.package) else "",
        "learning_rate_percent": 100 * train.learning_rate / options["learning_rate"],
        "commit": options["commit"],
    }


def settings(method: Method, options: Mapping[str, Any]) -> str:
    """What belongs to the method, as an inline table of TOML: {sync.kind = 'int4', ..}."""
    sync_section, compress = method.config.sync, method.config.compress
    shared = {"accumulate": options["accumulate"], "bucket_bytes": options["bucket_bytes"]}
    found = {f"sync.{key}": value for key, value in sync_section.model_dump(exclude_defaults=True).items()}
    found = {key: value for key, value in found.items() if shared.get(key.removeprefix("sync.")) != value}
    found |= {"sync.kind": sync_section.kind, "compress.kind": compress.kind}
    if sync_section.rare:
        found["sync.every"] = sync_section.model_dump()["every"]
    found |= {f"compress.{key}": value for key, value in compress.model_dump(exclude_defaults=True).items()}
    if method.config.train.optimizer.kind != "adamw":
        found["train.optimizer.kind"] = method.config.train.optimizer.kind
    return f"{{{', '.join(f'{key} = {_toml(value)}' for key, value in sorted(found.items()))}}}"


def _toml(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, value))}]"
    return str(value).lower() if isinstance(value, bool) else f"'{value}'" if isinstance(value, str) else repr(value)
