"""Stages that keep copies of activations, and send what changed since a sample came before (AQ-SGD)."""

from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import config_of, losses, run_training, sent_as_predicted

from pool import Pool
from thinwire.parallel.apply import codec_of
from thinwire.plan.memory import need
from thinwire.record import RunFolder
from thinwire.train.task import LanguageModel

WINDOWS = 24
CODED: dict[str, Any] = {"activations": "int4", "gradients": "int8", "copies": "fp16"}


def config_with(folder: Path, layout: dict[str, int], num_micro: int = 4, **sections: Any) -> Any:
    """Of 12 steps, three of which are an epoch where a step has 8 sequences."""
    return config_of(folder, layout, num_micro, **{"data": {"windows": WINDOWS}, "pipeline": CODED} | sections)


def copies_of(folder: Path) -> list[dict[str, dict[int, torch.Tensor]]]:
    """By rank and side of a boundary, as the newest checkpoint has them."""
    newest = max((folder / "checkpoints").glob("[!.]*"))
    owns = (torch.load(path, weights_only=True) for path in sorted(newest.glob("rank-*.pt")))
    return [{side: state["copies"] for side, state in own.get("copies", {}).items()} for own in owns]


def sent_by_step(folder: Path) -> list[int]:
    """Over boundaries going forward, by rank 0, by the ledger of a step."""
    return [event.wire_bytes for event in RunFolder.open(folder).steps()]


def test_what_returns_is_sent_as_predicted(ranks2: Pool, tmp_path: Path) -> None:
    """In the first epoch by so much more; both ends hold the same copies, as many bytes as was said they would be."""
    config = config_with(tmp_path, {"pipe": 2})
    whole = ranks2.run(run_training, config)[0].folder
    assert {"pipeline", "evaluation passes"} <= sent_as_predicted(whole)
    sent = sent_by_step(whole)
    assert len(set(sent[:3])) == len(set(sent[3:])) == 1
    values, micro = 2 * 16 * 16, 4  # of a micro-batch's activation
    assert sent[0] - sent[3] == micro * (2 * values - codec_of("int4").payload_bytes(values))  # type: ignore[union-attr]
    (one, other) = copies_of(whole)
    assert len(one["output of stage 0"]) == WINDOWS
    for sample, copy in one["output of stage 0"].items():
        assert torch.equal(copy, other["input of stage 1"][sample]) and copy.dtype == torch.float16
    shape = LanguageModel(config, config.layout.resolve(2, rare=False), tmp_path / "cache").shape
    predicted = need(config, shape, config.layout.resolve(2, rare=False), casts=False)
    assert predicted.copies_bytes == sum(copy.nbytes for copy in one["output of stage 0"].values())


@pytest.mark.long
def test_a_resumed_run_is_the_same_to_the_bit(ranks2: Pool, tmp_path: Path) -> None:
    """Stopped in the third epoch."""
    whole = ranks2.run(run_training, config_with(tmp_path, {"pipe": 2}))[0].folder
    cut = config_with(tmp_path, {"pipe": 2}, train={"run": str(tmp_path / "cut")})
    assert {end.reason for end in ranks2.run(run_training, cut, None, 7)} == {"interrupted"}
    assert {end.reason for end in ranks2.run(run_training, cut, tmp_path / "cut")} == {"done"}
    assert losses(tmp_path / "cut") == losses(whole)


@pytest.mark.long
def test_a_change_is_nearer_to_what_was_meant_than_a_code_of_the_whole(ranks1: Pool, ranks2: Pool, tmp_path: Path) -> None:
    """Losses of the last epoch beside those of one rank with the same tokens; a tied gradient's codes would add errors."""
    untied = {"tied": False}
    exact = ranks1.run(run_training, config_with(tmp_path / "one", {}, model=untied, pipeline={}))[0].folder
    found = {}
    for name, options in {"copies": CODED, "plain": CODED | {"copies": "none"}}.items():
        folder = ranks2.run(run_training, config_with(tmp_path / name, {"pipe": 2}, model=untied, pipeline=options))[0].folder
        found[name] = max(abs(loss / losses(exact)[step] - 1) for step, loss in losses(folder).items() if step > 9)
    assert found["copies"] < 0.5 * found["plain"]


@pytest.mark.long
@pytest.mark.parametrize("layout", [{"pipe": 2, "data": 2}, {"pipe": 2, "tensor": 2}, {"pipe": 2, "seq": 2}], ids=str)
def test_in_any_layout_replicas_keep_their_own_samples(ranks4: Pool, tmp_path: Path, layout: dict[str, int]) -> None:
    """Other ranks resume as if samples were new, and say so."""
    replicas = layout.get("data", 1)
    config = config_with(tmp_path, layout, 4 // replicas, model={"tied": False})
    folder = ranks4.run(run_training, config)[0].folder
    sent_as_predicted(folder)
    sides = [side for rank in copies_of(folder) for side in rank.values()]
    assert {len(side) for side in sides} == {WINDOWS // replicas} and len(sides) == 4
    resolved = config.layout.resolve(4, rare=False)
    shape = LanguageModel(config, resolved, tmp_path / "cache").shape
    held = max(sum(copy.nbytes for side in rank.values() for copy in side.values()) for rank in copies_of(folder))
    assert need(config, shape, resolved, casts=False).copies_bytes == held


@pytest.mark.long
@pytest.mark.parametrize("schedule", ["gpipe", "interleaved", "zb1p", "zbv", "dualpipev"])
def test_in_every_schedule(ranks2: Pool, tmp_path: Path, schedule: str) -> None:
    config = config_with(tmp_path, {"pipe": 2}, model={"tied": False}, pipeline=CODED | {"schedule": schedule})
    folder = ranks2.run(run_training, config)[0].folder
    sent_as_predicted(folder)
    one, other = copies_of(folder)
    sides = {**one, **other}
    for stage in range(4):
        if f"output of stage {stage}" in sides:
            left, right = sides[f"output of stage {stage}"], sides[f"input of stage {stage + 1}"]
            assert left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


@pytest.mark.long
def test_another_layout_goes_on_with_samples_as_new(ranks2: Pool, ranks4: Pool, tmp_path: Path) -> None:
    sections: dict[str, Any] = {"model": {"tied": False}}
    cut = config_with(tmp_path, {"pipe": 2}, **sections)
    ranks2.run(run_training, cut, None, 6)
    other = config_with(tmp_path, {"pipe": 2, "data": 2}, 2, **sections)
    assert {end.reason for end in ranks4.run(run_training, other, Path(cut.train.run))} == {"done"}
    assert {len(side) for rank in copies_of(Path(cut.train.run)) for side in rank.values()} == {WINDOWS // 2}


def test_samples_that_do_not_return_and_changes_without_codes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"pipeline\.copies = 'fp16' is for samples that return, and data\.windows = 0"):
        config_with(tmp_path, {"pipe": 2}, data={"windows": 0})
    with pytest.raises(ValueError, match=r"copies = 'fp16' is for changes that are sent in codes"):
        config_with(tmp_path, {"pipe": 2}, pipeline={"copies": "fp16"})
    with pytest.raises(ValueError, match=r"data\.windows = 24 are of one text, and data\.sources are 2"):
        config_with(tmp_path, {}, data={"sources": [{"path": "a"}, {"path": "b"}], "windows": 24, "source": "stdlib"})
