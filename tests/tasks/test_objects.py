"""Objects and pixels: tiny data of one's own train on two ranks as on one, and are of use afterwards."""

from pathlib import Path
from typing import Any

import pytest
import torch
from equality import alike, judged, run_config, two_ranks_are_one, watched_training
from own_pictures import make_coco

from pool import Pool
from thinwire.layout import Layout
from thinwire.tasks.catalogue import make_task
from thinwire.train.trained import open_trained

KINDS = ("detection", "segmentation")


def own(folder: Path, kind: str, count: int = 40) -> tuple[dict[str, Any], Path]:
    """The task's section, and one input."""
    source = make_coco(folder / "data", count)
    return {"kind": kind, "source": str(source), "width": 4}, source.parent / "images" / "0.png"


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_train_as_one_and_the_model_is_of_use(ranks1: Pool, ranks2: Pool, tmp_path: Path, kind: str) -> None:
    task, given = own(tmp_path, kind)
    folder = two_ranks_are_one(ranks1, ranks2, tmp_path, task)
    trained = open_trained(folder, tmp_path)
    assert trained.task.score_of(trained.task.score(trained.model, 0)) == pytest.approx(judged(folder)[6], abs=1e-9)
    assert trained.task.predict(trained.model, str(given))
    assert [line[:10] for line in trained.task.shown(trained.model, 2)][::3] == 2 * ["data:image"]
    assert trained.task.picture(trained.model, str(given)).startswith("<svg")


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_codes_send_what_was_predicted(ranks2: Pool, tmp_path: Path, kind: str) -> None:
    task, _ = own(tmp_path, kind)
    sections = {"compress": {"kind": "int4"}, "model": {"dtype": "float32"}}
    found = ranks2.run(watched_training, run_config(tmp_path / "two", task, **sections))
    alike(found[0][0], found)


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_five_files_train(ranks1: Pool, tmp_path: Path, kind: str) -> None:
    task, _ = own(tmp_path, kind, 5)
    config = run_config(tmp_path / "run", task, train={"micro_batch": 1, "steps": 2}, sync={"accumulate": 2})
    assert judged(ranks1.run(watched_training, config)[0][0])


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_tiny_data_are_learned(tmp_path: Path, kind: str) -> None:
    """On one rank, by hand."""
    task, given = own(tmp_path, kind, 60)
    sections = {"train": {"micro_batch": 16}, "sync": {"accumulate": 1}, "model": {"dtype": "float32"}}
    made = make_task(run_config(tmp_path / "run", task, **sections), Layout(), tmp_path)
    model = made.build_model()
    optimizer = torch.optim.AdamW(model.parameters(), 2e-2)
    for step in range(80):
        made.loss(model, made.batch(step, 0)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert made.score_of(made.score(model, 0)) > max(80.0, made.baseline()[1])
    assert made.predict(model.eval(), str(given)).startswith("flat")
