"""Runs whose sequences lie on several ranks learn what one rank with the same tokens learns, and send what was predicted."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import config_of, losses, on_one_rank, run_training, scores, sent_as_predicted

from pool import Pool
from thinwire.config.run import RunConfig
from thinwire.record import RunFolder
from thinwire.train.checkpoint.files import newest_whole
from thinwire.train.trained import open_trained

pytestmark = pytest.mark.heavy

CLIP = {"clip": 0.05}
MODEL = {"layers": 2, "heads": 4, "kv_heads": 2}


def seq_config(folder: Path, layout: dict[str, int], num_micro: int = 4, **sections: Any) -> RunConfig:
    """A small step clips often; text that does not fill the last sequences of the held-out part leaves ranks without targets."""
    sections = {"model": MODEL, **sections, "train": {**CLIP, "eval_tokens": 505, **sections.get("train", {})}}
    return config_of(folder, layout, num_micro, **sections)


def of_one_rank(ranks1: Pool, folder: Path, num_micro: int, **sections: Any) -> tuple[dict[int, float], dict[int, float]]:
    return on_one_rank(ranks1, folder, num_micro, **{"model": MODEL, **sections, "train": {**CLIP, "eval_tokens": 505}})


def own_models(folder: Path) -> list[dict[str, torch.Tensor]]:
    """Of each rank, where replicas differ."""
    files = sorted(newest_whole(folder / "checkpoints").glob("rank-*.pt"))
    return [torch.load(file, weights_only=True)["model"] for file in files]


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """To the bit."""
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


LAYOUTS = [
    ("ranks2", {"seq": 2}, {}),
    ("ranks4", {"seq": 4}, {"model": {**MODEL, "positions": "learned", "norm": "layer", "tied": False}}),
    ("ranks4", {"data": 2, "seq": 2}, {}),
    ("ranks4", {"seq": 2, "tensor": 2}, {}),
    ("ranks4", {"seq": 2, "tensor": 2}, {"model": {**MODEL, "width": 24, "heads": 6, "kv_heads": 3}}),
    ("ranks4", {"pipe": 2, "seq": 2}, {"pipeline": {"schedule": "zbv"}, "model": {**MODEL, "layers": 4}}),
    ("ranks4", {"pipe": 2, "seq": 2}, {"pipeline": {"schedule": "zb1p"}, "model": {**MODEL, "positions": "learned"}}),
    ("ranks8", {"pipe": 2, "seq": 2, "tensor": 2}, {}),
    ("ranks4", {"pipe": 2, "seq": 2}, {"pipeline": {"schedule": "1f1b"}}),
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
    expected = of_one_rank(ranks1, tmp_path / "one", 4 * layout.get("data", 1), **model)
    outcome = ranks.run(run_training, seq_config(tmp_path / "shared", layout, **sections))[0]
    assert losses(outcome.folder) == pytest.approx(expected[0], rel=1e-9)
    assert scores(outcome.folder) == pytest.approx(expected[1], rel=1e-9)
    sent = {"keys and values", "gradients of keys and values", "bucket 0", "summary", "evaluation passes"}
    assert sent <= sent_as_predicted(outcome.folder)
    steps = {event.step: event.tokens for event in RunFolder.open(outcome.folder).steps()}
    assert steps[12] == 12 * 4 * layout.get("data", 1) * 2 * 16


@pytest.mark.long
@pytest.mark.parametrize("inside", [1, 2])
def test_replicas_of_ranks_that_share_sequences_exchange_rarely(
    ranks2: Pool, ranks4: Pool, ranks8: Pool, tmp_path: Path, inside: int
) -> None:
    """Local steps of two pairs equal those of two ranks, and of pairs of pairs those of two pairs of replicas."""
    sync = {"kind": "diloco", "every": 3}
    layout: dict[str, int] = {"outer": 2, "data": inside}
    whole = (ranks2 if inside == 1 else ranks4).run(run_training, seq_config(tmp_path / "whole", layout, 4, sync=sync))[0]
    ranks = ranks4 if inside == 1 else ranks8
    shared = ranks.run(run_training, seq_config(tmp_path / "shared", {**layout, "seq": 2}, 4, sync=sync), timeout_s=50)[0]
    assert losses(shared.folder) == pytest.approx(losses(whole.folder), rel=1e-9)
    assert scores(shared.folder) == pytest.approx(scores(whole.folder), rel=1e-9)
    assert {"keys and values", "bucket 0", "fragment 0 float64"} <= sent_as_predicted(shared.folder)
    models = own_models(shared.folder)
    for first in range(0, len(models), 2 * inside):
        for other in models[first + 1 : first + 2 * inside]:
            assert_equal(models[first], other)


CODED = {"kind": "int4", "exclude": [], "vectors": True}


@pytest.mark.long
@pytest.mark.parametrize("kind", ["int8", "demo", "int4"])
def test_coded_gradients_of_shares_learn_alike_and_resume_bit_for_bit(ranks2: Pool, tmp_path: Path, kind: str) -> None:
    """What ranks of a sequence owe to the average is kept as what replicas owe is."""
    optimizer = {"train": {"optimizer": {"kind": "signsgd"}}} if kind == "demo" else {}
    sections = {"compress": {**CODED, "kind": kind}, "model": {**MODEL, "dtype": "float32"}, **optimizer}
    config = seq_config(tmp_path, {"seq": 2}, **sections)
    whole = ranks2.run(run_training, config)[0].folder
    assert "keys and values" in sent_as_predicted(whole)
    sections["train"] = {**sections.get("train", {}), "run": str(tmp_path / "cut")}
    cut = seq_config(tmp_path, {"seq": 2}, **sections)
    assert {one.reason for one in ranks2.run(run_training, cut, None, 6)} == {"interrupted"}
    assert {one.reason for one in ranks2.run(run_training, cut, tmp_path / "cut")} == {"done"}
    assert losses(tmp_path / "cut") == losses(whole) and scores(tmp_path / "cut") == scores(whole)
    if kind != "demo":
        plain = ranks2.run(run_training, seq_config(tmp_path / "plain", {"seq": 2}, model=sections["model"]))[0].folder
        assert scores(whole)[12] == pytest.approx(scores(plain)[12], rel=0.02)


ONE_REPLICA = [("ranks1", {}), ("ranks2", {"tensor": 2}), ("ranks4", {"pipe": 2, "seq": 2}), ("ranks4", {"seq": 4})]


@pytest.mark.long
@pytest.mark.parametrize(
    ("first", "others"),
    [
        (("ranks2", {"seq": 2}), ONE_REPLICA[:2]),
        (("ranks2", {"seq": 2}), ONE_REPLICA[2:]),
        (("ranks4", {"seq": 2, "tensor": 2}), [("ranks2", {"seq": 2}), ("ranks2", {"pipe": 2})]),
        (("ranks2", {"tensor": 2}), [("ranks2", {"seq": 2})]),
        (("ranks1", {}), [("ranks2", {"seq": 2})]),
    ],
    ids=lambda value: str(value[1]) if isinstance(value, tuple) else "",
)
def test_any_layout_goes_on_with_what_any_other_wrote(
    request: pytest.FixtureRequest, tmp_path: Path, first: tuple[str, dict[str, int]], others: list[tuple[str, dict[str, int]]]
) -> None:
    """As if nothing had happened; and the weights are the whole model's, written once, for whoever reads them."""
    pool, layout = first
    ranks: Pool = request.getfixturevalue(pool)
    whole = ranks.run(run_training, seq_config(tmp_path, layout))[0].folder
    cut = seq_config(tmp_path, layout, train={"run": str(tmp_path / "cut")})
    assert {one.reason for one in ranks.run(run_training, cut, None, 6)} == {"interrupted"}
    if layout == {"seq": 2}:
        assert len(list(newest_whole(tmp_path / "cut" / "checkpoints").glob("*.distcp"))) == 1
    for number, (other_pool, other) in enumerate(others):
        folder = tmp_path / f"other{number}"
        shutil.copytree(tmp_path / "cut", folder)
        config = seq_config(tmp_path, other, train={"run": str(folder)})
        assert {one.reason for one in request.getfixturevalue(other_pool).run(run_training, config, folder)} == {"done"}
        assert losses(folder) == pytest.approx(losses(whole), rel=1e-9)
        trained = open_trained(folder, tmp_path / "cache")
        assert trained.step == 12 and trained.held_out_loss() == pytest.approx(trained.recorded, rel=1e-9)


