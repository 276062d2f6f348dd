"""What `thinwire bench sync` has learned, kept in a file, so that a comparison that takes hours can go on where it was stopped.

A line of JSON for each method and seed, written as soon as it is over. It is found again by what it was made from: the method's
whole configuration, the seed, the number of ranks and the steps at which the curve was taken. Links and turns are not among them,
because results do not depend on the wire.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from thinwire.bench.sync_methods import Method


def key_of(method: Method, seed: int, ranks: int, curve: Sequence[int]) -> str:
    """Under which it is kept. seed: of the run, whatever the method's configuration says."""
    config = method.config.model_dump(mode="json")
    made_from = [method.name, config | {"train": config["train"] | {"seed": seed}}, ranks, list(curve)]
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()


def keep(path: Path, key: str, learned: Mapping[str, Any]) -> None:
    """Add a line."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"key": key, **learned}) + "\n")


def kept(path: Path) -> dict[str, dict[str, Any]]:
    """{key: what was learned}; a last line that was cut off does not count."""
    if not path.exists():
        return {}
    whole = path.read_text(encoding="utf-8").rpartition("\n")[0]
    lines = [json.loads(line) for line in whole.splitlines()]
    return {line.pop("key"): line for line in lines}
