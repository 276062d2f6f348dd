"""Long sequences on one rank and shared out to several: seconds of a step, memory that comes and goes, bytes sent.

Over loopback, one sequence a step: gradients averaged, AdamW. memory_bytes: the most that a rank's process grew by from its first
step on, of the ranks the largest. "sent again": keys and values travel in the backward pass too, and a rank keeps none but its
own. speed_up: how many times faster than one rank.
"""

from collections.abc import Mapping
from typing import Any

from thinwire.bench.ranks import run_script
from thinwire.bench.registry import Rows
from thinwire.config.model import ModelConfig
from thinwire.layout import check_sequence

DEFAULTS: Mapping[str, Any] = {
    "ranks": [1, 2],
    "sequence": 4096,
    "model": {"layers": 4, "width": 256, "heads": 8},
    "steps": 5,
}


def run(cluster_name: str | None, options: Mapping[str, Any]) -> Rows:
    """Rows: case, ranks, step_s, speed_up, memory_bytes, sent_bytes of a rank and step. No cluster is used."""
    model = ModelConfig.model_validate({"context": options["sequence"], **options["model"]}).model_dump()
    cases = [(ranks, keeps) for ranks in options["ranks"] for keeps in ((True, False) if ranks > 1 else (True,))]
    for ranks, _ in cases:
        check_sequence(options["sequence"], ranks)
    rows: Rows = []
    for ranks, keeps in cases:
        settings = {"model": model, "sequence": options["sequence"], "steps": options["steps"], "keeps": keeps}
        name = f"{ranks} rank{'s' * (ranks > 1)}{'' if keeps else ', sent again'}"
        found = run_script(ranks, "sequence_steps", settings, title=name).results["sequence_steps"]
        first = rows[0]["step_s"] if rows else found["step_s"]
        rows.append({"case": name, "ranks": ranks, "speed_up": first / found["step_s"], **found})
    return rows
