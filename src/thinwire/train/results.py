"""What a run writes about itself besides its events: what it is, what was predicted, what was measured."""

import datetime
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from thinwire import __version__
from thinwire.cluster import Cluster, dump_cluster
from thinwire.config.run import RunConfig, dump_run
from thinwire.layout import Layout
from thinwire.plan.cost import Prediction
from thinwire.record import RunFolder
from thinwire.train.checkpoint import Progress
from thinwire.train.deal import Deal, shown
from thinwire.train.pace import Pacer
from thinwire.train.reporter import Reporter
from thinwire.train.runtime import Lab
from thinwire.train.task import Task
from thinwire.train.trainer import Trainer


@dataclass(frozen=True, kw_only=True)
class About:
    """The environment of a run, for its record. hosts: by rank."""

    hosts: list[str]
    device: str
    dtype: str
    paced: bool
    lab: Lab | None
    layout: Layout

    @property
    def delay(self) -> str:
        return self.lab.delay if self.lab else "none"


def write_beginning(
    folder: RunFolder, config: RunConfig, cluster: Cluster, task: Task, prediction: Prediction, about: About
) -> None:
    """Before the first step, on rank 0: the files that say what runs, and the same in the terminal."""
    described = task.describe()
    record = {
        "thinwire": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "started": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "world_size": about.layout.world_size,
        "hosts": about.hosts,
        "device": about.device,
        "dtype": about.dtype,
        "paced": about.paced,
        "lab": about.lab is not None,
        "delay": about.delay,
        "num_parameters": task.workload.num_parameters,
        "unit": task.unit,
        **described,
    }
    folder.write("record.json", record)
    dump_run(config, folder.path / "run.toml")
    if cluster.links:
        dump_cluster(cluster, folder.path / "cluster.toml")
    folder.write("predicted.json", prediction.as_record())

    where = "no lab"
    if about.lab:
        where = f"in the lab, compute {'paced' if about.paced else 'not paced'}, delay: {about.delay}"
    print(
        f"{task.workload.num_parameters:,} parameters on {about.layout.world_size} ranks ({about.layout}), {about.dtype}, {where}"
    )
    data = described["data"]
    print(f"data: {data['source']}, {data['bytes'] / 1e6:.1f} MB in {data['files']} files")
    if "baseline" in described:
        print(f"a {described['baseline']['name']} scores {described['baseline']['loss']:.4f} {task.unit} on the held-out part")
    print(
        f"predicted step: {prediction.step_s:.3f} s = {prediction.compute_s:.3f} computing + {prediction.exposed_s:.3f} exposed "
        f"communication + {prediction.waiting_s:.3f} waiting for slower ranks + {prediction.optimizer_s:.3f} optimizer",
        flush=True,
    )


def write_resume(folder: RunFolder, reporter: Reporter, progress: Progress, world_size: int, deal: Deal) -> None:
    """Before the first step of a resumed run, on rank 0: later events go, the clock goes on."""
    kept = folder.resume_at(progress.step)
    reporter.started -= kept.time_s
    print(f"resumed {folder.path} at step {progress.step}; {kept.dropped} later events dropped", flush=True)
    if progress.world_size != world_size:
        times = world_size / progress.world_size
        print(f"{world_size} ranks instead of {progress.world_size}: a step now counts {times:g} times the tokens", flush=True)
    if progress.deal != deal and len({*progress.deal, *deal}) > 1:
        print(f"dealt anew, {shown(deal)}; it was {' '.join(map(str, progress.deal))}", flush=True)


def write_end(trainer: Trainer, folder: RunFolder, pacer: Pacer | None, results: Path | None) -> None:
    """After the last step: gather the ledgers of all ranks; rank 0 writes what was measured. Collective."""
    mine = {"entries": trainer.ledger.entries(trainer.group.rank()), "missed": pacer.missed_fraction if pacer else None}
    everybody: list[Any] | None = [None] * trainer.group.size() if trainer.reporter else None
    with trainer.ledger.label("results"):
        dist.gather_object(mine, everybody, dst=0)
    if trainer.reporter is None or everybody is None:
        return
    folder.write("ledger.json", {"entries": [entry for told in everybody for entry in told["entries"]]})
    medians, transfers = trainer.reporter.medians(), trainer.measured_transfers()
    if medians:
        measured = {
            **medians,
            "transfers": transfers,
            "wire_bytes_per_step": sum(row["wire_bytes_per_step"] for row in transfers),
            "missed_pace": max((told["missed"] for told in everybody if told["missed"] is not None), default=None),
        }
        folder.write("measured.json", measured)
    if results is not None:
        (results / "run_folder").write_text(str(folder.path), encoding="utf-8")
