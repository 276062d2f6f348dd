"""Every layout gives the losses of one rank: all mixtures that fit on 1, 2, 4 and 8 ranks, every schedule, in float64.

Loopback, 20 steps of AdamW with clipping on the same tokens; for p ranks a model of 2 p - 2 layers, which makes two stages for
each, and 2 p micro-batches a step, shared out to the replicas: as few as every schedule takes. Sequences are shared out on up to
4 ranks; expert ranks go with data, in a model of experts, some of whose choices find no slot. `error` is the largest relative
difference of the loss of a step from that of one rank with the whole model; the bar is 1e-9. Rare exchange must be equal in one
case only, which is there too: local SGD that averages after each step, under plain SGD.
"""

from collections.abc import Mapping
from itertools import product
from math import prod
from typing import Any

from thinwire.bench.ranks import run_script
from thinwire.bench.registry import Rows
from thinwire.config.pipeline import STAGES_PER_RANK
from thinwire.layout import AXES, Layout

DEFAULTS: Mapping[str, Any] = {"ranks": [1, 2, 4, 8], "steps": 20}
BAR = 1e-9
DEGREES = (1, 2, 4, 8)
EXPERTS = {"experts": 8, "capacity": 1.0}
SEQ_RANKS = 4
"""Up to which sequences are shared out: each layer then waits for its ring, for minutes a case where cores are few."""


def run(cluster_name: str | None, options: Mapping[str, Any]) -> Rows:
    """A row a layout and schedule. No cluster is used."""
    train = {
        "steps": options["steps"],
        "micro_batch": 1,
        "sequence": 16,
        "learning_rate": 1e-2,
        "warmup_steps": 2,
        "eval_tokens": 256,
    }
    rows: Rows = []
    for ranks in options["ranks"]:
        model = {"layers": max(2, 2 * ranks - 2), "width": 16, "heads": 8, "context": 16, "dtype": "float64", "init_std": 0.1}
        settings = {
            "run": {"train": train, "model": model},
            "experts": EXPERTS,
            "micro_batches": 2 * ranks,
            "cases": _cases(ranks),
        }
        errors = run_script(ranks, "layout_equality", settings, title=f"{ranks} ranks").results["layout_equality"]
        rows += [
            {"case": name, "ranks": ranks, "error": error, "bar": BAR, "held": error <= BAR} for name, error in errors.items()
        ]
    return rows


def _cases(ranks: int) -> list[dict[str, Any]]:
    """Names, degrees, and the sections of run.toml in which they differ from one rank."""
    cases = []
    for degrees in product(DEGREES, repeat=len(AXES)):
        used = dict(zip(AXES, degrees, strict=True))
        outer, pipe, seq = used["outer"], used["pipe"], used["seq"]
        if prod(degrees) != ranks or used["expert"] > 1 or (seq > 1 and ranks > SEQ_RANKS):
            continue
        if used["shard"] > 1 and max(seq, used["tensor"]) > 1:  # which do not go together
            continue
        reshards = ("always", "never") if used["shard"] > 1 and pipe == 1 else ("",)
        for schedule, reshard in product(STAGES_PER_RANK if pipe > 1 else ("",), reshards):
            name = " x ".join(f"{axis} {degree}" for axis, degree in used.items() if degree > 1) or "one rank"
            sections: dict[str, Any] = {}
            if outer > 1:
                sections["sync"] = {"kind": "local_sgd", "every": 1}
            if schedule:
                sections["pipeline"] = {"schedule": schedule}
            if reshard:
                sections["sharded"] = {"reshard": reshard}
            cases.append(
                {
                    "name": ", ".join(filter(None, (name, schedule, reshard and f"reshard {reshard}"))),
                    "layout": used,
                    "sections": sections,
                    "optimizer": "sgd" if outer > 1 else "adamw",
                }
            )
    for expert in DEGREES[1:]:
        if ranks % expert == 0:
            layout = {"data": ranks // expert, "expert": expert}
            sections = {"model": EXPERTS}
            cases.append({"name": str(Layout(**layout)), "layout": layout, "sections": sections, "optimizer": "adamw"})
    return cases
