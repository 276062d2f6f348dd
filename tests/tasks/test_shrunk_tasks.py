"""Models of the catalogue in fewer bytes: what a run with the rounding in place scores is the score when it is shrunk."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from equality import judged, run_config, watched_training
from own_pictures import make_coco
from test_image_classification import make_images
from test_speech import make_folder
from test_texts import GIVEN, write
from test_translation import make_pairs

from pool import Pool
from thinwire.cli.main import app
from thinwire.compress.weights.rounding import rounded
from thinwire.compress.weights.shrink import Blocks, load_shrunk
from thinwire.config.run import RunConfig
from thinwire.errors import UserError
from thinwire.layout import Layout
from thinwire.tasks.catalogue import CATALOGUE, make_task
from thinwire.train.trained import open_trained

pytestmark = pytest.mark.heavy

QUICK = ("image_classification", "lm_lstm")


def own(folder: Path, kind: str) -> dict[str, Any]:
    """The task's section, on tiny data."""
    if kind in ("detection", "segmentation"):
        return {"kind": kind, "source": str(make_coco(folder / "data")), "width": 8}
    if kind == "image_classification":
        return {"kind": kind, "source": str(make_images(folder / "images")), "width": 8}
    if kind == "speech":
        return {"kind": kind, "source": str(make_folder(folder / "wav")), "width": 8, "layers": 1}
    source = make_pairs(folder / "own.csv") if kind == "translation" else write(folder / "own.jsonl", kind)
    return {"kind": kind, "source": str(source), "width": 32, "layers": 1}


def test_every_kind_is_tried() -> None:
    assert {*GIVEN, "detection", "image_classification", "segmentation", "speech", "translation"} == set(CATALOGUE)


@pytest.mark.parametrize("kind", [one if one in QUICK else pytest.param(one, marks=pytest.mark.long) for one in CATALOGUE])
def test_a_shrunk_model_scores_what_the_run_did_with_the_rounding_in_place(
    ranks1: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    config = run_config(tmp_path / "it", own(tmp_path, kind), train={"rounded": "int4"})
    folder, _ = ranks1.run(watched_training, config)[0]
    monkeypatch.chdir(tmp_path)
    app(["shrink", str(folder), "--int4", "--out", "small.pt", "--json", "it.json"], standalone_mode=False)
    numbers = json.loads((tmp_path / "it.json").read_text())
    assert numbers["loss_after"] == pytest.approx(numbers["recorded_loss"], rel=1e-6)  # vectors are stored in float32
    assert numbers["score_after"] == pytest.approx(judged(folder)[6], rel=1e-6)
    assert abs(numbers["loss_before"] / numbers["loss_after"] - 1) > 1e-5
    assert numbers["matrices_shrunk"] > 0 and numbers["bytes_after"] < numbers["bytes_before"] / 4
    trained = open_trained(folder, tmp_path)
    trained.model.load_state_dict(load_shrunk(tmp_path / "small.pt"), strict=False)  # batch norms have statistics besides
    assert trained.scored() == (numbers["loss_after"], numbers["score_after"])


def test_gradients_are_those_at_the_rounded_weights_and_weights_stay(tmp_path: Path) -> None:
    made = make_task(run_config(tmp_path / "it", own(tmp_path, "sentiment")), Layout(), tmp_path)
    model, there, batch = made.build_model(), made.build_model(), made.batch(0, 0)
    with rounded(model, Blocks("int8")):
        made.loss(model, batch).backward()
        there.load_state_dict(model.state_dict())
    made.loss(there, batch).backward()
    moved = 0
    for whole, one, wanted in zip(made.build_model().parameters(), model.parameters(), there.parameters(), strict=True):
        assert torch.equal(one, whole) and torch.equal(one.grad, wanted.grad)  # type: ignore[arg-type]
        assert one.dim() > 1 or torch.equal(one, wanted)
        moved += not torch.equal(one, wanted)
    assert moved > 1


def test_parts_of_matrices_are_not_rounded() -> None:
    with pytest.raises(ValueError, match=r"train\.rounded = 'int4' rounds whole matrices, and layout\.tensor = 2"):
        RunConfig.model_validate({"train": {"rounded": "int4"}, "layout": {"tensor": 2}})


def test_a_run_is_scored_on_its_own_data(ranks1: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = ranks1.run(watched_training, run_config(tmp_path / "it", own(tmp_path, "sentiment"), train={"steps": 1}))[0][0]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"--text other\.txt: a run is scored on its own data; leave it out"):
        app(["shrink", str(folder), "--int8", "--text", "other.txt"], standalone_mode=False)