@pytest.mark.long
@pytest.mark.parametrize("sections", [{}, {"compress": CODED}], ids=str)
def test_replicas_go_on_with_what_ranks_of_a_sequence_wrote_and_the_other_way_round(
    ranks4: Pool, tmp_path: Path, sections: dict[str, Any]
) -> None:
    """Of as many tokens a step: two pairs, four replicas, four ranks of a sequence, and two pairs again."""
    pairs: dict[str, int] = {"data": 2, "seq": 2}
    whole = ranks4.run(run_training, seq_config(tmp_path, pairs, 4, **sections))[0].folder
    run = {"run": str(tmp_path / "cut")}
    turns: list[tuple[dict[str, int], int, int]] = [(pairs, 4, 6), ({"data": 4}, 2, 8), ({"seq": 4}, 8, 10), (pairs, 4, 99)]
    for layout, num_micro, stop_after in turns:
        config, resume = seq_config(tmp_path, layout, num_micro, train=run, **sections), tmp_path / "cut"
        outcomes = ranks4.run(run_training, config, resume if resume.exists() else None, stop_after)
        assert {one.reason for one in outcomes} == {"interrupted" if stop_after < 12 else "done"}
    assert losses(tmp_path / "cut") == pytest.approx(losses(whole), rel=1e-3 if sections else 1e-9)


