"""The measured front: what each method sends, and how many steps it needs to the loss that data parallelism has (`front.csv`).

Rows were measured by `thinwire bench front`, which says what the columns are; each names its model, replicas, steps, seeds, data
and commit. Carried to a model of N parameters on M replicas, and a run of so many steps, a way that exchanges every H costs

    times = 1 + min(excess, lasting(N, M, H)) + start * measured steps / steps * H / measured H
    start = excess - min(excess, lasting(measured N, M, H))             excess: measured times - 1
    lasting = TOKENS_PER_LOSS * (loss(N, M) + PER_DOUBLING * log2(H / 30))

lasting is what was published of long runs, loss(N, M) beside data parallelism (Charles et al. 2025, arXiv 2503.09799, C4, every
30 steps), between its values on straight lines over log N and log M, for more replicas on as it rises, for smaller and larger
models as for the smallest and the largest. Assumption: what a row costs more is its start, as many periods in any run. A way
that averages in each step costs everywhere what was measured, but without feedback, which noise of gradients stands in for: that
costs WITHOUT_FEEDBACK more for each doubling of a replica's tokens above those of the rows, and steps taken again RETRACED.
"""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import resources
from math import log, log2
from statistics import mean
from typing import Any

from thinwire.tomlfile import read_value

COLUMNS = (
    *("method", "run", "learning_rate_percent", "wire_bytes_per_token", "steps_over_ddp", "final_loss_ratio"),
    *("parameters", "replicas", "steps", "seeds", "data", "commit"),
)
REPLICAS, PARAMETERS = (1, 2, 4, 8), (35e6, 335e6, 1.3e9, 2.4e9, 10e9)
LOSS = (
    (0.0, 0.007, 0.020, 0.039),
    (0.0, 0.001, 0.009, 0.020),
    (0.0, 0.002, 0.005, 0.013),
    (0.0, 0.0, 0.003, 0.011),
    (0.0, 0.0, 0.0029, 0.011),
)
"""Parts of the loss, by PARAMETERS and REPLICAS; at 10B eight replicas are taken from 2.4B."""
PER_DOUBLING, EVERY = 0.0046, 30
"""For each doubling of H above: a loss of 2.48 at 30, 2.50 at 100 (Douillard et al. 2025, arXiv 2501.18512, 1B on C4)."""
TOKENS_PER_LOSS = 15.0
"""A loss that is 1 % higher costs 15 % more tokens (Hoffmann et al. 2022, at 20 tokens a parameter)."""
PER_STEP_OF_OVERLAP = 0.0002
"""Less than 0.2 % of loss up to 10 steps (Douillard et al. 2025)."""
WITHOUT_FEEDBACK, TOKENS = 0.07, 512
"""Of steps, and of a replica and step: ternary needed 1.01 times the steps of data parallelism with 512, and 1.16 with 2,048."""
RETRACED = 0.14
"""The same of steps that are taken again every 4: 1.0 times the steps with 512, and by its loss 1.28 with 2,048."""
RETRACE = "retrace"
"""The kind that averages gradients rarely; the other rare ones average how far replicas have moved."""
TUNED = frozenset({"first", "outer_learning_rate", "outer_momentum", "mixing", "arrival"})
"""Keys that a planner does not set."""


