"""What was measured is kept beside the cluster file, so that the next run on this cluster need not measure again.

One JSON file: the version of the format, torch's version, and for each carrier (gloo, or an MPI), group, op, root and class of
sizes the way that won, its seconds and those of the native collective, and the date. A file of another version of torch, or one
that cannot be read, is begun anew: what it held is measured again.
"""

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

FORMAT = 2


class Cache:
    """Used by one rank of a job. path: None keeps nothing on the disk."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._entries: dict[str, Any] = {}
        if path is not None and path.exists():
            try:
                stored = json.loads(path.read_text(encoding="utf-8"))
                if (stored["thinwire_collectives"], stored["torch"]) == (FORMAT, torch.__version__):
                    self._entries = stored["entries"]
            except (OSError, ValueError, KeyError, TypeError):
                self._entries = {}

    def find(self, key: str) -> dict[str, Any] | None:
        """{"way", "seconds", "native_s", "date"}."""
        return self._entries.get(key)

    def keep(self, key: str, way: dict[str, Any], seconds: float, native_s: float) -> None:
        """Written at once."""
        today = datetime.now(UTC).date().isoformat()
        self._entries[key] = {"way": way, "seconds": seconds, "native_s": native_s, "date": today}
        if self.path is not None:
            aside = self.path.with_suffix(f".{os.getpid()}.tmp")
            aside.write_text(json.dumps({"thinwire_collectives": FORMAT, "torch": torch.__version__, "entries": self._entries}))
            os.replace(aside, self.path)


def beside(cluster: Path) -> Path:
    """The cache of a cluster file."""
    return cluster.with_suffix(".collectives.json")
