"""Run folders with plausible random numbers, for the tests of the record and of the report."""

import math
import random
from pathlib import Path
from typing import Any

from thinwire.cluster import Cluster, dump_cluster
from thinwire.record import RunFolder

LABELS = ("gradients/bucket0", "gradients/bucket1", "gradients/bucket2")
RUN_TOML = """[model]
preset = "1M"

[layout]
data = 4

[sync]
kind = "every_step"  # <script>alert("never")</script>
"""


def make_run(
    path: Path,
    cluster: Cluster,
    seed: int = 0,
    steps: int = 300,
    without: tuple[str, ...] = (),
    end: str | None = "done",
    nan_from: int | None = None,
) -> RunFolder:
    """A run of `steps` steps on `cluster`; `without`: files left out; `end` None: killed; loss is nan from a step on."""
    random_ = random.Random(seed)
    folder = RunFolder.create(path)
    hosts = [cluster.host_of(rank).name for rank in range(cluster.world_size)]
    folder.write("record.json", _record(hosts))
    folder.write_text("run.toml", RUN_TOML)
    dump_cluster(cluster, path / "cluster.toml")
    sizes = [random_.randrange(2**15, 2**18) * 4 for _ in LABELS]
    wire = [_ring_bytes(size, cluster.world_size) for size in sizes]
    compute_s, exposed_s = random_.uniform(0.2, 0.5), random_.uniform(0.1, 0.4)
    folder.write("predicted.json", _cost(cluster, sizes, wire, compute_s, exposed_s))
    _events(folder, random_, steps, (compute_s, exposed_s), (sum(wire), end, nan_from))
    measured = _cost(cluster, [], [], compute_s * random_.uniform(0.95, 1.05), exposed_s * random_.uniform(0.9, 1.1))
    folder.write("measured.json", {**measured, "wire_bytes_per_step": sum(wire), "missed_pace": 0.004, "links": []})
    folder.write("ledger.json", {"entries": _ledger(cluster.world_size, sizes, wire, steps)})
    sent = {host: float(steps * sum(wire) * hosts.count(host)) for host in dict.fromkeys(hosts)}
    cards = [_card(host, round(count * random_.uniform(1.045, 1.06)), random_) for host, count in sent.items()]
    folder.write("cards.json", {"cards": cards, "ledger_sent_bytes": sent})
    for name in without:
        (path / name).unlink()
    return folder


def _ring_bytes(size: int, world_size: int) -> int:
    return 2 * size * (world_size - 1) // world_size


def _record(hosts: list[str]) -> dict[str, Any]:
    return {
        "thinwire": "0.1.0",
        "torch": "2.13.0+cpu",
        "started": "2026-11-21T09:30:00+00:00",
        "world_size": len(hosts),
        "hosts": hosts,
        "device": "cpu",
        "dtype": "float32",
        "paced": True,
        "lab": True,
        "delay": "none",
        "data": {
            "source": "python standard library",
            "files": 1612,
            "documents": 1612,
            "bytes": 24_311_904,
            "sha256": "ab" * 32,
            "skipped": "",
        },
        "num_parameters": 1_064_448,
        "unit": "nats per byte",
        "baseline": {"name": "bigram table", "loss": 2.451},
    }


def _cost(cluster: Cluster, sizes: list[int], wire: list[int], compute_s: float, exposed_s: float) -> dict[str, Any]:
    step_s = compute_s + exposed_s + 0.012 + 0.004
    busy_s = 8 * sum(wire) * 1.0466
    return {
        "step_s": step_s,
        "compute_s": compute_s,
        "exposed_s": exposed_s,
        "waiting_s": 0.004,
        "optimizer_s": 0.012,
        "tokens_per_s": 4096 / step_s,
        "wire_bytes_per_step": sum(wire),
        "assumptions": ["the ring crosses each card once in each direction", "gloo's copies cost 0.3 ns a byte"],
        "transfers": [
            {
                "label": label,
                "axis": "data",
                "op": "all_reduce",
                "message_bytes": size,
                "calls": 1,
                "every": 1,
                "wire_bytes_per_step": count,
                "seconds": 8 * count * 1.0466 / 1e8,
                "even": True,
            }
            for label, size, count in zip(LABELS, sizes, wire, strict=False)
        ],
        "links": [
            {
                "source": link.source,
                "target": link.target,
                "bytes_per_step": sum(wire),
                "busy_s": min(busy_s / link.bandwidth_bps.value, step_s),
            }
            for link in cluster.links
        ],
    }


def _events(
    folder: RunFolder, random_: random.Random, steps: int, cost: tuple[float, float], rest: tuple[int, str | None, int | None]
) -> None:
    time_s = 0.0
    wire_bytes, end, nan_from = rest
    for step in range(1, steps + 1):
        step_s = sum(cost) * random_.lognormvariate(0, 0.04) + 0.016
        time_s += step_s
        loss = 2.05 + 3.5 * math.exp(-step / 40) + random_.gauss(0, 0.05)
        finite = nan_from is None or step < nan_from
        folder.append(
            {
                "event": "step",
                "step": step,
                "time_s": time_s,
                "tokens": 4096 * step,
                "loss": loss if finite else math.nan,
                "step_s": step_s,
                "compute_s": cost[0],
                "exposed_s": max(0.0, step_s - cost[0] - 0.016),
                "waiting_s": 0.004,
                "optimizer_s": 0.012,
                "tokens_per_s": 4096 / step_s,
                "wire_bytes": wire_bytes,
                "learning_rate": 1e-3,
            }
        )
        if step % max(1, steps // 6) == 0:
            held = loss + 0.04 if finite else math.nan
            folder.append({"event": "eval", "step": step, "time_s": time_s, "tokens": 4096 * step, "loss": held})
    if end is not None:
        folder.append({"event": "checkpoint", "step": steps, "time_s": time_s, "path": f"checkpoints/step-{steps:06d}"})
        folder.append({"event": "end", "step": steps, "time_s": time_s, "reason": end})


def _ledger(world_size: int, sizes: list[int], wire: list[int], steps: int) -> list[dict[str, Any]]:
    setup = {"label": "set-up", "axis": "world", "op": "broadcast", "calls": 3, "message_bytes": 4_257_792}
    common = {"world_size": world_size, "seconds": 1.25}
    entries = []
    for rank in range(world_size):
        entries.append({**setup, **common, "rank": rank, "wire_bytes": 4_257_792, "first_step": -1, "last_step": -1})
        for label, size, count in zip(LABELS, sizes, wire, strict=True):
            span = {"first_step": 0, "last_step": steps - 1, "calls": steps}
            total = {"message_bytes": size, "wire_bytes": count * steps}
            entries.append({"rank": rank, "label": label, "axis": "data", "op": "all_reduce", **common, **span, **total})
    return entries


def _card(host: str, sent_bytes: int, random_: random.Random) -> dict[str, Any]:
    received = round(sent_bytes * random_.uniform(0.998, 1.002))
    counts = {"sent_bytes": sent_bytes, "received_bytes": received, "sent_share": 0.5, "received_share": 0.5}
    return {"host": host, "interface": "eth0", **counts}
