"""Whole runs whose layers lie on several ranks learn what one rank with the same tokens learns, and send what was predicted."""

import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import config_of, losses, on_one_rank, run_training, scores, sent_as_predicted

from pool import Pool, RankFailure
from thinwire.errors import UserError
from thinwire.record import RunFolder
from thinwire.report import Facts, as_json
from thinwire.report.page import page
from thinwire.train.trained import open_trained


@pytest.mark.long
@pytest.mark.parametrize(
    ("pool", "pipe", "schedule", "tied"),
    [
        ("ranks2", 2, "1f1b", True),
        ("ranks4", 2, "zbv", True),
        ("ranks4", 2, "interleaved", False),
        ("ranks4", 4, "zb1p", True),
    ],
)
def test_a_run_equals_one_rank_and_its_prediction(
    ranks1: Pool, request: pytest.FixtureRequest, tmp_path: Path, pool: str, pipe: int, schedule: str, tied: bool
) -> None:
    ranks: Pool = request.getfixturevalue(pool)
    replicas = ranks.world_size // pipe
    model = {"tied": tied}
    expected = on_one_rank(ranks1, tmp_path / "one", 4 * replicas, model=model)
    config = config_of(tmp_path / "pipe", {"pipe": pipe}, model=model, pipeline={"schedule": schedule})
    outcome = ranks.run(run_training, config)[0]
    assert losses(outcome.folder) == pytest.approx(expected[0], rel=1e-9)
    assert scores(outcome.folder) == pytest.approx(expected[1], rel=1e-9)
    assert {"pipeline", "norm", "summary"} <= sent_as_predicted(outcome.folder)
    check_passes(RunFolder.open(outcome.folder))


def check_passes(folder: RunFolder) -> None:
    """Of the last step: each rank made the passes that were predicted, in that order, one by one; the report draws them."""
    predicted, measured = (cost.passes for cost in (folder.predicted(), folder.measured()) if cost)
    ranks = {one.rank for one in predicted}
    assert len(ranks) > 1
    for rank in ranks:
        ran, expected = ([one for one in side if one.rank == rank] for side in (measured, predicted))
        ran, expected = (sorted(side, key=lambda one: one.begin_s) for side in (ran, expected))
        assert [(one.kind, one.stage, one.micro) for one in ran] == [(one.kind, one.stage, one.micro) for one in expected]
        assert all(one.end_s <= after.begin_s for one, after in pairwise(ran)) and ran[0].begin_s >= 0
    assert page(Facts(folder)).count("<rect") >= len(predicted) + len(measured)


@pytest.mark.long
@pytest.mark.parametrize(
    ("pool", "data", "compress", "gradients"),
    [("ranks8", 4, "none", "none"), ("ranks4", 2, "int4", "int4"), ("ranks2", 1, "none", "int8")],
    ids=["sums", "codes", "codes between stages"],
)
def test_both_copies_of_a_tied_weight_stay_equal_to_the_bit(
    ranks1: Pool, request: pytest.FixtureRequest, tmp_path: Path, pool: str, data: int, compress: str, gradients: str
) -> None:
    """Though replicas of the two stages average apart from each other, in other buckets. And the run learns as one rank does, or
    as replicas of the whole model with the same codes."""
    ranks: Pool = request.getfixturevalue(pool)
    model, codes = {"tied": True}, {"kind": compress} if compress == "none" else {"kind": compress, "exclude": []}
    sections = {"model": model, "compress": codes, "pipeline": {"gradients": gradients}}
    folder = RunFolder.open(
        ranks.run(run_training, config_of(tmp_path / "run", {"pipe": 2, "data": data}, 2, **sections), timeout_s=50)[0].folder
    )
    if compress == "none":
        alike, _ = on_one_rank(ranks1, tmp_path / "alike", 2 * data, model=model)
    else:
        replicas: Pool = request.getfixturevalue(f"ranks{data}")
        config = config_of(tmp_path / "alike", {"data": data}, 2, model=model, compress=codes)
        alike = losses(replicas.run(run_training, config)[0].folder)
    assert losses(folder.path) == pytest.approx(alike, rel=1e-9 if gradients == "none" else 5e-3)
    parts = [torch.load(path, weights_only=True) for path in sorted((folder.path / "checkpoints").glob("*/part-*.pt"))[-2:]]
    first, last = (part["model"]["embed.weight"] for part in parts)
    assert torch.equal(first, last)
    moments = [part["optimizer"]["state"]["embed.weight"] for part in parts]
    assert all(torch.equal(moments[0][key], moments[1][key]) for key in moments[0])
    assert not [row for row in as_json(Facts(folder))["transfers"] if row["predicted_bytes"] is not None and not row["equal"]]