@dataclass(frozen=True, kw_only=True)
class Way:
    """A row whose steps are known. run: sections of run.toml; steps: that data parallelism trained."""

    method: str
    run: Mapping[str, Mapping[str, Any]]
    learning_rate_percent: float
    wire_bytes_per_token: float
    steps_over_ddp: float
    parameters: int
    replicas: int
    steps: int

    @property
    def every(self) -> int:
        """H; 0: gradients are averaged in each step."""
        return int(self.run["sync"].get("every", 0))

    @property
    def optimizer(self) -> str:
        """That it needs; "": any."""
        return str(self.run.get("train", {}).get("optimizer", {}).get("kind", ""))

    @property
    def feeds_back(self) -> bool:
        """Whether what codes lose is kept."""
        return self.run["compress"].get("feedback") is not False

    @property
    def usual(self) -> bool:
        """Whether the outer step, the learning rate and H are those that a kind has where nothing else is set."""
        return self.learning_rate_percent == 100 and not TUNED & self.run["sync"].keys()

    def times(self, parameters: float, replicas: int, steps: float, every: int = 0, tokens: float = TOKENS) -> float:
        """As many steps as data parallelism to the same loss, of another run; every: another H than its own; tokens: of a replica
        and step."""
        excess = max(0.0, self.steps_over_ddp - 1)
        doublings = max(0.0, log2(tokens / TOKENS))
        if not self.every:
            return 1 + excess + (0.0 if self.feeds_back else WITHOUT_FEEDBACK * doublings)
        start = excess - min(excess, lasting(self.parameters, self.replicas, self.every))
        periods = (every or self.every) / self.every * self.steps / max(1.0, steps)
        large = RETRACED * doublings if self.run["sync"]["kind"] == RETRACE else 0.0
        return 1 + min(excess, lasting(parameters, replicas, every or self.every)) + start * periods + large


@cache
def ways() -> tuple[Way, ...]:
    """As the package ships them. A method that was measured with several models, texts or numbers of replicas is one way, which
    needs the mean of their steps."""
    by_method: dict[str, list[dict[str, str]]] = {}
    with (resources.files("thinwire.sync") / "front.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["steps_over_ddp"]:
                by_method.setdefault(row["method"], []).append(row)
    return tuple(_way(rows) for rows in by_method.values())


def _way(rows: Sequence[Mapping[str, str]]) -> Way:
    """The first one's model, replicas and steps stand for all."""
    first = rows[0]
    return Way(
        method=first["method"],
        run=read_value(first["run"]),
        learning_rate_percent=float(first["learning_rate_percent"]),
        wire_bytes_per_token=float(first["wire_bytes_per_token"]),
        steps_over_ddp=mean(float(row["steps_over_ddp"]) for row in rows),
        parameters=int(first["parameters"]),
        replicas=int(first["replicas"]),
        steps=int(first["steps"]),
    )


@lru_cache(maxsize=4096)
def of_rare(kind: str, parameters: float, replicas: int, every: int, overlap: int, steps: float) -> float:
    """`Way.times` of a sync.kind that exchanges rarely, by the usual row of it whose H is nearest, the cheapest of several; if
    there is none, by all rare rows. Of "every_step" the least of all, since it is not known yet how they exchange."""
    rare = [way for way in ways() if way.every and (way.run["sync"]["kind"] == RETRACE) == (kind == RETRACE)]
    if kind == "every_step":
        return min(way.times(parameters, replicas, steps, 1) for way in rare)
    rare = [way for way in rare if way.usual and way.run["sync"]["kind"] == kind] or rare
    near = min(rare, key=lambda way: (abs(log(way.every / every)), way.steps_over_ddp))
    return near.times(parameters, replicas, steps, every) + TOKENS_PER_LOSS * PER_STEP_OF_OVERLAP * overlap


def lasting(parameters: float, replicas: int, every: int) -> float:
    """See the top of the file."""
    by_size = [_between(REPLICAS, row, replicas) for row in LOSS]
    loss = max(0.0, _between(PARAMETERS, by_size, min(max(parameters, PARAMETERS[0]), PARAMETERS[-1])))
    return TOKENS_PER_LOSS * (loss + PER_DOUBLING * max(0.0, log2(every / EVERY)))


def _between(at: Sequence[float], values: Sequence[float], x: float) -> float:
    place = next((index for index in range(1, len(at)) if x <= at[index]), len(at) - 1)
    along = (log(x) - log(at[place - 1])) / (log(at[place]) - log(at[place - 1]))
    return values[place - 1] + along * (values[place] - values[place - 1])
