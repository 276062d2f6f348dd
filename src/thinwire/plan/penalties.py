"""How many more tokens a plan needs to the same loss; numbers with their sources: `penalties.toml`.

    tokens = given * batch * codec * rarely          each factor 1 + tokens_per_loss * (part of loss), but
    batch  = (1 + k / c) / (1 + 1 / c)               k times the given batch, c the critical one in given ones
    rarely = 1 + tokens_per_loss * loss(N, M, H) + periods_lost * H / steps

loss(N, M, H) lies between the published values on straight lines over log N and log M; beyond the table it stays at its end in N,
and rises on in M as it did.
"""

from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from importlib import resources
from math import log, log2
from pathlib import Path
from typing import Any

from thinwire.tomlfile import read_toml


@cache
def numbers() -> Mapping[str, Any]:
    """As the package ships them."""
    return read_toml(Path(str(resources.files("thinwire.plan"))) / "penalties.toml")


def of_batch(times: float) -> float:
    """Of a batch so many times as large as the given one; below 1 for a smaller one."""
    critical = numbers()["batch"]["critical"]
    return float((1 + times / critical) / (1 + 1 / critical))


def of_codec(kind: str) -> float:
    """Of gradients that are coded in each step."""
    return float(1 + numbers()["loss"]["tokens_per_loss"] * numbers()["codec"][kind])


@lru_cache(maxsize=4096)
def of_rare(parameters: float, replicas: int, every: int, overlap: int, steps: float) -> float:
    """Of replicas that exchange every so many of `steps` steps."""
    rare = numbers()["rare"]
    by_size = [_between(rare["replicas"], row, replicas, grows=True) for row in rare["loss"]]
    loss = _between(rare["parameters"], by_size, parameters) + rare["per_step_of_overlap"] * overlap
    loss += rare["per_doubling"] * max(0.0, log2(every / rare["every"]))
    return float(1 + numbers()["loss"]["tokens_per_loss"] * loss + rare["periods_lost"] * every / max(1.0, steps))


def _between(at: Sequence[float], values: Sequence[float], x: float, *, grows: bool = False) -> float:
    place = next((index for index in range(1, len(at)) if x <= at[index]), len(at) - 1)
    along = (log(x) - log(at[place - 1])) / (log(at[place]) - log(at[place - 1]))
    along = max(0.0, along if grows else min(1.0, along))
    return values[place - 1] + along * (values[place] - values[place - 1])
