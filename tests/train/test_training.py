"""Whole runs on real ranks: what they write, what they resume, and that they send what was predicted."""

import shutil
from pathlib import Path

import pytest
import torch

from pool import Pool, Rank, RankFailure
from thinwire.compress.exchange import make_exchange
from thinwire.config.compress import Coded
from thinwire.config.run import RunConfig
from thinwire.record import RunFolder
from thinwire.report import as_json, gather
from thinwire.train.runtime import StopRequest, Surroundings
from thinwire.train.worker import Outcome, train_as
from thinwire.train.worker import Rank as TrainingRank


class StopAfter(StopRequest):
    """Asked to stop once the ledger has reached a step."""

    def __init__(self, ledger: object, step: int) -> None:
        self.ledger, self.step = ledger, step

    @property
    def requested(self) -> bool:  # type: ignore[override]
        return self.ledger.step + 1 >= self.step  # type: ignore[attr-defined]


def run_training(context: Rank, config: RunConfig, resume: Path | None = None, stop_after: int = 10**9) -> Outcome:
    ledger = context.ledger
    ledger.step = -1
    rank = TrainingRank(
        config=config,
        surroundings=Surroundings(place=None, lab=None, error_file=None, cache_folder=Path("/nonexistent"), results=None),
        layout=config.layout.resolve(context.world_size),
        ledger=ledger,
        device=torch.device("cpu"),
        stop=StopAfter(ledger, stop_after),
    )
    return train_as(rank, resume)


def losses(folder: Path) -> dict[int, float]:
    return {event.step: event.loss for event in RunFolder.open(folder).steps()}


def scores(folder: Path) -> dict[int, float]:
    return {event.step: event.loss for event in RunFolder.open(folder).evals()}


def test_a_run_learns_and_leaves_a_whole_folder(ranks2: Pool, config: RunConfig) -> None:
    (outcome, other) = ranks2.run(run_training, config)
    assert outcome == other and outcome.reason == "done"
    folder = RunFolder.open(outcome.folder)
    assert len(folder.steps()) == 12 and [event.step for event in folder.evals()] == [4, 8, 12]
    assert folder.evals()[-1].loss < folder.evals()[0].loss < 6
    assert folder.end() is not None and folder.end().reason == "done"  # type: ignore[union-attr]
    assert sorted(path.name for path in (outcome.folder / "checkpoints").iterdir()) == ["step-000012"]
    assert list((outcome.folder / "tensorboard").iterdir())


def labels_of_a_run(context: Rank, config: RunConfig) -> tuple[Outcome, set[str]]:
    outcome = run_training(context, config)
    return outcome, {call.label for call, total in context.recorded().items() if total.last_step >= 0}


def test_predicted_transfers_equal_the_ledger_of_a_whole_run(ranks4: Pool, config: RunConfig) -> None:
    outcome, labels = ranks4.run(labels_of_a_run, config)[0]
    facts = as_json(gather(RunFolder.open(outcome.folder)))
    predicted = [row for row in facts["transfers"] if row["predicted_bytes"] is not None]
    assert len(predicted) >= 4
    assert all(row["equal"] for row in predicted), predicted
    others = labels - {row["label"] for row in predicted}
    assert others == {"checkpoint", "results"}, "checkpoints, and the ledgers themselves; nothing else"


@pytest.mark.parametrize(
    ("pool", "stop_after", "kind"),
    [("ranks2", 1, "none"), ("ranks4", 1, "none"), ("ranks4", 5, "none"), ("ranks4", 5, "int4"), ("ranks2", 3, "bf16")],
)
def test_resumed_equals_uninterrupted_bit_for_bit(
    request: pytest.FixtureRequest, config: RunConfig, tmp_path: Path, pool: str, stop_after: int, kind: str
) -> None:
    ranks: Pool = request.getfixturevalue(pool)
    if kind != "none":
        config = config.model_copy(update={"compress": Coded(kind=kind)})
    whole = ranks.run(run_training, config)[0].folder
    kept = tmp_path / "whole"
    shutil.move(whole, kept)
    cut = ranks.run(run_training, config, None, stop_after)[0]
    assert cut.reason == "interrupted" and max(losses(cut.folder)) == stop_after
    resumed = ranks.run(run_training, config, cut.folder)[0]
    assert resumed.reason == "done"
    assert losses(resumed.folder) == losses(kept)
    assert scores(resumed.folder) == scores(kept)


