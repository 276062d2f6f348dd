"""Files that commands write: what cannot be written is one line, if possible before the work."""

import json
from pathlib import Path
from typing import Any

from thinwire.errors import UserError


def check_folders(*paths: Path | None) -> None:
    """UserError for a file whose folder is not there. None: no file."""
    for path in paths:
        if path and not path.resolve().parent.is_dir():
            raise UserError(f"{path} cannot be written: there is no folder {path.resolve().parent}")


def write_text(path: Path, text: str) -> None:
    """UserError where the system refuses."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None


def write_json(path: Path, content: Any) -> None:
    """UserError where the system refuses."""
    write_text(path, json.dumps(content, indent=1) + "\n")
