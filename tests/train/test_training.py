"""Whole runs on real ranks: what they write, what they resume, and that they send what was predicted."""

import re
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from statistics import median

import pytest
import torch
from small_run import losses, make_config, run_training, scores

from pool import Pool, Rank, RankFailure
from thinwire.compress.exchange import make_exchange
from thinwire.config.compress import Coded
from thinwire.config.run import RunConfig
from thinwire.errors import UserError
from thinwire.record import RunFolder
from thinwire.report import Facts, as_json
from thinwire.train.worker import Outcome

pytestmark = pytest.mark.heavy


def compressed(config: RunConfig, kind: str) -> RunConfig:
    return config if kind == "none" else config.model_copy(update={"compress": Coded(kind=kind)})


def labels_of_a_run(context: Rank, config: RunConfig) -> tuple[Outcome, set[str]]:
    outcome = run_training(context, config)
    return outcome, {call.label for call, total in context.recorded().items() if total.last_step >= 0}


Finished = Callable[[Pool, str], list[tuple[Outcome, set[str]]]]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """(pool, kind) -> by rank, outcome and labels of a run that nobody interrupts.

    Each is made once; a test that changes the folder takes a copy.
    """

    @cache
    def run(pool: Pool, kind: str) -> list[tuple[Outcome, set[str]]]:
        config = make_config(tmp_path_factory.mktemp("finished"), checkpoint_every=5)
        return pool.run(labels_of_a_run, compressed(config, kind))

    return run


@pytest.fixture(scope="module")
def cut_at_six(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Pool, str], Outcome]:
    """(pool, kind) -> a run that was asked to stop after six steps. Made once, as `finished`."""

    @cache
    def run(pool: Pool, kind: str) -> Outcome:
        return pool.run(run_training, compressed(make_config(tmp_path_factory.mktemp("cut")), kind), None, 6)[0]

    return run


def noisy_training(context: Rank, config: RunConfig, resume: Path | None, stop_after: int, dirt: int) -> Outcome:
    """As `run_training`, of a model that draws a number for each loss, as dropout does. dirt: numbers drawn before."""
    from thinwire.train.task import LanguageModel

    plain = LanguageModel.loss
    torch.manual_seed(config.train.seed)
    torch.rand(dirt)

    def noisy(self: LanguageModel, *arguments: object) -> torch.Tensor:
        return plain(self, *arguments) * (0.5 + torch.rand(()))  # type: ignore[arg-type]

    LanguageModel.loss = noisy  # type: ignore[method-assign]
    try:
        return run_training(context, config, resume, stop_after)
    finally:
        LanguageModel.loss = plain  # type: ignore[method-assign]


@pytest.mark.long
def test_what_a_model_draws_goes_on_as_if_uninterrupted(ranks2: Pool, tmp_path: Path) -> None:
    """The random state is each rank's own, and resumed, whatever was drawn before."""
    (tmp_path / "whole").mkdir()
    whole = ranks2.run(noisy_training, make_config(tmp_path / "whole", steps=4), None, 10**9, 0)[0].folder
    cut = make_config(tmp_path, steps=4)
    folder = ranks2.run(noisy_training, cut, None, 2, 0)[0].folder
    ranks2.run(noisy_training, cut, folder, 10**9, 777)
    assert losses(folder) == losses(whole) and len(losses(whole)) == 4
    assert scores(folder)[4] == scores(whole)[4]


def refusals(context: Rank, config: RunConfig, resume: Path | None = None) -> str:
    """The message of a training that is refused."""
    try:
        run_training(context, config, resume)
    except UserError as error:
        return str(error)
    raise AssertionError("it was not refused")