def test_resume_drops_what_came_after_the_checkpoint(ranks2: Pool, tmp_path: Path, config: RunConfig) -> None:
    config = config.model_copy(update={"train": config.train.model_copy(update={"checkpoint_every": 5})})
    folder = ranks2.run(run_training, config)[0].folder
    before = losses(folder)
    shutil.rmtree(folder / "checkpoints" / "step-000012")
    resumed = ranks2.run(run_training, config, folder)[0].folder
    assert losses(resumed) == before
    assert [event.dropped for event in RunFolder.open(resumed).resumes()] and (folder / "checkpoints" / "step-000012").is_dir()


@pytest.mark.parametrize("damage", ["truncated", "missing", "progress"])
def test_a_damaged_checkpoint_is_one_line_and_harms_nothing(ranks2: Pool, config: RunConfig, damage: str) -> None:
    config = config.model_copy(update={"train": config.train.model_copy(update={"checkpoint_every": 6})})
    folder = ranks2.run(run_training, config)[0].folder
    newest = folder / "checkpoints" / "step-000012"
    victim = (
        newest / "progress.json" if damage == "progress" else max(newest.glob("*.distcp"), key=lambda path: path.stat().st_size)
    )
    if damage == "missing":
        victim.unlink()
    else:
        victim.write_bytes(victim.read_bytes()[: victim.stat().st_size // 2])
    events = (folder / "events.jsonl").read_text()
    with pytest.raises(RankFailure, match=r"step-000012 is damaged: .*; remove it to resume from step-000006"):
        ranks2.run(run_training, config, folder)
    assert (folder / "events.jsonl").read_text() == events and newest.is_dir()
    shutil.rmtree(newest)
    assert ranks2.run(run_training, config, folder)[0].reason == "done"


def owed_on_average(checkpoint: Path) -> dict[str, torch.Tensor]:
    """1/p sum over ranks of what each owes, in float64."""
    states = [torch.load(path, weights_only=True)["sync"]["memory"]["owed"] for path in sorted(checkpoint.glob("rank-*.pt"))]
    return {name: torch.stack([state["kept"][name].double() for state in states]).mean(0) for name in states[0]["kept"]}


def adopted_owed(context: Rank, config: RunConfig, checkpoint: Path) -> dict[str, torch.Tensor]:
    """What this rank owes after it has adopted the states of a run with another number of ranks."""
    exchange = make_exchange(config.compress, context.ledger)
    exchange.adopt([torch.load(path, weights_only=True)["sync"] for path in sorted(checkpoint.glob("rank-*.pt"))])
    return exchange.owed()


@pytest.mark.parametrize("kind", ["none", "int4"])
@pytest.mark.parametrize("pool", ["ranks2", "ranks8"])
def test_another_number_of_ranks_goes_on_and_conserves_what_is_owed(
    request: pytest.FixtureRequest, ranks4: Pool, config: RunConfig, pool: str, kind: str
) -> None:
    ranks: Pool = request.getfixturevalue(pool)
    if kind != "none":
        config = config.model_copy(update={"compress": Coded(kind=kind)})
    cut = ranks4.run(run_training, config, None, 6)[0]
    before = scores(cut.folder)
    if kind != "none":
        checkpoint = cut.folder / "checkpoints" / "step-000006"
        owed = owed_on_average(checkpoint)
        adopted = ranks.run(adopted_owed, config, checkpoint)
        for name, wanted in owed.items():
            after = torch.stack([rank[name].double() for rank in adopted]).mean(0)
            torch.testing.assert_close(after, wanted, rtol=0, atol=1e-6)
        assert owed and any(wanted.abs().max() > 0 for wanted in owed.values())
    resumed = ranks.run(run_training, config, cut.folder)[0]
    assert resumed.reason == "done"
    assert scores(resumed.folder)[12] < before[4]


def test_a_run_folder_is_not_overwritten(ranks2: Pool, config: RunConfig) -> None:
    folder = ranks2.run(run_training, config)[0].folder
    events = (folder / "events.jsonl").read_text()
    with pytest.raises(RankFailure, match="is not empty"):
        ranks2.run(run_training, config)
    assert (folder / "events.jsonl").read_text() == events
