"""What the planner's choice loses: on clusters of the lab, plans of a grid are predicted, and run beside their predictions.

A cell is a cluster with a model. Of each entry of GRID that fits there, the layout that is predicted the fastest is run: links
shaped, compute paced. A step is the mean over `steps` steps, or two periods of what is exchanged rarely, after the first SKIPPED;
a plan is cut when it takes FAR times as long as the best so far, and counts with what it took until then.

    time = step * tokens that the plan needs (`plan.penalties`, the same for prediction and measurement)
    error = |predicted / measured - 1| of a step            regret = time of the plan predicted the fastest / least time - 1

All hosts of a cluster together compute 8 Gflop/s: eight ranks keep that on two cores, since a step of these models is some ten
times as fast unpaced. Links have up to 1 Gbit/s, of which the lab still carries what a ring of eight hosts sends at once.
"""

import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from statistics import mean, median
from typing import Any

from thinwire.bench.kept import keep_rows, kept_rows
from thinwire.bench.registry import Rows
from thinwire.cluster import Cluster, dump_cluster
from thinwire.cluster.spec import ClusterSpec, expand
from thinwire.config.run import RunConfig, dump_run
from thinwire.endings import signals_unwind
from thinwire.errors import UserError
from thinwire.lab.run import LabOptions, prepare
from thinwire.lab.wiring import imitated
from thinwire.plan.candidates import Problem
from thinwire.plan.cost import ranks_per_core
from thinwire.plan.measurements.score import spearman
from thinwire.plan.price import Priced
from thinwire.plan.problem import planned_run, problem_of
from thinwire.plan.search import search
from thinwire.record import RunFolder
from thinwire.tomlfile import validate
from thinwire.train.outline import outline

DEFAULTS: Mapping[str, Any] = {"cells": [], "json": "", "steps": 8}
"""cells: parts of names, none for all; json: where rows are kept after each cell, and cells are that need not be run again."""
TOTAL_FLOPS_PER_S = 8e9
SKIPPED, EVERY, FAR = 2, 10, 3.0
POLL_S, START_S, LONGEST_S = 0.5, 120.0, 60.0
"""After a start, and of a step: what takes longer is ended."""
RUN_TOKENS = 20e6
"""For which the penalties of tokens are taken: so a start of rare exchanges counts little."""
CLUSTERS: Mapping[str, Sequence[tuple[int, str, float, str]]] = {
    "2 at 5 Mbit/s": [(2, "5 Mbit/s", 1, "")],
    "2 at 1 Gbit/s": [(2, "1 Gbit/s", 1, "")],
    "4 at 20 Mbit/s": [(4, "20 Mbit/s", 1, "")],
    "4 at 100 Mbit/s": [(4, "100 Mbit/s", 1, "")],
    "4 at 1 Gbit/s": [(4, "1 Gbit/s", 1, "")],
    "8 at 50 Mbit/s": [(8, "50 Mbit/s", 1, "")],
    "racks of 2 over 20 Mbit/s": [(2, "100 Mbit/s", 1, "20 Mbit/s")] * 2,
    "racks of 4 over 100 Mbit/s": [(4, "100 Mbit/s", 1, "100 Mbit/s")] * 2,
    "one slow card": [(3, "100 Mbit/s", 1, ""), (1, "10 Mbit/s", 1, "")],
    "one slow device": [(3, "100 Mbit/s", 1, ""), (1, "100 Mbit/s", 0.5, "")],
    "sites of 3 over 5 Mbit/s": [(3, "200 Mbit/s", 1, "5 Mbit/s")] * 2,
    "uneven uplinks": [(2, "100 Mbit/s", 1, uplink) for uplink in ("100 Mbit/s", "30 Mbit/s", "10 Mbit/s")],
}
"""Groups of (hosts, rate of their cards, speed of their devices, rate of their rack's uplink, "": none)."""
MODELS: Mapping[str, tuple[int, Sequence[str]]] = {
    "width 128": (1024, ["model.layers=4", "model.width=128", "model.heads=8", "train.sequence=64"]),
    "width 192": (512, ["model.layers=6", "model.width=192", "model.heads=8", "train.sequence=32"]),
}
"""Tokens of a step, and what else is set."""
ALONE = ("layout.outer=1", "layout.pipe=1", "layout.shard=1", "layout.tensor=1", "layout.seq=1")
RARE = ("layout.pipe=1", "layout.shard=1", "layout.tensor=1", "layout.seq=1", f"sync.every={EVERY}", "compress.kind=int4")
GRID: Mapping[str, Sequence[tuple[str, ...]]] = {
    "data, float32": [(*ALONE, "compress.kind=none")],
    "data, int8": [(*ALONE, "compress.kind=int8")],
    "data, int4": [(*ALONE, "compress.kind=int4")],
    "diloco": [(*RARE, "sync.kind=diloco")],
    "streaming": [(*RARE, "sync.kind=streaming", "sync.overlap=2")],
    "pipeline": [
        ("layout.outer=1", "layout.shard=1", "layout.tensor=1", "layout.seq=1", f"layout.pipe={n}") for n in (2, 3, 4, 6)
    ],
    "shard": [("layout.outer=1", "layout.pipe=1", f"layout.shard={ranks}") for ranks in (2, 3, 4, 6, 8)],
    "tensor": [("layout.outer=1", "layout.pipe=1", f"layout.tensor={ranks}") for ranks in (2, 4, 8)],
}
"""What is kept of the rest of the search; of several the best predicted."""
BARS: Mapping[str, float] = {"median error": 0.08, "spearman": 0.95, "near": 11 / 12, "winners": 4, "out of memory": 0}


