"""An LSTM language model in ever larger batches (Puri et al. 2018): loss at equal tokens, tokens a second, scaling efficiency.

Of the task lm_lstm as `bench applications` races it. A batch c times as large has a c-th of the steps, and of the warm-up steps,
and sqrt(c) times the learning rate.

    efficiency    tokens a second of all ranks / those of as many ranks that exchange nothing
"""

from collections.abc import Mapping
from typing import Any

from thinwire.bench import applications
from thinwire.bench.registry import Rows
from thinwire.bench.sync import find_links
from thinwire.cluster import load_cluster
from thinwire.errors import UserError

DEFAULTS: Mapping[str, Any] = {
    "batches": [64, 128, 256, 512],
    "examples": 12_800,
    "methods": ["ddp", "int4"],
    "links": ["100 Mbit/s"],
    "turns": 3,
    "turn_s": 2.0,
    "json": "",
}
"""batches: examples of a step over all ranks; examples: of the whole run."""
KIND = "lm_lstm"


def run(cluster_name: str | None, options: Mapping[str, Any]) -> Rows:
    """A row for each batch, link and method."""
    if not cluster_name:
        raise UserError("bench large_batch runs in the lab; name a cluster, --cluster four-hosts-100mbit")
    cluster, train, rows = load_cluster(cluster_name), applications.example_of(KIND).train, []
    for batch in options["batches"]:
        if batch % cluster.world_size or batch > options["examples"]:
            raise UserError(f"batches: {batch} examples are not shared out evenly to {cluster.world_size} ranks, or are too many")
        steps, larger = options["examples"] // batch, batch / (train.micro_batch * applications.EXAMPLE_RANKS)
        changes = {
            "micro_batch": batch // cluster.world_size,
            "steps": steps,
            "learning_rate": train.learning_rate * larger**0.5,
            "warmup_steps": steps * train.warmup_steps // train.steps,
        }
        application = applications.read_application(KIND, cluster.world_size, changes)
        for row in applications.race(application, cluster, find_links(options["links"], cluster), options):
            kept = ("link_bps", "method", "steps", "score", "unit", "step_s", "predicted_step_s", "wire_bytes_per_step")
            rows.append(
                {
                    "case": f"batch of {batch}",
                    "learning_rate": changes["learning_rate"],
                    **{key: row[key] for key in kept},
                    "tokens_per_s": batch * train.sequence / row["step_s"],
                    "efficiency": 1.0 - row["waits"],
                }
            )
    return rows
