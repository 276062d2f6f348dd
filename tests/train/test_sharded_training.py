"""Whole runs whose ranks share the states of a replica learn what one rank with the same tokens learns, and send what was
predicted."""

from pathlib import Path
from statistics import median
from typing import Any

import pytest
from small_run import config_of, losses, on_one_rank, run_training, scores

from pool import Pool, Rank
from thinwire.config.run import RunConfig
from thinwire.parallel.sharded import LocalShards
from thinwire.record import RunFolder
from thinwire.report import Facts, as_json
from thinwire.train.trained import open_trained
from thinwire.train.worker import Outcome

pytestmark = pytest.mark.heavy

MODEL = {"layers": 3, "width": 18, "heads": 3, "vocabulary": 257, "positions": "learned", "norm": "layer"}
"""Matrices and vectors of which two, or four, ranks cannot have as much each."""
TRAIN = {"clip": 0.05, "eval_tokens": 700}
"""Of the held-out part some ranks have a batch less."""


def sharded_config(folder: Path, layout: dict[str, int], num_micro: int = 2, **sections: Any) -> RunConfig:
    sections["train"] = TRAIN | sections.get("train", {})
    return config_of(folder, layout, num_micro, **{"model": MODEL, **sections})


def alone(ranks1: Pool, folder: Path, num_micro: int, **sections: Any) -> tuple[dict[int, float], dict[int, float]]:
    sections["train"] = TRAIN | sections.get("train", {})
    return on_one_rank(ranks1, folder, num_micro, **{"model": MODEL, **sections})


SGD = {"optimizer": {"kind": "sgd"}}
LAYOUTS = [
    ("ranks4", {"shard": 2, "data": 2}, {}),
    ("ranks2", {"shard": 2}, {"sharded": {"reshard": "never"}, "model": {**MODEL, "tied": False}}),
    ("ranks4", {"shard": 4}, {"train": SGD}),
    ("ranks4", {"shard": 2, "pipe": 2}, {"pipeline": {"schedule": "1f1b"}}),
    ("ranks4", {"shard": 2, "pipe": 2}, {"pipeline": {"schedule": "zbv"}, "model": {**MODEL, "tied": False}}),
    ("ranks4", {"shard": 2, "data": 2}, {"sharded": {"reshard": "never"}, "train": SGD}),
    ("ranks4", {"shard": 2, "tensor": 2}, {}),
    ("ranks2", {"shard": 2}, {"train": {"optimizer": {"kind": "signsgd"}, "learning_rate": 1e-4}}),
    pytest.param("ranks4", {"shard": 2, "seq": 2}, {"sharded": {"reshard": "never"}}, marks=pytest.mark.long),
    pytest.param("ranks4", {"shard": 2, "seq": 2}, {"train": {"recompute": "full"}}, marks=pytest.mark.long),
    pytest.param("ranks4", {"shard": 2, "tensor": 2}, {"train": {"recompute": "selective"}}, marks=pytest.mark.long),
    pytest.param("ranks8", {"pipe": 2, "shard": 2, "tensor": 2}, {}, marks=pytest.mark.long),
]


@pytest.mark.parametrize(("pool", "layout", "sections"), LAYOUTS, ids=str)
def test_a_run_equals_one_rank_and_its_prediction(
    ranks1: Pool,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    pool: str,
    layout: dict[str, int],
    sections: dict[str, Any],
) -> None:
    ranks: Pool = request.getfixturevalue(pool)
    of_one = {name: section for name, section in sections.items() if name not in ("sharded", "pipeline")}
    expected = alone(ranks1, tmp_path / "one", 8, **of_one)
    num_micro = 8 // (layout.get("shard", 1) * layout.get("data", 1))
    outcome = ranks.run(run_training, sharded_config(tmp_path / "shared", layout, num_micro, **sections))[0]
    assert losses(outcome.folder) == pytest.approx(expected[0], rel=1e-9)
    assert scores(outcome.folder) == pytest.approx(expected[1], rel=1e-9)
    assert_sent_as_predicted(outcome.folder)


