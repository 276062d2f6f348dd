"""For tests: tiny pictures with objects as a COCO file."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def make_coco(folder: Path, count: int = 40) -> Path:
    """Bright upright boxes and dark flat ones on grey, 32 x 32; a third of the masks as polygons, the others as run lengths."""
    drawn = random.Random(2)
    (folder / "images").mkdir(parents=True)
    images, annotations = [], []
    for number in range(count):
        pixels = np.full((32, 32), 128, np.uint8)
        kind, (width, height) = (1, (8, 16)) if number % 2 else (7, (16, 8))
        left, top = drawn.randrange(32 - width), drawn.randrange(32 - height)
        pixels[top : top + height, left : left + width] = 230 if number % 2 else 20
        Image.fromarray(pixels).save(folder / "images" / f"{number}.png")
        images.append({"id": 100 + number, "file_name": f"{number}.png", "width": 32, "height": 32})
        box = [left, top, width, height]
        annotations.append({"id": number, "image_id": 100 + number, "category_id": kind, "bbox": box, "iscrowd": 0})
        annotations[-1]["segmentation"] = polygon(*box) if number % 3 == 0 else runs(pixels != 128)
    names = [{"id": 1, "name": "tall"}, {"id": 7, "name": "flat"}]
    path = folder / "own.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": names}))
    return path


def polygon(left: int, top: int, width: int, height: int) -> list[list[int]]:
    right, bottom = left + width - 1, top + height - 1
    return [[left, top, right, top, right, bottom, left, bottom]]


def runs(mask: Any) -> dict[str, Any]:
    """Down the columns, from those that are not of the object."""
    flat, counts, value = mask.T.ravel(), [0], False
    for one in flat:
        if one != value:
            counts.append(0)
            value = one
        counts[-1] += 1
    return {"size": list(mask.shape), "counts": counts}
