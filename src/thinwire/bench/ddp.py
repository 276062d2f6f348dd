"""Plain PyTorch DDP (no thinwire in the process) and ours, same model, in turns; and the step with no exchange at all.

Two cases: `unshaped` over loopback, and the links of the cluster in the lab. Nothing is paced: both compute as fast as they can.
Ratios are taken turn by turn, so a drifting machine cancels; the median counts. `noise` is the spread between the quartiles of
native's own turns. Bars: ours at most 2 % slower unshaped, within the noise shaped. Unshaped ranks (`--set ranks=`) should not be
more than the cores, or the ratio measures the scheduler.
"""

import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from thinwire.bench.local import run_local
from thinwire.bench.registry import Rows, take
from thinwire.cluster import load_cluster
from thinwire.config.model import ModelConfig
from thinwire.errors import UserError
from thinwire.lab.commands import Process, processes_for
from thinwire.lab.run import RESULTS, LabOptions, launch

DEFAULTS = {"turns": 25, "steps": 8, "micro_batch": 4, "context": 128, "layers": 4, "width": 128, "ranks": 2, "bucket_bytes": 0}
UNSHAPED_BAR = 1.02
_HERE = Path(__file__).parent
_MODEL_FILE = _HERE.parent / "models" / "transformer.py"


def run(cluster_name: str | None = None, options: Mapping[str, Any] | None = None) -> Rows:
    """Rows: case, ranks, seconds of a step (medians), processor seconds of rank 0, ratio ours / native, quartiles, bar, held."""
    told = take(options or {}, DEFAULTS)
    rows = []
    with tempfile.TemporaryDirectory(prefix="thinwire-") as folder:
        commands = _commands(told, folder)
        run_local(commands, told["ranks"])
        results = {name: json.loads((Path(folder) / f"{name}.json").read_text()) for name in ("plain", "ours")}
        rows.append(_row("unshaped (loopback)", told["ranks"], results, UNSHAPED_BAR))
    if cluster_name is not None:
        cluster = load_cluster(cluster_name)
        processes: list[Process] = []
        for command in _commands(told, RESULTS):
            processes += processes_for(cluster, command)
        lab = launch(cluster, processes, LabOptions(paced=False))
        if lab.failure:
            raise UserError(lab.failure)
        results = {name: json.loads(lab.results[f"{name}.json"]) for name in ("plain", "ours")}
        rows.append(_row(f"{cluster.name}, delay {lab.delay}", cluster.world_size, results, None))
    return rows


def _commands(told: Mapping[str, Any], results: str) -> list[list[str]]:
    """Of the two contenders, for one rank each."""
    shape = {
        "layers": told["layers"],
        "width": told["width"],
        "heads": 4,
        "context": told["context"],
        "norm": "layer",
        "mlp": "gelu",
    }
    model = ModelConfig.model_validate(shape).model_dump()
    shared = {"model": model, "contenders": 2} | {key: told[key] for key in ("turns", "steps", "micro_batch", "bucket_bytes")}
    plain = json.dumps({**shared, "index": 0, "port": 29610})
    ours = json.dumps({**shared, "index": 1, "port": 29611})
    return [
        [sys.executable, str(_HERE / "peers" / "plain_ddp.py"), str(_MODEL_FILE), str(_HERE / "turns.py"), results, plain],
        [sys.executable, "-m", "thinwire.bench.peers.our_ddp", results, ours],
    ]


def _row(case: str, ranks: int, results: Mapping[str, Mapping[str, list[float]]], bar: float | None) -> dict[str, Any]:
    plain, ours = results["plain"]["exchange"], results["ours"]["exchange"]
    ratios = sorted(mine / theirs for mine, theirs in zip(ours, plain, strict=True))
    quarter = len(ratios) // 4
    ratio = median(ratios)
    noise = (sorted(plain)[-1 - quarter] - sorted(plain)[quarter]) / median(plain)
    return {
        "case": case,
        "ranks": ranks,
        "native_s": median(plain),
        "ours_s": median(ours),
        "no_exchange_s": median(results["plain"]["no_exchange"]),
        "native_cpu_s": median(results["plain"]["processor"]),
        "ours_cpu_s": median(results["ours"]["processor"]),
        "ratio": ratio,
        "quartile_low": ratios[quarter],
        "quartile_high": ratios[-1 - quarter],
        "noise": noise,
        "bar": bar if bar is not None else 1 + noise,
        "held": ratio <= (bar if bar is not None else 1 + noise),
    }
