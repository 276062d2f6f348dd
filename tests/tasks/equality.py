"""For tests of tasks: two ranks train as one does, to 1e-9 in float64, send what was predicted, and stay equal to the bit."""

import hashlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pool import Pool, Rank
from thinwire.config.run import RunConfig
from thinwire.record import RunFolder
from thinwire.train import worker
from thinwire.train.trainer import Trainer

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))
from small_run import losses, run_training, scores, sent_as_predicted

CODED_AND_RARE = pytest.mark.parametrize(
    "sections",
    [{"compress": {"kind": "int4"}, "model": {"dtype": "float32"}}, {"sync": {"kind": "diloco", "every": 3}}],
    ids=["int4", "diloco"],
)


def run_config(folder: Path, task: dict[str, Any], **sections: Any) -> RunConfig:
    """Of six steps of four micro-batches, of four examples each."""
    folder.mkdir(exist_ok=True)
    train = {
        "steps": 6,
        "micro_batch": 4,
        "sequence": 24,
        "log_every": 1,
        "eval_every": 3,
        "learning_rate": 1e-2,
        "run": str(folder / "run"),
        "timeout_s": 20,
    }
    given = {
        "task": task,
        "model": {"dtype": "float64"},
        "data": {"cache": str(folder / "cache")},
        "sync": {"accumulate": 4},
        "train": train,
    }
    return RunConfig.model_validate(
        {**given, **{key: given.get(key, {}) | value for key, value in sections.items()}}  # type: ignore[operator]
    )


class Watched(Trainer):
    """Remembers what the model was in the end."""

    digest = ""

    def run(self, first_step: int) -> str:
        reason = super().run(first_step)
        state = {name: one for name, one in self.parts.model.state_dict().items() if isinstance(one, torch.Tensor)}
        Watched.digest = hashlib.sha256(b"".join(one.contiguous().numpy().tobytes() for one in state.values())).hexdigest()
        return reason


def watched_training(context: Rank, config: RunConfig) -> tuple[Path, str]:
    """The run folder, and the sha256 of this rank's weights and buffers."""
    plain, worker.Trainer = worker.Trainer, Watched  # type: ignore[misc]
    try:
        return run_training(context, config).folder, Watched.digest
    finally:
        worker.Trainer = plain  # type: ignore[misc]


def alike(folder: Path, found: list[tuple[Path, str]]) -> None:
    """All ranks of a run have the same model, and sent what was predicted."""
    assert len({digest for _, digest in found}) == 1
    assert "evaluation" in sent_as_predicted(folder)


def two_ranks_are_one(ranks1: Pool, ranks2: Pool, folder: Path, task: dict[str, Any], **sections: Any) -> Path:
    """Returns the run folder of two ranks, whose [layout] it is."""
    layout = sections.pop("layout", {})
    sections = {**sections, "sync": {"bucket_bytes": 4096, **sections.get("sync", {})}}
    one = ranks1.run(watched_training, run_config(folder / "one", task, **sections))[0][0]
    halved = {**sections, "sync": {**sections.get("sync", {}), "accumulate": 2}}
    found = ranks2.run(watched_training, run_config(folder / "two", task, layout=layout, **halved))
    two = found[0][0]
    if layout:
        assert "evaluation passes" in sent_as_predicted(two)
    else:
        alike(two, found)
    for of_one, of_two in ((losses(one), losses(two)), (scores(one), scores(two)), (judged(one), judged(two))):
        assert of_one and of_one.keys() == of_two.keys()
        assert max(abs(of_one[step] - of_two[step]) for step in of_one) <= 1e-9
    return two


def judged(folder: Path) -> dict[int, float]:
    """The scores that are not losses, by step."""
    return {event.step: event.score for event in RunFolder.open(folder).evals()}
