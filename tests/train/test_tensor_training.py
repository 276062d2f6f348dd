"""Whole runs whose matrices lie on several ranks learn what one rank with the same tokens learns, and send what was predicted."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import config_of, losses, on_one_rank, run_training, scores, sent_as_predicted

from pool import Pool
from thinwire.config.run import RunConfig
from thinwire.record import RunFolder
from thinwire.report import Facts, as_json
from thinwire.train.checkpoint.files import newest_whole
from thinwire.train.trained import open_trained

pytestmark = pytest.mark.heavy

MODEL = {"layers": 2, "heads": 4, "vocabulary": 257, "positions": "learned", "norm": "layer"}
"""A vocabulary that two ranks cannot share out evenly, and a matrix that each has whole."""
ODD = MODEL | {"width": 27, "heads": 9, "kv_heads": 3, "hidden": 41}
"""And heads, hidden values and a width that two ranks cannot either."""
CLIP = {"clip": 0.05}


def tensor_config(folder: Path, layout: dict[str, int], num_micro: int = 4, **sections: Any) -> RunConfig:
    sections["train"] = CLIP | sections.get("train", {})
    return config_of(folder, layout, num_micro, **{"model": MODEL, **sections})


def alone(ranks1: Pool, folder: Path, num_micro: int, **sections: Any) -> tuple[dict[int, float], dict[int, float]]:
    return on_one_rank(ranks1, folder, num_micro, train=CLIP, **{"model": MODEL, **sections})


def parts_of_run(folder: Path) -> list[dict[str, Any]]:
    """What the files of a run's newest checkpoint hold."""
    files = sorted(newest_whole(folder / "checkpoints").glob("part-*.pt"))
    return [torch.load(file, weights_only=True) for file in files]


def assert_whole_ones_equal(folder: Path) -> None:
    """To the bit on all ranks, values and moments."""
    parts, seen = parts_of_run(folder), dict[str, torch.Tensor]()
    for part in parts:
        for name in part["model"].keys() - part["shards"].keys():
            for key, value in {"": part["model"][name], **part["optimizer"]["state"][name]}.items():
                assert torch.equal(seen.setdefault(f"{name} {key}", value), value), name
    assert len(parts) > 1 and any("norm" in name for name in seen)


LAYOUTS = [
    ("ranks2", {"tensor": 2}, {}),
    ("ranks4", {"tensor": 2, "pipe": 2}, {"pipeline": {"schedule": "1f1b"}}),
    ("ranks4", {"tensor": 4}, {}),
    ("ranks4", {"tensor": 2, "pipe": 2}, {"pipeline": {"schedule": "zbv"}}),
    ("ranks4", {"tensor": 2, "pipe": 2}, {"pipeline": {"schedule": "zb1p"}, "model": {**MODEL, "tied": False}}),
    ("ranks8", {"tensor": 2, "pipe": 2, "data": 2}, {}),
    ("ranks4", {"tensor": 2, "data": 2}, {"model": {**MODEL, "tied": False}}),
    ("ranks4", {"tensor": 2, "pipe": 2}, {"model": ODD}),
    ("ranks4", {"tensor": 2, "data": 2}, {"model": ODD}),
    ("ranks2", {"tensor": 2}, {"model": ODD}),
]


@pytest.mark.parametrize(("pool", "layout", "sections"), LAYOUTS, ids=lambda value: str(value))
def test_a_run_equals_one_rank_and_its_prediction(
    ranks1: Pool,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    pool: str,
    layout: dict[str, int],
    sections: dict[str, Any],
) -> None:
    ranks: Pool = request.getfixturevalue(pool)
    model = {"model": sections["model"]} if "model" in sections else {}
    expected = alone(ranks1, tmp_path / "one", 4 * layout.get("data", 1), **model)
    outcome = ranks.run(run_training, tensor_config(tmp_path / "split", layout, **sections))[0]
    assert losses(outcome.folder) == pytest.approx(expected[0], rel=1e-9)
    assert scores(outcome.folder) == pytest.approx(expected[1], rel=1e-9)
    assert_whole_ones_equal(outcome.folder)
    labels = {"activations", "activation gradients", "gradient norm", "summary", "evaluation passes"}
    assert labels <= sent_as_predicted(outcome.folder)
    if "pipe" not in layout:  # where other ranks send what rank 0 does not
        of_the_loop, facts = {"summary", "evaluation", "checkpoint"}, as_json(Facts(RunFolder.open(outcome.folder)))
        assert {row["label"] for row in facts["transfers"] if row["axis"] == "tensor"} | of_the_loop == {
            *labels,
            "loss",
        } | of_the_loop