def run_behind(context: Rank, config: RunConfig) -> Outcome:
    """Averages go out when the passes are over."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalShards, "_hand_over", lambda *_: None)
        return run_training(context, config)


def run_counted(context: Rank, config: RunConfig) -> tuple[Outcome, int]:
    """And how many units were handed over."""
    handed, hand_over = [], LocalShards._hand_over
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalShards, "_hand_over", lambda self, *given: handed.append(given) or hand_over(self, *given))
        return run_training(context, config), len(handed)


@pytest.mark.long
@pytest.mark.parametrize("sections", [{"compress": {"kind": "int8"}}, {"sync": {"bucket_bytes": 4096}}], ids=str)
def test_averages_within_the_backward_pass_are_those_behind_it(ranks4: Pool, tmp_path: Path, sections: dict[str, Any]) -> None:
    """Bit for bit, in float32, where every unit goes out as soon as it is reduced; what is sent is predicted."""
    layout, model = {"shard": 2, "data": 2}, {"model": {**MODEL, "dtype": "float32"}}
    run = {"train": {"run": str(tmp_path / "within")}}
    outcome, handed = ranks4.run(run_counted, sharded_config(tmp_path, layout, **model, **sections, **run))[0]
    assert handed == 12 * 4, "three blocks and the root in each step"
    assert_sent_as_predicted(outcome.folder)
    behind = ranks4.run(run_behind, sharded_config(tmp_path, layout, **model, **sections))[0].folder
    assert losses(outcome.folder) == losses(behind) and scores(outcome.folder) == scores(behind)


def assert_sent_as_predicted(folder: Path) -> None:
    """To the byte, and nothing else in steps, but for replicas of the other shards, which are smaller."""
    opened = RunFolder.open(folder)
    rows = as_json(Facts(opened))["transfers"]
    predicted = [row for row in rows if row["predicted_bytes"] is not None]
    labels = {row["label"] for row in predicted}
    assert {"gradient norm", "evaluation passes"} <= labels
    assert {"unit root weights", "unit blocks.0 gradients"} <= labels or {"stage weights", "stage gradients"} <= labels
    assert not [row for row in predicted if not row["equal"]]
    others = {row["label"] for row in rows if row not in predicted and row["axis"] != "data" and row["op"] != "recv"}
    assert others <= {"checkpoint", "results"} or "stage weights" in labels  # where other stages send what rank 0 does not
    each_step = sum(row.wire_bytes_per_step for row in opened.predicted().transfers if row.every == 1)  # type: ignore[union-attr]
    assert median(event.wire_bytes for event in opened.steps()) == each_step


def interrupted(ranks: Pool, config: RunConfig, stop_after: int = 6) -> Path:
    outcomes = ranks.run(run_training, config, None, stop_after)
    assert {one.reason for one in outcomes} == {"interrupted"}
    return outcomes[0].folder


CODED = {"kind": "int4", "exclude": [], "vectors": True}
CODED_SHARDS = {"gradients": "int4", "weights": "int8"}


@pytest.mark.long
@pytest.mark.parametrize("sections", [{"compress": CODED}, {"sharded": CODED_SHARDS}, {"sharded": {"reshard": "never"}}], ids=str)
def test_resumed_equals_uninterrupted(ranks4: Pool, tmp_path: Path, sections: dict[str, Any]) -> None:
    """Bit for bit, with what codes owe."""
    layout = {"shard": 2, "data": 2}
    whole = ranks4.run(run_training, sharded_config(tmp_path, layout, **sections))[0].folder
    assert_sent_as_predicted(whole)
    cut = sharded_config(tmp_path, layout, **{**sections, "train": {"run": str(tmp_path / "cut")}})
    interrupted(ranks4, cut)
    assert {one.reason for one in ranks4.run(run_training, cut, tmp_path / "cut")} == {"done"}
    assert losses(tmp_path / "cut") == losses(whole) and scores(tmp_path / "cut") == scores(whole)


TURNS = [
    [("shard", 4), ("data", 4), ("shard", 2), ("tensor", 2), ("shard", 4)],
    [("shard", 2), ("tensor", 2), ("pipe", 2), ("data", 4), ("pipe", 2)],
    [("both", 2), ("shard", 4), ("seq", 2), ("both", 2), ("tensor", 2)],
]
DEGREES: dict[tuple[str, int], dict[str, int]] = {
    ("shard", 4): {"shard": 4},
    ("shard", 2): {"shard": 2, "data": 2},
    ("data", 4): {"data": 4},
    ("pipe", 2): {"pipe": 2, "shard": 2},
    ("tensor", 2): {"tensor": 2, "pipe": 2},
    ("both", 2): {"shard": 2, "tensor": 2},
    ("seq", 2): {"shard": 2, "seq": 2},
}


@pytest.mark.long
@pytest.mark.parametrize("turns", TURNS, ids=str)
def test_any_layout_goes_on_with_what_any_other_wrote(
    ranks1: Pool, ranks4: Pool, tmp_path: Path, turns: list[tuple[str, int]]
) -> None:
    """With the moments, and as many tokens a step; then the weights are the whole model's for whoever reads them."""
    model = {"model": {**MODEL, "width": 20, "heads": 2}}
    expected = alone(ranks1, tmp_path / "one", 8, **model)
    run = {"run": str(tmp_path / "run")}
    for number, turn in enumerate(turns):
        layout, stop_after = DEGREES[turn], 3 * (number + 1) - 1
        replicas = layout.get("shard", 1) * layout.get("data", 1)
        config = sharded_config(tmp_path, layout, 8 // replicas, train=run, **model)
        outcomes = ranks4.run(run_training, config, tmp_path / "run" if number else None, stop_after)
        assert {one.reason for one in outcomes} == {"interrupted" if stop_after < 12 else "done"}
    assert losses(tmp_path / "run") == pytest.approx(expected[0], rel=1e-9)
    trained = open_trained(tmp_path / "run", tmp_path / "cache")
    assert trained.step == 12 and trained.held_out_loss() == pytest.approx(expected[1][12], rel=1e-9)


@pytest.mark.long
def test_what_codes_owe_moves_with_the_shards(ranks4: Pool, tmp_path: Path) -> None:
    """To other numbers of shards, and to none, which says so; learning goes on nearly as if nothing had been."""
    sections: dict[str, Any] = {"sharded": CODED_SHARDS, "compress": CODED}
    whole = ranks4.run(run_training, sharded_config(tmp_path, {"shard": 2, "data": 2}, **sections))[0].folder
    run = {"run": str(tmp_path / "cut")}
    interrupted(ranks4, sharded_config(tmp_path, {"shard": 2, "data": 2}, train=run, **sections), 3)
    for layout, stop_after in (({"shard": 4}, 6), ({"shard": 2, "data": 2}, 9), ({"data": 4}, 99)):
        config = sharded_config(tmp_path, layout, train=run, **sections)
        assert ranks4.run(run_training, config, tmp_path / "cut", stop_after)[0].reason
    assert losses(tmp_path / "cut") == pytest.approx(losses(whole), rel=2e-3)


@pytest.mark.long
@pytest.mark.parametrize("sync", [{"kind": "diloco", "every": 3}, {"kind": "noloco", "every": 4}], ids=str)
def test_replicas_that_share_states_inside_exchange_rarely(ranks4: Pool, tmp_path: Path, sync: dict[str, Any]) -> None:
    """As replicas of two ranks that each have all, also when they are interrupted."""
    whole = ranks4.run(run_training, sharded_config(tmp_path / "whole", {"outer": 2, "data": 2}, sync=sync))[0]
    cut = sharded_config(tmp_path / "split", {"outer": 2, "shard": 2}, sync=sync)
    interrupted(ranks4, cut, 5)
    assert {one.reason for one in ranks4.run(run_training, cut, tmp_path / "split" / "run")} == {"done"}
    assert losses(tmp_path / "split" / "run") == pytest.approx(losses(whole.folder), rel=1e-9)
    assert scores(tmp_path / "split" / "run") == pytest.approx(scores(whole.folder), rel=1e-9)


def test_what_cannot_work_is_refused_before_ranks_start(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"by_speed.* leave it out with layout.shard"):
        sharded_config(tmp_path, {"shard": 2}, sync={"assign": "by_speed", "accumulate": 8})
    with pytest.raises(ValueError, match="'muon' orthonormalises whole matrices"):
        sharded_config(tmp_path, {"shard": 2}, train={"optimizer": {"kind": "muon"}})
    with pytest.raises(ValueError, match=r"share the optimizer's state alone; leave the section out"):
        sharded_config(tmp_path, {"shard": 2, "pipe": 2}, sharded={"gradients": "int8"})
    with pytest.raises(ValueError, match="set it to 'native'"):
        sharded_config(tmp_path, {"shard": 2}, collectives={"kind": "measured"})