@pytest.mark.long
def test_ranks_of_a_sequence_go_on_from_the_average_of_replicas_that_differed(ranks1: Pool, ranks2: Pool, tmp_path: Path) -> None:
    """As many ranks as there were replicas, which all begin alike: as one rank does that goes on alone."""
    sync = {"kind": "diloco", "every": 4}
    run = {"run": str(tmp_path / "cut")}
    outcomes = ranks2.run(run_training, seq_config(tmp_path, {"outer": 2}, sync=sync, train=run), None, 6)
    assert {one.reason for one in outcomes} == {"interrupted"}
    found = []
    for ranks, layout in ((ranks1, {"outer": 1}), (ranks2, {"outer": 1, "seq": 2})):
        folder = tmp_path / str(layout)
        shutil.copytree(tmp_path / "cut", folder)
        config = seq_config(tmp_path, layout, sync=sync, train={"run": str(folder)})
        assert {one.reason for one in ranks.run(run_training, config, folder)} == {"done"}
        found.append(losses(folder))
    assert found[1] == pytest.approx(found[0], rel=1e-9)
    assert_equal(*own_models(folder))


def test_what_cannot_work_is_refused_before_ranks_start(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"layout.seq = 3: .* 16 tokens are no multiple of 6; the nearest degree .* is 2"):
        seq_config(tmp_path, {"seq": 3})
    with pytest.raises(ValueError, match=r"by_speed.* leave it out with layout.seq"):
        seq_config(tmp_path, {"seq": 2}, sync={"assign": "by_speed", "accumulate": 8})
    with pytest.raises(ValueError, match=r"every_inside = 2 lets ranks .* take steps alone.* leave it out with layout.seq"):
        seq_config(tmp_path, {"seq": 2}, sync={"kind": "local_sgd", "every": 4, "every_inside": 2})