@pytest.mark.long
def test_replicas_of_tensor_ranks_exchange_rarely(ranks2: Pool, ranks4: Pool, tmp_path: Path) -> None:
    """Local steps of two pairs equal those of two ranks with the whole model."""
    sync = {"kind": "diloco", "every": 3}
    whole = ranks2.run(run_training, tensor_config(tmp_path / "whole", {"outer": 2}, 4, sync=sync))[0]
    split = ranks4.run(run_training, tensor_config(tmp_path / "split", {"outer": 2, "tensor": 2}, 4, sync=sync))[0]
    assert scores(split.folder) == pytest.approx(scores(whole.folder), rel=1e-9)
    assert_whole_ones_equal(split.folder)


@pytest.mark.long
def test_coded_sums_send_less_and_learn_alike(ranks2: Pool, tmp_path: Path) -> None:
    model = {**MODEL, "dtype": "float32"}
    plain = ranks2.run(run_training, tensor_config(tmp_path / "plain", {"tensor": 2}, model=model))[0]
    coded = ranks2.run(run_training, tensor_config(tmp_path / "coded", {"tensor": 2}, model=model, tensor={"sums": "int8"}))[0]
    assert scores(coded.folder)[12] == pytest.approx(scores(plain.folder)[12], rel=0.01)
    assert losses(coded.folder) != losses(plain.folder)
    assert_whole_ones_equal(coded.folder)
    rows = [as_json(Facts(RunFolder.open(one.folder)))["transfers"] for one in (plain, coded)]
    assert not [row for row in rows[1] if row["predicted_bytes"] is not None and not row["equal"]]
    sent = [sum(row["ledger_bytes_high"] for row in some if row["label"].startswith("activation")) for some in rows]
    assert sent[1] < 0.3 * sent[0]


def interrupted(ranks: Pool, config: RunConfig) -> Path:
    """Asked to stop after six steps."""
    outcomes = ranks.run(run_training, config, None, 6)
    assert {one.reason for one in outcomes} == {"interrupted"}
    return outcomes[0].folder


CODED = {"kind": "int4", "exclude": [], "vectors": True, "exchange": "gather"}


@pytest.mark.long
@pytest.mark.parametrize(
    "sections", [{}, pytest.param({"compress": CODED}, marks=pytest.mark.long), {"sync": {"kind": "diloco", "every": 4}}], ids=str
)
def test_resumed_equals_uninterrupted(ranks2: Pool, ranks4: Pool, tmp_path: Path, sections: dict[str, Any]) -> None:
    ranks, layout = (ranks2, {"tensor": 2})
    if sections:
        ranks, layout = (ranks4, {"tensor": 2, "outer" if "sync" in sections else "data": 2})
    whole = ranks.run(run_training, tensor_config(tmp_path, layout, **sections))[0].folder
    cut = tensor_config(tmp_path, layout, train={"run": str(tmp_path / "cut")}, **sections)
    interrupted(ranks, cut)
    assert {one.reason for one in ranks.run(run_training, cut, tmp_path / "cut")} == {"done"}
    assert losses(tmp_path / "cut") == losses(whole) and scores(tmp_path / "cut") == scores(whole)


ONE_REPLICA = [("ranks1", {}), ("ranks4", {"tensor": 4}), ("ranks2", {"pipe": 2}), ("ranks4", {"pipe": 2, "tensor": 2})]