def test_a_run_learns_and_leaves_a_whole_folder(ranks2: Pool, finished: Finished) -> None:
    (outcome, _), (other, _) = finished(ranks2, "none")
    assert outcome == other and outcome.reason == "done"
    folder = RunFolder.open(outcome.folder)
    assert len(folder.steps()) == 12 and [event.step for event in folder.evals()] == [4, 8, 12]
    assert folder.evals()[-1].loss < folder.evals()[0].loss < 6
    assert folder.end() is not None and folder.end().reason == "done"  # type: ignore[union-attr]
    assert sorted(path.name for path in (outcome.folder / "checkpoints").iterdir()) == [
        "step-000005", "step-000010", "step-000012",
    ]  # fmt: skip
    assert list((outcome.folder / "tensorboard").iterdir())


def test_predicted_transfers_equal_the_ledger_of_a_whole_run(ranks4: Pool, finished: Finished) -> None:
    outcome, labels = finished(ranks4, "none")[0]
    facts = as_json(Facts(RunFolder.open(outcome.folder)))
    predicted = [row for row in facts["transfers"] if row["predicted_bytes"] is not None]
    assert len(predicted) >= 4
    assert not [row for row in predicted if not row["equal"]]
    folder = RunFolder.open(outcome.folder)
    each_step = sum(row.wire_bytes_per_step for row in folder.predicted().transfers if row.every == 1)  # type: ignore[union-attr]
    assert median(event.wire_bytes for event in folder.steps()) == each_step, "a report has nothing of the steps before"
    others = labels - {row["label"] for row in predicted}
    assert others == {"checkpoint", "results"}, "checkpoints, and the ledgers themselves; nothing else"


@pytest.mark.parametrize(
    ("pool", "stop_after", "kind"),
    [
        ("ranks2", 1, "none"),
        ("ranks2", 5, "int4"),
        *(
            pytest.param(*case, marks=pytest.mark.long)
            for case in (("ranks4", 1, "none"), ("ranks4", 5, "none"), ("ranks4", 5, "int4"), ("ranks2", 3, "bf16"))
        ),
    ],
)
def test_resumed_equals_uninterrupted_bit_for_bit(
    request: pytest.FixtureRequest, config: RunConfig, finished: Finished, pool: str, stop_after: int, kind: str
) -> None:
    ranks: Pool = request.getfixturevalue(pool)
    config = compressed(config, kind)
    whole = finished(ranks, kind)[0][0].folder
    cut = ranks.run(run_training, config, None, stop_after)[0]
    assert cut.reason == "interrupted" and max(losses(cut.folder)) == stop_after
    resumed = ranks.run(run_training, config, cut.folder)[0]
    assert resumed.reason == "done"
    assert losses(resumed.folder) == losses(whole)
    assert scores(resumed.folder) == scores(whole)
    times = [event.time_s for event in RunFolder.open(resumed.folder).steps()]
    assert times == sorted(times), "the clock goes on"


def test_resume_drops_what_came_after_the_checkpoint(ranks2: Pool, tmp_path: Path, config: RunConfig, finished: Finished) -> None:
    folder = shutil.copytree(finished(ranks2, "none")[0][0].folder, tmp_path / "run")
    before = losses(folder)
    shutil.rmtree(folder / "checkpoints" / "step-000012")
    resumed = ranks2.run(run_training, config, folder)[0].folder
    assert resumed == folder and losses(resumed) == before
    assert [event.dropped for event in RunFolder.open(resumed).resumes()] and (folder / "checkpoints" / "step-000012").is_dir()