def run(cluster_name: str | None, options: Mapping[str, Any]) -> Rows:
    """A row for each plan that was run, and one for each bar. UserError for a cell that there is not."""
    if cluster_name:
        raise UserError("bench regret has clusters of its own; leave --cluster out, and name some by --cells")
    cells = [f"{cluster}; {model}" for cluster in CLUSTERS for model in MODELS]
    wanted = [cell for cell in cells if not options["cells"] or any(part in cell for part in options["cells"])]
    if not wanted:
        raise UserError(f"--cells {','.join(options['cells'])}: there are {' | '.join(cells)}")
    rows = [row for row in kept_rows(options["json"]) if "plan" in row]
    for cell in wanted:
        if cell not in {row["cell"] for row in rows}:
            rows += _cell(cell, options["steps"])
            keep_rows(options["json"], "regret", rows)
    return rows + judged(rows)


def cluster_of(name: str) -> Cluster:
    """Of CLUSTERS."""
    groups = CLUSTERS[name]
    speed = TOTAL_FLOPS_PER_S / sum(hosts * part for hosts, _, part, _ in groups)
    content: dict[str, Any] = {"name": name, "host": [], "rack": []}
    for number, (hosts, card, part, uplink) in enumerate(groups):
        host = {"name": f"h{number}-{{i}}", "count": hosts, "card": {"bandwidth_bps": card}}
        host |= {"device": {"kind": "cpu", "flops_per_s": f"{speed * part} flop/s"}} | (
            {"rack": f"rack{number}"} if uplink else {}
        )
        content["host"].append(host)
        content["rack"] += [{"name": f"rack{number}", "uplink": {"bandwidth_bps": uplink}}] if uplink else []
    return expand(validate(ClusterSpec, content, name))


def plans_of(cluster: Cluster, file: Path, model: str) -> Iterator[tuple[str, Problem, Priced]]:
    """By the entry of GRID; what does not fit there is left out. cluster: as the lab has that of `file`."""
    tokens, changes = MODELS[model]
    for name, entries in GRID.items():
        found = []
        for kept in entries:
            problem = problem_of(None, [*changes, *kept], str(file), "", outline, tokens)
            crowd = ranks_per_core(cluster.world_size)
            problem = replace(problem, cluster=cluster, times=(1,), tokens=RUN_TOKENS, ranks_per_core=crowd)
            try:
                found.append((problem, search(problem, refined=0).ranking[0]))
            except UserError:
                continue
        if found:
            yield name, *min(found, key=lambda one: one[1].time_s)