@pytest.mark.long
@pytest.mark.parametrize(
    ("first", "others"),
    [
        (("ranks2", {"tensor": 2}), ONE_REPLICA[:1]),
        (("ranks2", {"tensor": 2}), ONE_REPLICA[1:]),
        (("ranks2", {"pipe": 2}), [("ranks2", {"tensor": 2}), ("ranks4", {"pipe": 2, "tensor": 2})]),
        (("ranks4", {"pipe": 2, "tensor": 2}), [("ranks2", {"tensor": 2}), ("ranks2", {"pipe": 2})]),
        (("ranks1", {}), [("ranks2", {"tensor": 2})]),
    ],
    ids=lambda value: str(value[1]) if isinstance(value, tuple) else "",
)
def test_any_layout_goes_on_with_what_any_other_wrote(
    request: pytest.FixtureRequest, tmp_path: Path, first: tuple[str, dict[str, int]], others: list[tuple[str, dict[str, int]]]
) -> None:
    """As if nothing had happened, also where parts are uneven; and the weights are the whole model's for whoever reads them."""
    model = MODEL | {"width": 20, "heads": 5, "hidden": 41}
    pool, layout = first
    ranks: Pool = request.getfixturevalue(pool)
    whole = ranks.run(run_training, tensor_config(tmp_path, layout, model=model))[0].folder
    cut = interrupted(ranks, tensor_config(tmp_path, layout, model=model, train={"run": str(tmp_path / "cut")}))
    for number, (other_pool, other) in enumerate(others):
        folder = tmp_path / f"other{number}"
        shutil.copytree(cut, folder)
        config = tensor_config(tmp_path, other, model=model, train={"run": str(folder)})
        assert {one.reason for one in request.getfixturevalue(other_pool).run(run_training, config, folder)} == {"done"}
        assert losses(folder) == pytest.approx(losses(whole), rel=1e-9)
        trained = open_trained(folder, tmp_path / "cache")
        assert trained.step == 12 and trained.held_out_loss() == pytest.approx(trained.recorded, rel=1e-9)


@pytest.mark.long
@pytest.mark.parametrize("sections", [{}, {"compress": CODED}], ids=str)
def test_replicas_go_on_with_what_tensor_ranks_wrote_and_the_other_way_round(
    ranks4: Pool, tmp_path: Path, sections: dict[str, Any]
) -> None:
    """Of as many tokens a step: two pairs of tensor ranks, four replicas, four tensor ranks, and two pairs again. What each rank
    has whole stays equal to the bit, also where its gradients are coded."""
    pairs: dict[str, int] = {"tensor": 2, "data": 2}
    whole = ranks4.run(run_training, tensor_config(tmp_path, pairs, 4, **sections))[0].folder
    run = {"run": str(tmp_path / "cut")}
    interrupted(ranks4, tensor_config(tmp_path, pairs, 4, train=run, **sections))
    turns: list[tuple[dict[str, int], int, int]] = [({"data": 4}, 2, 8), ({"tensor": 4}, 8, 10), (pairs, 4, 99)]
    for layout, num_micro, stop_after in turns:
        config = tensor_config(tmp_path, layout, num_micro, train=run, **sections)
        outcomes = ranks4.run(run_training, config, tmp_path / "cut", stop_after)
        assert {one.reason for one in outcomes} == {"interrupted" if stop_after < 12 else "done"}
    rel = 1e-3 if sections else 1e-9
    assert losses(tmp_path / "cut") == pytest.approx(losses(whole), rel=rel)
    assert_whole_ones_equal(whole)
    assert_whole_ones_equal(tmp_path / "cut")


@pytest.mark.long
def test_replicas_that_differ_go_on_from_their_average_whatever_parts_they_had(
    ranks2: Pool, ranks4: Pool, tmp_path: Path
) -> None:
    """Anchors and outer momenta of tensor ranks, of stages and of whole models lead to the same losses."""
    found, sync = [], {"kind": "diloco", "every": 4}
    for parts in ("tensor", "pipe"):
        run = {"run": str(tmp_path / parts)}
        interrupted(ranks4, tensor_config(tmp_path, {"outer": 2, parts: 2}, sync=sync, train=run))
        other = {"outer": 2, "tensor": 2} if parts == "pipe" else {"outer": 2}
        config = tensor_config(tmp_path, other, sync=sync, train=run)
        ranks = ranks4 if parts == "pipe" else ranks2
        assert {one.reason for one in ranks.run(run_training, config, tmp_path / parts)} == {"done"}
        found.append(losses(tmp_path / parts))
    assert found[0] == pytest.approx(found[1], rel=1e-9)


def test_what_cannot_work_is_refused_before_ranks_start(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model.kv_heads = 4; take layout.tensor = 4 or less"):
        tensor_config(tmp_path, {"tensor": 5})
    with pytest.raises(ValueError, match=r"by_speed.* leave it out with layout.tensor"):
        tensor_config(tmp_path, {"tensor": 2}, sync={"assign": "by_speed", "accumulate": 8})
    with pytest.raises(ValueError, match="'muon' orthonormalises whole matrices"):
        tensor_config(tmp_path, {"tensor": 2}, train={"optimizer": {"kind": "muon"}})
    with pytest.raises(ValueError, match="set it to 'native'"):
        tensor_config(tmp_path, {"tensor": 2}, collectives={"kind": "measured"})
