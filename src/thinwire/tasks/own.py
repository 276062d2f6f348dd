"""A user's own data: images in folders by class, CSV or JSONL with columns. Errors are one line."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from thinwire.data.records import BadRecord, records
from thinwire.data.source import form_of
from thinwire.errors import UserError

IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp")


def images_by_class(folder: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64], tuple[str, ...], dict[str, Any]]:
    """Images [count, height, width, channels], their classes by number, the classes' names, and what the record says.

    A class is a folder. All images get the size and the channels of the first. They stand in an order that mixes the classes.
    """
    if not folder.is_dir():
        raise UserError(f"task.source {str(folder)!r} is not a folder; give one that has a folder of images for each class")
    classes = sorted(path.name for path in folder.iterdir() if path.is_dir())
    found = [[path for path in sorted((folder / name).iterdir()) if path.suffix.lower() in IMAGES] for name in classes]
    if len(classes) < 2 or not all(found):
        lacking = next((name for name, paths in zip(classes, found, strict=True) if not paths), "")
        what = f"no image in {lacking}/" if lacking else f"{len(classes)} folders of images"
        raise UserError(f"task.source {str(folder)!r} has {what}; give a folder with images ({' '.join(IMAGES)}) for each class")
    places = sorted((at / len(paths), number, path) for number, paths in enumerate(found) for at, path in enumerate(paths))
    shape = image_of(places[0][2]).shape
    images = np.stack([image_of(path, shape) for _, _, path in places])
    size = sum(path.stat().st_size for _, _, path in places)
    about = {"source": str(folder), "files": len(places), "bytes": size}
    return images, np.array([number for _, number, _ in places], dtype=np.int64), tuple(classes), about


def held_out_rows(labels: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which are held out: of each class every tenth, of one with fewer than ten every second."""
    held = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        mine = np.flatnonzero(labels == label)
        every = 10 if len(mine) >= 10 else 2
        held[mine[every - 1 :: every]] = True
    return held


def image_of(path: Path, shape: tuple[int, ...] | None = None) -> NDArray[np.uint8]:
    """[height, width, channels], brought to `shape` if that is given: grey if it has one channel, else red, green, blue."""
    return values_of(opened_image(path, shape[2] == 1 if shape else None), (shape[1], shape[0]) if shape else None)


def opened_image(path: Path, grey: bool | None = None) -> Any:
    """Of pillow, in grey or in red, green, blue. grey: None: as it is. UserError for what is no image."""
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        raise UserError(f"image {path} needs the pillow library; pip install 'thinwire[tasks]'") from None
    try:
        with Image.open(path) as opened:
            grey = opened.mode in ("1", "L", "I", "F", "I;16") if grey is None else grey
            return opened.convert("L" if grey else "RGB")
    except (OSError, UnidentifiedImageError) as error:
        reason = getattr(error, "strerror", None) or "it is no image that pillow knows"
        raise UserError(f"image {path} cannot be read: {reason}") from None


def values_of(image: Any, size: tuple[int, int] | None = None) -> NDArray[np.uint8]:
    """[height, width, channels] of an opened image, brought to `size`, width and height, if that is given."""
    if size and image.size != size:
        image = image.resize(size)
    values = np.asarray(image, dtype=np.uint8)
    return values[..., None] if values.ndim == 2 else values


def columns_of(path: Path, names: tuple[str, ...]) -> tuple[list[tuple[str, ...]], dict[str, Any]]:
    """The texts under these columns of a .csv, .tsv, .jsonl or .json file, also .gz, by record; and what record.json says."""
    if not path.is_file() or form_of(path) not in (".csv", ".tsv", ".jsonl", ".json"):
        raise UserError(f"task.source {str(path)!r} is no .csv, .tsv, .jsonl or .json file with columns {', '.join(names)}")

    def bad(reason: str) -> None:
        raise UserError(reason)

    found = []
    try:
        for where, record in records(path, names, bad):
            texts = tuple(record.get(name) if isinstance(record, dict) else None for name in names)
            if lacking := [
                name for name, text in zip(names, texts, strict=True) if not isinstance(text, str) or not text.strip()
            ]:
                raise UserError(f"{where} has no text under {lacking[0]!r}; each record needs {', '.join(names)}")
            found.append(tuple(str(text).strip() for text in texts))
    except BadRecord as error:
        raise UserError(str(error)) from None
    return found, {"source": str(path), "files": 1, "bytes": path.stat().st_size, "documents": len(found)}
