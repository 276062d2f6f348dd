"""What tasks take pictures for, and how they count what is right: laws, without a model."""

import json
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from own_pictures import make_coco, polygon, runs
from PIL import Image

from thinwire.errors import UserError
from thinwire.tasks.coco import read_coco
from thinwire.tasks.detection import BINS, average_precision
from thinwire.tasks.pictures import png
from thinwire.tasks.scenes import SIDE, composed


def test_composed_scenes_have_their_objects_where_their_boxes_are() -> None:
    drawn = np.random.default_rng(0)
    items = drawn.integers(1, 256, (12, 28, 28, 1), dtype=np.uint8) * (drawn.random((12, 28, 28, 1)) > 0.2)
    scenes, again = (composed(items.astype(np.uint8), np.arange(12) % 10, 20) for _ in range(2))
    assert np.array_equal(scenes.images, again.images) and scenes.images.shape == (20, SIDE, SIDE, 1)
    for labels, boxes, mask in zip(scenes.labels, scenes.boxes.astype(int), scenes.masks, strict=True):
        there = boxes[labels >= 0]
        assert len(there) >= 1
        for label, (left, top, right, bottom) in zip(labels, there, strict=False):
            inside = mask[top:bottom, left:right]
            assert set(np.unique(inside)) <= {0, 1 + label} and inside.any(1)[[0, -1]].all() and inside.any(0)[[0, -1]].all()
            mask[top:bottom, left:right] = 0
        assert not mask.any()


def test_a_polygon_and_run_lengths_are_the_same_mask(tmp_path: Path) -> None:
    path = make_coco(tmp_path / "own", 4)
    scenes, classes, about = read_coco(path, 32, True)
    assert classes == ("tall", "flat") and about["files"] == 5
    for image, mask, label, box in zip(scenes.images, scenes.masks, scenes.labels, scenes.boxes, strict=True):
        assert np.array_equal(mask > 0, image[..., 0] != 128) and mask.max() == 1 + label[0]
        left, top, right, bottom = box[0].astype(int)
        assert (mask[top:bottom, left:right] > 0).all() and (mask > 0).sum() == (right - left) * (bottom - top)
    content = json.loads(path.read_text())
    for one in content["annotations"]:
        outline = np.zeros((32, 32), bool)
        left, top, width, height = one["bbox"]
        outline[top : top + height, left : left + width] = True
        one["segmentation"] = runs(outline) if isinstance(one["segmentation"], list) else polygon(*one["bbox"])
    path.write_text(json.dumps(content))
    assert np.array_equal(read_coco(path, 32, True)[0].masks, scenes.masks)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("bbox", [1, 2, 0, 4], "has the bbox"),
        ("segmentation", None, "has no segmentation"),
        ("segmentation", {"size": [32, 32], "counts": "abc"}, "neither polygons nor run lengths"),
        ("category_id", 3, "misnames"),
    ],
)
def test_what_is_wrong_with_a_coco_file_is_one_line(tmp_path: Path, key: str, value: Any, said: str) -> None:
    path = make_coco(tmp_path / "own", 4)
    content = json.loads(path.read_text())
    content["annotations"][2][key] = value
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=said) as error:
        read_coco(path, 32, True)
    assert "\n" not in str(error.value)
    (path.parent / "images" / "1.png").unlink()
    with pytest.raises(UserError):
        read_coco(path, 32, False)


def test_average_precision_is_what_it_is_by_hand() -> None:
    counts = np.zeros((2, 1 + 2 * BINS))
    counts[0, 0], counts[0, 1 + 60], counts[0, 1 + BINS + 50], counts[0, 1 + 40] = 4, 2, 2, 1
    assert average_precision(counts) == pytest.approx(100 * (2 / 4 * 1.0 + 1 / 4 * 3 / 5)), (
        "a class without objects does not count"
    )
    counts[1, 0] = 1
    assert average_precision(counts) == pytest.approx(100 * (2 / 4 + 1 / 4 * 3 / 5) / 2), "nothing of it found"


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_pixels_come_out_of_png_as_they_went_in(channels: int) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (5, 7, channels), dtype=np.uint8)
    assert np.array_equal(np.asarray(Image.open(BytesIO(png(pixels)))).reshape(pixels.shape), pixels)
