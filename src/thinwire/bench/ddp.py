"""Plain PyTorch DDP (no thinwire in the process) and ours, same model, in turns; and the step with no exchange at all.

Two cases: `unshaped` over loopback, and the links of the cluster in the lab. Nothing is paced: both compute as fast as they can.
Ratios are taken turn by turn, so a drifting machine cancels; the median counts. `noise` is the spread between the quartiles of
native's own turns. Bars: ours at most 2 % slower unshaped, within the noise shaped. Unshaped ranks (`--set ranks=`) should not be
more than the cores, or the ratio measures the scheduler.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from thinwire.bench.collective_steps import small_model
from thinwire.bench.ranks import run_commands
from thinwire.bench.registry import Rows
from thinwire.cluster import load_cluster
from thinwire.lab.run import RESULTS, LabOptions

DEFAULTS = {"turns": 25, "steps": 8, "micro_batch": 4, "context": 128, "layers": 4, "width": 128, "ranks": 2, "bucket_bytes": 0}
UNSHAPED_BAR = 1.02
LAB_PORT = 29610


def run(cluster_name: str | None, options: Mapping[str, Any]) -> Rows:
    """Rows: case, ranks, seconds of a step (medians), processor seconds of rank 0, ratio ours / native, quartiles, bar, held."""
    found = run_commands(options["ranks"], _commands(options)).results
    rows = [_row("unshaped (loopback)", options["ranks"], found, UNSHAPED_BAR)]
    if cluster_name is not None:
        cluster = load_cluster(cluster_name)
        lab = run_commands(cluster, _commands(options, LAB_PORT), LabOptions(paced=False))
        rows.append(_row(f"{cluster.name}, delay {lab.delay}", cluster.world_size, lab.results, None))
    return rows


def _commands(options: Mapping[str, Any], port: int = 0) -> list[list[str]]:
    """Of the two contenders, for one rank each. port: of the first one's rank 0; 0: the launcher's, which each has its own of."""
    settings = {key: options[key] for key in ("turns", "steps", "micro_batch", "bucket_bytes")}
    text = json.dumps({**settings, "port": port, "model": small_model(options).model_dump()})
    here = Path(__file__).parent
    return [
        [sys.executable, str(here / "peers" / "plain_ddp.py"), str(here.parent / "models" / "transformer.py"), RESULTS, text],
        [sys.executable, "-m", "thinwire.bench.peers.rank", "our_ddp", RESULTS, text],
    ]


def _row(case: str, ranks: int, results: Mapping[str, Mapping[str, list[float]]], bar: float | None) -> dict[str, Any]:
    plain, ours = results["plain_ddp"], results["our_ddp"]
    ratios = sorted(mine / theirs for mine, theirs in zip(ours["exchange"], plain["exchange"], strict=True))
    low, high = quartiles(ratios)
    native_low, native_high = quartiles(plain["exchange"])
    native_s, ratio = median(plain["exchange"]), median(ratios)
    noise = (native_high - native_low) / native_s
    bar = 1 + noise if bar is None else bar
    return {
        "case": case,
        "ranks": ranks,
        "native_s": native_s,
        "ours_s": median(ours["exchange"]),
        "no_exchange_s": median(plain["no_exchange"]),
        "native_cpu_s": median(plain["processor"]),
        "ours_cpu_s": median(ours["processor"]),
        "ratio": ratio,
        "quartile_low": low,
        "quartile_high": high,
        "noise": noise,
        "bar": bar,
        "held": ratio <= bar,
    }


def quartiles(values: list[float]) -> tuple[float, float]:
    """The values with a quarter of the others below, and above."""
    ordered, quarter = sorted(values), len(values) // 4
    return ordered[quarter], ordered[-1 - quarter]
