"""A small run for tests: a text of its own, a tiny model, everything below a temporary folder."""

import random
from pathlib import Path
from statistics import median
from typing import Any

import torch

from pool import Pool, Rank
from thinwire.config.run import RunConfig
from thinwire.environment import Environment, Lab
from thinwire.record import RunFolder
from thinwire.report import Facts, as_json
from thinwire.train.runtime import StopRequest
from thinwire.train.worker import Outcome, train_as
from thinwire.train.worker import Rank as TrainingRank


def make_text(path: Path, size: int = 60_000) -> Path:
    """Sentences of a few words, so that there is something to learn."""
    chosen = random.Random(7)
    words = ["thin", "wire", "ring", "tree", "rank", "slow", "link", "loss", "step", "send"]
    path.write_text(" ".join(chosen.choice(words) for _ in range(size // 5)), encoding="utf-8")
    return path


def make_config(folder: Path, **train: object) -> RunConfig:
    """A run of 12 steps that reports each step."""
    text = folder / "text.txt"
    if not text.exists():
        make_text(text)
    settings = {
        "steps": 12,
        "micro_batch": 2,
        "sequence": 16,
        "dtype": "float32",
        "log_every": 1,
        "eval_every": 4,
        "eval_tokens": 512,
        "warmup_steps": 2,
        "run": str(folder / "run"),
        "timeout_s": 20,
    } | train
    return RunConfig.model_validate(
        {
            "model": {"layers": 2, "width": 16, "heads": 2, "context": 16},
            "data": {"source": str(text), "cache": str(folder / "cache")},
            "sync": {"accumulate": 2, "bucket_bytes": 4096},
            "train": settings,
        }
    )


class StopAfter(StopRequest):
    """Asked to stop once the ledger has reached a step."""

    def __init__(self, ledger: object, step: int) -> None:
        self.ledger, self.step = ledger, step

    @property
    def requested(self) -> bool:  # type: ignore[override]
        return self.ledger.step + 1 >= self.step  # type: ignore[attr-defined]


def run_training(
    context: Rank, config: RunConfig, resume: Path | None = None, stop_after: int = 10**9, lab: Lab | None = None
) -> Outcome:
    ledger = context.ledger
    ledger.step = -1
    rank = TrainingRank(
        config=config,
        environment=Environment(place=None, lab=lab, error_file=None, cache_folder=Path("/nonexistent"), results=None),
        layout=config.layout.resolve(context.world_size, rare=config.sync.rare),
        ledger=ledger,
        device=torch.device("cpu"),
        stop=StopAfter(ledger, stop_after),
    )
    return train_as(rank, resume)


def run_paced_on(context: Rank, config: RunConfig, cluster: Path, resume: Path | None = None, stop_after: int = 10**9) -> Outcome:
    """As in a lab of that cluster, paced."""
    lab = Lab(cluster=cluster, host=f"host{context.rank}", paced=True, delay="none", results=cluster.parent)
    return run_training(context, config, resume, stop_after, lab)


def losses(folder: Path) -> dict[int, float]:
    return {event.step: event.loss for event in RunFolder.open(folder).steps()}


def scores(folder: Path) -> dict[int, float]:
    return {event.step: event.loss for event in RunFolder.open(folder).evals()}


def config_of(folder: Path, layout: dict[str, int], num_micro: int = 4, **sections: Any) -> RunConfig:
    """Of a layout: in float64, of four micro-batches for each replica."""
    folder.mkdir(exist_ok=True)
    text = make_text(folder / "text.txt")
    given = {
        "model": {"layers": 4, "width": 16, "heads": 2, "context": 16, "dtype": "float64"},
        "data": {"source": str(text), "cache": str(folder / "cache")},
        "sync": {"accumulate": num_micro},
        "layout": layout,
        "train": make_config(folder, dtype="auto").train.model_dump(),
    }
    return RunConfig.model_validate({**given, **{key: given.get(key, {}) | value for key, value in sections.items()}})


def on_one_rank(ranks1: Pool, folder: Path, num_micro: int, **sections: Any) -> tuple[dict[int, float], dict[int, float]]:
    outcome = ranks1.run(run_training, config_of(folder, {}, num_micro, **sections))[0]
    return losses(outcome.folder), scores(outcome.folder)


def sent_as_predicted(folder: Path) -> set[str]:
    """Holds all that was predicted to the ledger, to the byte, and a step to the sum of it. Returns the labels."""
    run = RunFolder.open(folder)
    predicted = [row for row in as_json(Facts(run))["transfers"] if row["predicted_bytes"] is not None]
    assert not [row for row in predicted if not row["equal"]]
    each_step = sum(row.wire_bytes_per_step for row in run.predicted().transfers if row.every == 1)  # type: ignore[union-attr]
    assert median(event.wire_bytes for event in run.steps()) == each_step
    return {row["label"] for row in predicted}
