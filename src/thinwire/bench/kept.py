"""Rows that a long benchmark has found so far, in the file that all of them are to go to: the same command goes on with them."""

import json
from pathlib import Path

from thinwire.bench.registry import Rows
from thinwire.files import written_aside


def kept_rows(path: str) -> Rows:
    """Of an earlier run of the command, with what it added when it was over; none without a file. path: "" for none."""
    rows: Rows = json.loads(Path(path).read_text(encoding="utf-8")).get("rows", []) if path and Path(path).exists() else []
    return rows


def keep_rows(path: str, bench: str, rows: Rows) -> None:
    """In place of those that are there; nowhere if `path` is empty."""
    if path:
        with written_aside(Path(path)) as aside:
            aside.write_text(json.dumps({"bench": bench, "rows": rows}, indent=1) + "\n", encoding="utf-8")
