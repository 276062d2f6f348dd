"""The benchmarks by name. Each is a function run(cluster, options) -> flat rows with units in the keys.

A row has at least `case`; where they apply `native_s`, `ours_s`, `bound_s`, `ratio`, and `bar` with `held`.
"""

import importlib
import os
import platform
import tomllib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from thinwire.errors import UserError

Rows = list[dict[str, Any]]
Benchmark = Callable[[str | None, Mapping[str, Any]], Rows]

BENCHMARKS: Mapping[str, str] = {
    "collectives": "thinwire.bench.collectives",
    "collective_steps": "thinwire.bench.collective_steps",
    "compress": "thinwire.bench.compress",
    "ddp": "thinwire.bench.ddp",
    "fsdp": "thinwire.bench.fsdp",
    "lab": "thinwire.bench.lab",
    "ledger": "thinwire.bench.ledger",
    "probe": "thinwire.bench.probe",
    "sync": "thinwire.bench.sync",
    "uneven": "thinwire.bench.uneven",
}


def find(name: str) -> Benchmark:
    """The `run` of a benchmark. UserError for an unknown name."""
    if name not in BENCHMARKS:
        raise UserError(f"there is no benchmark {name!r}; there are: {', '.join(BENCHMARKS)}")
    return importlib.import_module(BENCHMARKS[name]).run


def describe() -> dict[str, str]:
    """The first line of each benchmark's file."""
    return {name: (importlib.import_module(module).__doc__ or "").splitlines()[0] for name, module in BENCHMARKS.items()}


def parse_options(changes: Sequence[str]) -> dict[str, Any]:
    """["rounds=3", "cases=[1, 2]"] -> values as TOML reads them; what TOML cannot read is text."""
    options: dict[str, Any] = {}
    for change in changes:
        key, separator, text = change.partition("=")
        if not separator:
            raise UserError(f"--set {change!r}: write KEY=VALUE")
        try:
            options[key] = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            options[key] = text
    return options


def take(options: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """`defaults` with `options` laid over them. UserError for an option that the benchmark does not have."""
    unknown = set(options) - set(defaults)
    if unknown:
        raise UserError(f"option {sorted(unknown)[0]}: this benchmark has the options {', '.join(defaults)}")
    return {**defaults, **options}


def machine() -> dict[str, Any]:
    """Where the numbers come from."""
    return {
        "system": platform.platform(),
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }
