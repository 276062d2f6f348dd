"""Pictures with objects in them, for detection and segmentation: composed from Fashion-MNIST, or a COCO file (`coco`).

A composed scene, 64 x 64 grey values, is synthetic: on a grey slope with noise stand one to four items of Fashion-MNIST, 18 to 34
pixels high, of which no box touches another. An item's mask is where it is not black, its box the smallest around the mask.
Scenes are drawn from a fixed seed: those for training of training items, those held out of test items.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from thinwire.tasks.convolutions import as_input
from thinwire.tasks.examples import of_arrays
from thinwire.tasks.fashion import CLASSES, load_fashion
from thinwire.tasks.own import image_of

SIDE = 64
COUNTS = {"train": 6000, "held_out": 1000}
MOST, SMALLEST, LARGEST, TRIES = 4, 18, 34, 12
BLACK, NOISE = 8, 8.0


@dataclass(frozen=True, kw_only=True)
class Scenes:
    """images: uint8 [count, SIDE, SIDE, channels]. labels: int64 [count, most], of each object its class, -1: no object. boxes:
    float32 [count, most, 4], left, top, right, bottom in pixels. masks: int64 [count, SIDE, SIDE], 0 or 1 + the class."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    boxes: NDArray[np.float32]
    masks: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.images)

    def rows(self, chosen: Any) -> "Scenes":
        """Some of them."""
        return Scenes(images=self.images[chosen], labels=self.labels[chosen], boxes=self.boxes[chosen], masks=self.masks[chosen])


def load_scenes(source: str, with_masks: bool) -> tuple[dict[str, Scenes], tuple[str, ...], dict[str, Any]]:
    """By part; the classes' names; what record.json says. source: a COCO file, or empty. with_masks: each object needs one.
    UserError for data that are not there."""
    if source:
        from thinwire.tasks.coco import read_coco
        from thinwire.tasks.text import split

        whole, classes, about = read_coco(Path(source).expanduser(), SIDE, with_masks)
        parts = {part: whole.rows(rows) for part, rows in zip(COUNTS, split(len(whole), len(whole)), strict=True)}
    else:
        items, kinds, about = load_fashion()
        parts = {part: composed(items[part], kinds[part], count) for part, count in COUNTS.items()}
        classes, about = CLASSES, {**about, "source": f"synthetic scenes of {about['source']}"}
    arrays = [array for one in parts.values() for array in (one.images, one.labels, one.boxes, one.masks)]
    return parts, classes, {**about, "documents": sum(map(len, parts.values())), "sha256": of_arrays(*arrays)}


def composed(items: NDArray[np.uint8], kinds: NDArray[Any], count: int) -> Scenes:
    """See the top of the file. items: [number, height, width, 1]; kinds: their classes."""
    drawn = np.random.default_rng(1)
    slope = np.linspace(-1.0, 1.0, SIDE)
    images = drawn.uniform(20, 110, (count, 1, 1)) + drawn.normal(0, NOISE, (count, SIDE, SIDE))
    images += drawn.uniform(-20, 20, (count, 1, 1)) * slope + drawn.uniform(-20, 20, (count, 1, 1)) * slope[:, None]
    labels, boxes = np.full((count, MOST), -1, np.int64), np.zeros((count, MOST, 4), np.float32)
    masks, wanted = np.zeros((count, SIDE, SIDE), np.int64), drawn.integers(1, MOST + 1, count)
    flat, grids = items.reshape(len(items), -1), {size: _grid(size, items.shape[1]) for size in range(SMALLEST, LARGEST + 1)}
    for scene in range(count):
        others = list[list[int]]()
        for item, size, left, top in zip(*_tries(drawn, len(items)), strict=True):
            shown = flat[item].take(grids[size])
            mask = shown > BLACK
            if len(others) == wanted[scene] or not mask.any():
                break
            down, across = (mask.any(axis).nonzero()[0].tolist() for axis in (1, 0))
            box = [left + across[0], top + down[0], left + across[-1] + 1, top + down[-1] + 1]
            if any(box[0] < one[2] and box[1] < one[3] and box[2] > one[0] and box[3] > one[1] for one in others):
                continue
            place = np.s_[scene, top : top + size, left : left + size]
            np.copyto(images[place], shown, where=mask)
            np.copyto(masks[place], 1 + int(kinds[item]), where=mask)
            labels[scene, len(others)], boxes[scene, len(others)] = kinds[item], box
            others.append(box)
    return Scenes(images=images.clip(0, 255).astype(np.uint8)[..., None], labels=labels, boxes=boxes, masks=masks)


def _grid(size: int, side: int) -> NDArray[np.int64]:
    """[size, size]: of each place the nearest of a flat picture of side x side."""
    places = np.arange(size) * side // size
    return places[:, None] * side + places


def _tries(drawn: np.random.Generator, count: int) -> tuple[list[int], ...]:
    """Items, their sizes, their left and top."""
    sizes = drawn.integers(SMALLEST, LARGEST + 1, TRIES)
    corners = (drawn.random((2, TRIES)) * (SIDE - sizes + 1)).astype(np.int64)
    return drawn.integers(0, count, TRIES).tolist(), sizes.tolist(), *corners.tolist()


def looked_at(given: str | int, held_out: Scenes) -> tuple[NDArray[np.uint8], Tensor]:
    """A file or a held-out row: the picture as it is, and what a model takes of it."""
    if isinstance(given, int):
        return held_out.images[given], as_input(held_out.images[given : given + 1])
    path = Path(given).expanduser()
    return image_of(path), as_input(image_of(path, held_out.images.shape[1:])[None])