def judged(rows: Rows) -> Rows:
    """A row for each bar, of the plans that were run."""
    by_cell: dict[str, Rows] = {}
    for row in rows:
        by_cell.setdefault(row["cell"], []).append(row)
    ran = [row for row in rows if row["measured_s"]]
    if not ran:
        return []
    best = {cell: min((one for one in own if one["measured_s"]), key=_time, default=None) for cell, own in by_cell.items()}
    near = 0
    for cell, own in by_cell.items():
        chosen, least = min(own, key=lambda one: one["predicted_s"] * one["tokens"]), best[cell]
        near += bool(least and chosen["measured_s"] and _time(chosen) <= 1.05 * _time(least))
    found = {
        "median error": median(abs(one["error"]) for one in ran),
        "spearman": spearman([one["predicted_s"] for one in ran], [one["measured_s"] for one in ran]),
        "near": near / len(by_cell),
        "winners": len({one["plan"] for one in best.values() if one}),
        "out of memory": sum("memory" in one["failed"].lower() for one in rows),
    }
    least_is_best = ("spearman", "near", "winners")
    return [
        {
            "bar": name,
            "cells": len(by_cell),
            "value": value,
            "wanted": BARS[name],
            "held": value is not None and (value >= BARS[name] - 1e-9 if name in least_is_best else value <= BARS[name]),
        }
        for name, value in found.items()
    ]


def _time(row: Mapping[str, Any]) -> float:
    return float(row["measured_s"] * row["tokens"])


def _cell(cell: str, steps: int) -> Rows:
    """Runs the plans, the one predicted the fastest first."""
    name, model = cell.split("; ")
    cluster = cluster_of(name)
    with tempfile.TemporaryDirectory(prefix="thinwire-regret-") as folder:
        file = Path(folder) / "cluster.toml"
        dump_cluster(cluster, file)
        as_run = imitated(cluster, prepare(cluster, LabOptions())[1].delay)
        plans = sorted(plans_of(as_run, file, model), key=lambda one: one[2].time_s)
        rows: Rows = []
        for number, (entry, problem, one) in enumerate(plans):
            more = prod(one.penalties.values())
            best = min((_time(row) / more for row in rows if row["measured_s"]), default=float("inf"))
            count = SKIPPED + (2 * EVERY if one.candidate.sync != "every_step" else steps)
            config = planned_run(one, problem, "")
            train = {"steps": count, "log_every": 1, "eval_every": 0, "dtype": "float32", "run": f"{folder}/{number}"}
            train["eval_tokens"] = MODELS[model][0]  # of the one at the end, for which shards and stages need the links too
            config = config.model_copy(update={"train": config.train.model_copy(update=train)})
            taken, failed = _run(file, config, Path(folder), FAR * best)
            measured = mean(taken) if taken else None
            print(f"{cell}: {entry}: predicted {one.step_s:.3f} s, measured {measured and round(measured, 3)} s", flush=True)
            rows.append(
                {
                    "cell": cell,
                    "plan": entry,
                    "candidate": str(one.candidate),
                    "predicted_s": one.step_s,
                    "measured_s": measured,
                    "error": one.step_s / measured - 1 if measured else None,
                    "tokens": more,
                    "steps": len(taken),
                    "cut": 0 < len(taken) < count - SKIPPED,
                    "failed": failed,
                }
            )
        return rows


def _run(file: Path, config: RunConfig, folder: Path, most_s: float) -> tuple[list[float], str]:
    """Seconds of its steps, after the first ones, until they take more than `most_s` each; and its last line, if it failed."""
    dump_run(config, folder / "run.toml")
    command = [sys.executable, "-m", "thinwire", "lab", "run", "--cluster", str(file), "--", "thinwire", "train"]
    with signals_unwind(), (folder / "output").open("w") as output:
        lab = subprocess.Popen([*command, str(folder / "run.toml")], stdout=output, stderr=output, cwd=folder)
        begun, cut = time.monotonic(), False
        try:
            while lab.poll() is None:
                time.sleep(POLL_S)
                taken = _steps(Path(config.train.run or ""))
                late_s = time.monotonic() - begun - START_S - (SKIPPED + 2 + len(taken)) * max(1.0, min(most_s, LONGEST_S))
                if not cut and (late_s > 0 or (len(taken) > 1 and mean(taken) > most_s)):
                    lab.send_signal(signal.SIGINT)
                    cut = True
        finally:
            if lab.poll() is None:
                lab.send_signal(signal.SIGINT)
            lab.wait()
    taken = _steps(Path(config.train.run or ""))
    last = (folder / "output").read_text().strip().rpartition("\n")[2]
    return taken, "" if lab.returncode == 0 or cut else last


def _steps(run: Path) -> list[float]:
    try:
        return [one.step_s for one in RunFolder.open(run).steps()][SKIPPED:]
    except UserError:
        return []
