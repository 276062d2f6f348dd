"""Objects in pictures as COCO keeps them (cocodataset.org/#format-data): a JSON file with `images`, `annotations`, `categories`.

Pictures stand beside the file, or in a folder `images` beside it. All get the side that is asked for, and the channels of the
first. An object's mask is polygons, or run lengths as a list of numbers, column by column; compressed run lengths are refused.
Objects that stand for a crowd are left out.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from thinwire.data.source import read_bytes
from thinwire.errors import UserError
from thinwire.tasks.own import opened_image, values_of
from thinwire.tasks.scenes import Scenes


def read_coco(path: Path, side: int, with_masks: bool) -> tuple[Scenes, tuple[str, ...], dict[str, Any]]:
    """The pictures in the file's order; the classes' names; what the record says. with_masks: an object without one is refused.
    UserError, one line."""
    try:
        content = json.loads(read_bytes(path, "COCO file"))
        classes = {one["id"]: (number, str(one["name"])) for number, one in enumerate(content["categories"])}
        listed = {one["id"]: one for one in content["images"]}
        objects: dict[Any, list[Any]] = {key: [] for key in listed}
        for one in content["annotations"]:
            if not one.get("iscrowd"):
                objects[one["image_id"]].append((one["id"], classes[one["category_id"]][0], one["bbox"], one.get("segmentation")))
    except ValueError as error:
        raise UserError(f"COCO file {path} is not JSON: {error}") from None
    except (AttributeError, TypeError, KeyError) as error:
        raise UserError(f"COCO file {path} lacks, or misnames, {error}; it needs images, annotations and categories") from None
    most = max([1, *map(len, objects.values())])
    labels, boxes = np.full((len(listed), most), -1, np.int64), np.zeros((len(listed), most, 4), np.float32)
    masks, images, size = np.zeros((len(listed), side, side), np.int64), [], path.stat().st_size
    grey: bool | None = None
    for row, (key, one) in enumerate(listed.items()):
        file = next((file for folder in ("", "images") if (file := path.parent / folder / str(one["file_name"])).is_file()), None)
        if file is None:
            raise UserError(f"COCO file {path} names the picture {one['file_name']!r}, which is neither beside it nor in images/")
        size, given = size + file.stat().st_size, opened_image(file, grey)
        grey = given.mode == "L"
        images.append(values_of(given, (side, side)))
        scale = side / given.width, side / given.height
        for place, (number, label, box, outline) in enumerate(objects[key]):
            where = f"COCO file {path}: annotation {number}"
            labels[row, place], boxes[row, place] = label, _box(where, box, scale)
            if outline:
                masks[row][_mask(where, outline, (given.height, given.width), side)] = 1 + label
            elif with_masks:
                raise UserError(f"{where} has no segmentation; give polygons or run lengths")
    if not images:
        raise UserError(f"COCO file {path} has no images")
    about = {"source": str(path), "files": 1 + len(images), "bytes": size}
    return (
        Scenes(images=np.stack(images), labels=labels, boxes=boxes, masks=masks),
        tuple(name for _, name in classes.values()),
        about,
    )


def _box(where: str, box: Any, scale: tuple[float, float]) -> list[float]:
    try:
        left, top, width, height = (float(one) for one in box)
        if width <= 0 or height <= 0:
            raise ValueError
    except (TypeError, ValueError):
        raise UserError(f"{where} has the bbox {box!r}; give left, top, width and height") from None
    return [left * scale[0], top * scale[1], (left + width) * scale[0], (top + height) * scale[1]]


def _mask(where: str, outline: Any, shape: tuple[int, ...], side: int) -> NDArray[np.bool_]:
    """[side, side]. shape: height and width of the picture."""
    from PIL import Image, ImageDraw

    height, width = shape
    try:
        if isinstance(outline, dict):
            counts = [int(one) for one in outline["counts"]]
            flat = np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(width, height)
            grid = (np.arange(side) + 0.5) / side
            across, down = (grid * width).astype(int), (grid * height).astype(int)
            return flat.T[down[:, None], across]
        canvas = Image.new("1", (side, side))
        for polygon in outline:
            points = np.array(polygon, dtype=float).reshape(-1, 2) * (side / width, side / height)
            ImageDraw.Draw(canvas).polygon([(x, y) for x, y in points.tolist()], fill=1)
        return np.asarray(canvas, dtype=bool)
    except (KeyError, TypeError, ValueError):
        raise UserError(
            f"{where} has a segmentation that is neither polygons nor run lengths of a {width} x {height} picture"
        ) from None
