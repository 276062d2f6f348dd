"""thinwire: train language models over networks that are too slow for it."""

import importlib
from typing import Any

__version__ = "0.1.0"

__all__ = [
    "AsyncDiLoCo",
    "DiLoCo",
    "ParameterServerWorker",
    "apply",
    "compress_gradients",
    "compress_sharded",
    "init",
    "pipeline",
]

_HOMES = {
    "AsyncDiLoCo": "thinwire.sync.server.worker",
    "DiLoCo": "thinwire.sync.standalone",
    "ParameterServerWorker": "thinwire.sync.server.worker",
    "apply": "thinwire.train.own_loop",
    "compress_gradients": "thinwire.sync.hook",
    "compress_sharded": "thinwire.compress.sharded.api",
    "init": "thinwire.collectives.start",
    "pipeline": "thinwire.parallel.standalone",
}


def __getattr__(name: str) -> Any:
    """Public names are loaded when they are used, so that `import thinwire` loads no torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'thinwire' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
