"""Images by class: a user's own folder trains as on one rank, and what is wrong with one is one line."""

import random
from pathlib import Path

import pytest
from equality import CODED_AND_RARE, alike, judged, run_config, two_ranks_are_one, watched_training
from PIL import Image

from pool import Pool, RankFailure
from thinwire.errors import UserError
from thinwire.layout import Layout
from thinwire.tasks.catalogue import make_task
from thinwire.tasks.fashion import load_fashion
from thinwire.train.trained import open_trained


def make_images(folder: Path, count: int = 24) -> Path:
    """Bright above, or bright below, and noise."""
    chosen = random.Random(3)
    for name, bright in (("above", range(5)), ("below", range(5, 10))):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            image = Image.new("L", (10, 10))
            image.putdata([chosen.randrange(120) + 130 * (place // 10 in bright) for place in range(100)])
            image.save(folder / name / f"{index:03}.png")
    return folder


@pytest.mark.long
def test_two_ranks_train_as_one_and_the_model_is_of_use(ranks1: Pool, ranks2: Pool, tmp_path: Path) -> None:
    task = {"kind": "image_classification", "source": str(make_images(tmp_path / "images")), "width": 4}
    folder = two_ranks_are_one(ranks1, ranks2, tmp_path, task)
    trained = open_trained(folder, tmp_path)
    assert trained.task.score_of(trained.task.score(trained.model, 0)) == pytest.approx(judged(folder)[6], abs=1e-9)
    best = trained.task.predict(trained.model, str(tmp_path / "images" / "above" / "000.png"))
    assert best.startswith(("above", "below")) and best.endswith("%")
    assert trained.task.shown(trained.model, 3).count("") == 3


@pytest.mark.long
@CODED_AND_RARE
def test_codes_and_rare_exchanges_send_what_was_predicted(ranks2: Pool, tmp_path: Path, sections: dict) -> None:
    task = {"kind": "image_classification", "source": str(make_images(tmp_path / "images")), "width": 4}
    found = ranks2.run(watched_training, run_config(tmp_path / "two", task, **sections))
    alike(found[0][0], found)


@pytest.mark.long
def test_five_images_train(ranks1: Pool, tmp_path: Path) -> None:
    make_images(tmp_path / "images", count=5)
    task = {"kind": "image_classification", "source": str(tmp_path / "images")}
    config = run_config(tmp_path / "run", task, train={"micro_batch": 1, "steps": 2})
    assert judged(ranks1.run(watched_training, config)[0][0])


def test_what_is_wrong_is_one_line(tmp_path: Path) -> None:
    def refused(source: Path) -> str:
        config = run_config(tmp_path / "run", {"kind": "image_classification", "source": str(source)})
        with pytest.raises(UserError) as error:
            make_task(config, Layout(), tmp_path)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "is not a folder" in refused(tmp_path / "nothing")
    (tmp_path / "empty" / "a").mkdir(parents=True)
    assert "0 folders" in refused(tmp_path / "empty" / "a") and "1 folders" not in refused(tmp_path / "empty" / "a")
    images = make_images(tmp_path / "images", 4)
    assert "a step takes 16" in refused(images)
    (images / "above" / "bad.png").write_text("no image")
    assert "bad.png cannot be read" in refused(images)
    with pytest.raises(UserError, match="apt-get install dataset-fashion-mnist"):
        load_fashion(tmp_path)


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"layout": {"pipe": 2}}, "layout.pipe = 2"),
        ({"model": {"dtype": "float64", "layers": 9}}, r"\[model\] is the language model"),
        ({"train": {"recompute": "full"}}, "train.recompute"),
    ],
)
def test_what_only_the_language_model_takes_is_refused(tmp_path: Path, sections: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        run_config(tmp_path / "run", {"kind": "image_classification"}, **sections)


@pytest.mark.long
def test_a_task_that_is_not_there_ends_every_rank_with_its_line(ranks2: Pool, tmp_path: Path) -> None:
    config = run_config(tmp_path / "run", {"kind": "image_classification", "source": str(tmp_path / "nothing")})
    with pytest.raises(RankFailure, match="is not a folder"):
        ranks2.run(watched_training, config, timeout_s=20)
