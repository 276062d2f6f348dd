"""Fashion-MNIST as Debian ships it: 60,000 training and 10,000 test images of 28 x 28 grey values, in IDX files."""

import gzip
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from thinwire.errors import UserError

FOLDER = Path("/usr/share/datasets/fashion-mnist")
PACKAGE = "dataset-fashion-mnist"
CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
Parts = dict[str, NDArray[Any]]


def load_fashion(folder: Path = FOLDER) -> tuple[Parts, Parts, dict[str, Any]]:
    """Images [count, 28, 28, 1] and labels by part, and what the record says of them. UserError if the package is not there."""
    images, labels, files = Parts(), Parts(), dict[str, str]()
    total = 0
    for part, prefix in (("train", "train"), ("held_out", "t10k")):
        for kind, found in (("images-idx3", images), ("labels-idx1", labels)):
            path = folder / f"{prefix}-{kind}-ubyte.gz"
            if not path.is_file():
                raise UserError(f"{path} is not there; apt-get install {PACKAGE}, or give a folder of your own as task.source")
            packed = path.read_bytes()
            total += len(packed)
            files[path.name] = hashlib.sha256(packed).hexdigest()
            found[part] = _idx(gzip.decompress(packed), path)
    images = {part: found[..., None] for part, found in images.items()}
    about = {
        "source": f"Fashion-MNIST (Debian {PACKAGE})",
        "licence": "MIT",
        "files": len(files),
        "bytes": total,
        "file_sha256": files,
    }
    return images, labels, about


def _idx(content: bytes, path: Path) -> NDArray[np.uint8]:
    """Two bytes 0, one that says bytes (8), one the number of dims, each of four bytes; then the values."""
    num_dims = content[3] if content[:3] == b"\0\0\x08" else 0
    shape = np.frombuffer(content[4 : 4 + 4 * num_dims], ">u4").tolist()
    if not num_dims or len(content) != 4 + 4 * num_dims + int(np.prod(shape)):
        raise UserError(f"{path} is damaged: {len(content)} bytes that are no IDX file of bytes; install {PACKAGE} again")
    return np.frombuffer(content, np.uint8, offset=4 + 4 * num_dims).reshape(shape)