def test_replicas_that_would_average_a_tied_weight_in_two_ways_are_refused(ranks4: Pool, tmp_path: Path) -> None:
    sync, compress = {"kind": "diloco", "every": 3}, {"kind": "int4", "exclude": []}
    config = config_of(tmp_path, {"outer": 2, "pipe": 2}, 2, model={"tied": True}, sync=sync, compress=compress)
    with pytest.raises(RankFailure, match=r"layout\.outer = 2 replicas that exchange rarely would average in two ways"):
        ranks4.run(run_training, config)


@pytest.mark.long
def test_replicas_of_pipelines_exchange_rarely(ranks2: Pool, ranks4: Pool, tmp_path: Path) -> None:
    """Local steps of two pipelines equal those of two ranks with the whole model."""
    sync = {"kind": "diloco", "every": 3}
    whole = ranks2.run(run_training, config_of(tmp_path / "whole", {"outer": 2}, 4, sync=sync))[0]
    piped = ranks4.run(run_training, config_of(tmp_path / "piped", {"outer": 2, "pipe": 2}, 4, sync=sync))[0]
    assert scores(piped.folder) == pytest.approx(scores(whole.folder), rel=1e-9)


@pytest.mark.long
def test_codes_between_stages_learn_alike(ranks2: Pool, tmp_path: Path) -> None:
    plain = ranks2.run(run_training, config_of(tmp_path / "plain", {"pipe": 2}))[0]
    options = {"activations": "int8", "gradients": "int8"}
    coded = ranks2.run(run_training, config_of(tmp_path / "coded", {"pipe": 2}, pipeline=options))[0]
    assert "evaluation passes" in sent_as_predicted(coded.folder)
    assert scores(coded.folder)[12] == pytest.approx(scores(plain.folder)[12], rel=0.01)
    sent = [
        sum(row.wire_bytes_per_step for row in RunFolder.open(one.folder).predicted().transfers if row.label == "pipeline")  # type: ignore[union-attr]
        for one in (plain, coded)
    ]
    assert sent[1] < 0.25 * sent[0]


@pytest.mark.long
def test_coded_evaluations_change_no_bit_of_training(ranks4: Pool, tmp_path: Path) -> None:
    """Nor of what is owed, by which later steps would differ."""
    sections: dict[str, Any] = {"pipeline": {"activations": "int8"}, "compress": {"kind": "int4", "exclude": []}}
    found = []
    for every in (0, 2):
        config = config_of(tmp_path / str(every), {"pipe": 2, "data": 2}, train={"eval_every": every}, **sections)
        found.append(losses(ranks4.run(run_training, config)[0].folder))
    assert found[0] == found[1] and len(found[0]) == 12


@pytest.mark.long
@pytest.mark.parametrize("sync", [{}, {"kind": "diloco", "every": 4}])
def test_resumed_equals_uninterrupted_and_any_layout_may_go_on(
    ranks1: Pool, ranks2: Pool, ranks4: Pool, tmp_path: Path, sync: dict[str, Any]
) -> None:
    """In another layout too as if nothing had happened; but replicas that differ begin there from their average."""
    ranks, layout, alone = (ranks4, {"outer": 2, "pipe": 2}, {"outer": 2}) if sync else (ranks2, {"pipe": 2}, {})
    config = config_of(tmp_path, layout, sync=sync)
    whole = ranks.run(run_training, config)[0].folder
    cut = config_of(tmp_path, layout, sync=sync, train={"run": str(tmp_path / "cut")})
    assert {one.reason for one in ranks.run(run_training, cut, None, 6)} == {"interrupted"}
    shutil.copytree(tmp_path / "cut", tmp_path / "other")
    assert {one.reason for one in ranks.run(run_training, cut, tmp_path / "cut")} == {"done"}
    assert losses(tmp_path / "cut") == losses(whole) and scores(tmp_path / "cut") == scores(whole)
    other = config_of(tmp_path, alone, sync=sync, train={"run": str(tmp_path / "other")})
    assert {one.reason for one in (ranks2 if sync else ranks1).run(run_training, other, tmp_path / "other")} == {"done"}
    if not sync:
        assert losses(tmp_path / "other") == pytest.approx(losses(whole), rel=1e-9)
    for folder in (whole, tmp_path / "other"):
        trained = open_trained(folder, tmp_path / "cache")
        assert trained.step == 12 and trained.held_out_loss() == pytest.approx(trained.recorded, rel=1e-9)


def test_what_cannot_work_is_refused_before_ranks_start(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is 8 stages, and a model of 4 layers has 6 units"):
        config_of(tmp_path, {"pipe": 8})
    with pytest.raises(ValueError, match="by_speed"):
        config_of(tmp_path, {"pipe": 2}, sync={"assign": "by_speed", "accumulate": 8})
    with pytest.raises(UserError, match="needs 3 ranks"):
        config_of(tmp_path, {"pipe": 3, "data": 1}).layout.resolve(4, rare=False)
