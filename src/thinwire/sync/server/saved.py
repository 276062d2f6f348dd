"""Small files that outlive a server or a worker. A file is there in whole or not at all."""

import os
from pathlib import Path
from typing import Any

import torch

from thinwire.errors import UserError


def save(state: dict[str, Any], path: Path) -> None:
    """Write beside, then rename."""
    beside = path.with_suffix(path.suffix + ".part")
    torch.save(state, beside)
    os.replace(beside, path)


def load(path: Path, *, mapped: bool = False) -> dict[str, Any]:
    """UserError if it cannot be read. mapped: tensors are read from the disk where they are used."""
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True, mmap=mapped)
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file; nothing was saved there") from None
    except Exception as error:
        raise UserError(f"{path}: cannot be read ({str(error).splitlines()[0][:100]}); take an older folder") from None
    return state
