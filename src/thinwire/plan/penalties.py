"""How many more tokens a plan needs to the same loss; numbers with their sources: `penalties.toml`.

tokens = given * batch * inside * code or rarely
batch  = (1 + k / c) / (1 + 1 / c)               k times the given batch, c the critical one in given ones
inside = 1 + tokens_per_loss * loss              of what is coded within passes
code   = steps over those of data parallelism    of the measured front (`sync.front`)
rarely                                           the same, carried to this model
"""

from collections.abc import Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from thinwire.sync.front import ways
from thinwire.tomlfile import read_toml


@cache
def numbers() -> Mapping[str, Any]:
    """As the package ships them."""
    return read_toml(Path(str(resources.files("thinwire.plan"))) / "penalties.toml")


def of_batch(times: float) -> float:
    """Of a batch so many times as large as the given one; below 1 for a smaller one."""
    critical = numbers()["batch"]["critical"]
    return float((1 + times / critical) / (1 + 1 / critical))


@cache
def of_codec(kind: str) -> float:
    """Of gradients that are coded in each step."""
    return max(1.0, *(way.steps_over_ddp for way in ways() if way.method in ("ddp", kind)))


def of_inside(kind: str) -> float:
    """Of what is coded within passes."""
    return float(1 + numbers()["loss"]["tokens_per_loss"] * numbers()["inside"][kind])