@pytest.mark.parametrize("damage", ["truncated", "missing", "progress", "own"])
def test_a_damaged_checkpoint_is_passed_over_and_the_one_before_it_taken(
    ranks2: Pool, tmp_path: Path, config: RunConfig, finished: Finished, damage: str
) -> None:
    folder = shutil.copytree(finished(ranks2, "none")[0][0].folder, tmp_path / "run")
    before, newest = losses(folder), folder / "checkpoints" / "step-000012"
    victim = {"progress": newest / "progress.json", "own": newest / "rank-00001.pt"}.get(damage) or newest / "__0_0.distcp"
    if damage == "missing":
        victim.unlink()
    else:
        victim.write_bytes(victim.read_bytes()[: victim.stat().st_size // 2])
    assert ranks2.run(run_training, config, folder)[0].reason == "done"
    resumes = RunFolder.open(folder).resumes()
    assert [event.step for event in resumes] == [10] and losses(folder) == before
    for older in (folder / "checkpoints").iterdir():
        (older / "__0_0.distcp").write_bytes(b"")
    for message in ranks2.run(refusals, config, folder):
        assert re.search(
            r"step-000012 is not whole: __0_0.distcp \(0 bytes\) does not have its checksum .*there is no other", message
        )


def mean_residual(checkpoint: Path) -> dict[str, torch.Tensor]:
    """1/p sum over ranks of each one's error-feedback residual, in float64."""
    states = [torch.load(path, weights_only=True)["sync"]["memory"]["owed"] for path in sorted(checkpoint.glob("rank-*.pt"))]
    return {name: torch.stack([state["kept"][name].double() for state in states]).mean(0) for name in states[0]["kept"]}


def adopted_residual(context: Rank, config: RunConfig, checkpoint: Path) -> dict[str, torch.Tensor]:
    """This rank's residual after it has adopted the states of a run with another number of ranks."""
    exchange = make_exchange(config.compress, context.ledger)
    exchange.adopt([torch.load(path, weights_only=True)["sync"] for path in sorted(checkpoint.glob("rank-*.pt"))])
    return exchange.residuals()


@pytest.mark.long
@pytest.mark.parametrize(
    ("first", "pool", "kind"),
    [
        ("ranks2", "ranks4", "int4"),
        *(
            pytest.param("ranks4", pool, kind, marks=pytest.mark.long)
            for pool in ("ranks2", "ranks8")
            for kind in ("none", "int4")
        ),
    ],
)
def test_another_number_of_ranks_goes_on_and_conserves_the_residual(
    request: pytest.FixtureRequest,
    config: RunConfig,
    tmp_path: Path,
    cut_at_six: Callable[[Pool, str], Outcome],
    first: str,
    pool: str,
    kind: str,
) -> None:
    ranks: Pool = request.getfixturevalue(pool)
    config = compressed(config, kind)
    folder = shutil.copytree(cut_at_six(request.getfixturevalue(first), kind).folder, tmp_path / "run")
    before = scores(folder)
    if kind != "none":
        checkpoint = folder / "checkpoints" / "step-000006"
        residual = mean_residual(checkpoint)
        adopted = ranks.run(adopted_residual, config, checkpoint)
        for name, wanted in residual.items():
            after = torch.stack([rank[name].double() for rank in adopted]).mean(0)
            torch.testing.assert_close(after, wanted, rtol=0, atol=1e-6)
        assert residual and any(wanted.abs().max() > 0 for wanted in residual.values())
    resumed = ranks.run(run_training, config, folder)[0]
    assert resumed.reason == "done"
    assert scores(resumed.folder)[12] < before[4]


def test_a_run_folder_is_not_overwritten(ranks2: Pool, config: RunConfig, finished: Finished) -> None:
    folder = finished(ranks2, "none")[0][0].folder
    events = (folder / "events.jsonl").read_text()
    config = config.model_copy(update={"train": config.train.model_copy(update={"run": str(folder)})})
    with pytest.raises(RankFailure, match="is not empty"):
        ranks2.run(run_training, config)
    assert (folder / "events.jsonl").read_text() == events


def test_a_run_with_one_report_says_what_it_sent(ranks2: Pool, tmp_path: Path) -> None:
    config = compressed(make_config(tmp_path, steps=3, log_every=3, eval_every=3), "int4")
    run = RunFolder.open(ranks2.run(run_training, config)[0].folder)
    predicted, measured = run.predicted(), run.measured()
    assert predicted is not None and measured is not None and not measured.transfers
    assert measured.wire_bytes_per_step == pytest.approx(predicted.wire_bytes_per_step, rel=0.01)
