"""What a run writes about itself: what it is, what was predicted, its events while it runs, what was measured. Rank 0 writes."""

import datetime
import platform
import time
from dataclasses import dataclass, field
from math import isfinite
from statistics import median
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter

from thinwire import __version__
from thinwire.cluster import Cluster, dump_cluster
from thinwire.config.run import RunConfig, dump_run
from thinwire.environment import Lab
from thinwire.layout import Layout
from thinwire.plan.cost import Prediction
from thinwire.record import Checkpoint, End, Eval, RunFolder, Step
from thinwire.train.assign import Assignment, shown
from thinwire.train.checkpoint.files import Progress
from thinwire.train.checkpoint.saver import Saved
from thinwire.train.task import Task
from thinwire.units import show

TIMES = ("step_s", "compute_s", "exposed_s", "waiting_s", "optimizer_s", "tokens_per_s")


@dataclass
class Reporter:
    """A line in the terminal, an event in the run folder, TensorBoard scalars. started: time.perf_counter() at which the run's
    clock stands at 0."""

    folder: RunFolder
    num_steps: int
    unit: str
    started: float = field(default_factory=time.perf_counter)
    _intervals: list[Step] = field(default_factory=list)
    _board: SummaryWriter | None = None

    def step(self, event: Step) -> None:
        """After each interval of steps. time_s is filled in here."""
        event = event.model_copy(update={"time_s": self.now_s})
        self._intervals.append(event)
        self.folder.append(event)
        wait = (event.exposed_s + event.waiting_s) / event.step_s
        print(
            f"step {event.step:>{len(str(self.num_steps))}}/{self.num_steps}  loss {event.loss:.3f}  "
            f"{event.tokens_per_s:,.0f} tokens/s  {show(event.step_s, 's')} a step  "
            f"{show(event.wire_bytes, 'B')} a step on the wire  {wait:.0%} waiting for the wire",
            flush=True,
        )
        self._scalars(event.step, {"loss/train": event.loss, "learning_rate": event.learning_rate})
        self._scalars(event.step, {f"step/{name}": getattr(event, name) for name in (*self._times(), "wire_bytes")})

    def evaluation(self, step: int, tokens: int, loss: float) -> None:
        """After an evaluation on the held-out part."""
        self.folder.append(Eval(step=step, time_s=self.now_s, tokens=tokens, loss=loss))
        print(f"step {step}: held-out loss {loss:.4f} {self.unit}", flush=True)
        self._scalars(step, {"loss/held_out": loss})

    def assigned(self, step: int, counts: Assignment) -> None:
        """From this step on, faster ranks have more micro-batches."""
        print(f"step {step}: {shown(counts)}", flush=True)

    def checkpoint(self, saved: Saved) -> None:
        """After a checkpoint is whole."""
        step, path = saved.progress.step, f"checkpoints/{saved.progress.name}"
        self.folder.append(Checkpoint(step=step, time_s=self.now_s, path=path, save_s=saved.save_s, blocked_s=saved.blocked_s))
        times = f"{show(saved.save_s, 's')}, training stood for {show(saved.blocked_s, 's')}"
        print(f"step {step}: checkpoint {path} ({times})", flush=True)

    def end(self, step: int, reason: str) -> None:
        """The last thing."""
        self.folder.append(End(step=step, time_s=self.now_s, reason=reason))
        if self._board is not None:
            self._board.close()

    def medians(self) -> dict[str, float]:
        """Of the seconds of a step over the intervals, without the first, in which buffers are made and caches are cold."""
        steady = self._intervals[1:] or self._intervals
        return {name: median(getattr(event, name) for event in steady) for name in self._times()} if steady else {}

    def _times(self) -> list[str]:
        """With that of the host where it is known: on a device."""
        return [*TIMES, *(["host_s"] if isfinite(self._intervals[-1].host_s) else [])]

    @property
    def now_s(self) -> float:
        return time.perf_counter() - self.started

    def _scalars(self, step: int, values: dict[str, Any]) -> None:
        self._board = self._board or SummaryWriter(str(self.folder.path / "tensorboard"))
        for name, value in values.items():
            self._board.add_scalar(name, value, step)


@dataclass(frozen=True, kw_only=True)
class About:
    """The environment of a run, for its record. hosts: by rank."""

    hosts: list[str]
    device: str
    dtype: str
    paced: bool
    lab: Lab | None
    layout: Layout


def write_beginning(
    folder: RunFolder, config: RunConfig, cluster: Cluster, task: Task, prediction: Prediction, about: About
) -> None:
    """Before the first step, on rank 0: the files that describe the run, and the same in the terminal."""
    described = task.describe()
    delay = about.lab.delay if about.lab else "none"
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
        "delay": delay,
        "num_parameters": task.workload.num_parameters,
        "unit": task.unit,
        **described,
    }
    folder.write("record.json", record)
    dump_run(config, folder.path / "run.toml")
    if cluster.links:
        dump_cluster(cluster, folder.path / "cluster.toml")
    folder.write("predicted.json", prediction.as_record())

    where = f"in the lab, compute {'paced' if about.paced else 'not paced'}, delay: {delay}" if about.lab else "no lab"
    ranks = f"{about.layout.world_size} ranks ({about.layout})"
    active = f", {task.workload.num_parameters - idle:,} active for a token," if (idle := config.model.idle_parameters) else ""
    print(f"{task.workload.num_parameters:,} parameters{active} on {ranks}, {about.dtype}, {where}")
    data = described["data"]
    print(f"data: {data['source']}, {data['bytes'] / 1e6:.1f} MB in {data['files']} files")
    if data["skipped"]:
        print(f"data: {data['skipped']}")
    if "baseline" in described:
        print(f"a {described['baseline']['name']} scores {described['baseline']['loss']:.4f} {task.unit} on the held-out part")
    print(
        f"predicted step: {prediction.step_s:.3f} s = {prediction.compute_s:.3f} computing + {prediction.exposed_s:.3f} exposed "
        f"communication + {prediction.waiting_s:.3f} waiting for slower ranks + {prediction.optimizer_s:.3f} optimizer",
        flush=True,
    )


def write_resume(folder: RunFolder, reporter: Reporter, progress: Progress, world_size: int, assignment: Assignment) -> None:
    """Before the first step of a resumed run, on rank 0: later events go, the clock goes on."""
    kept = folder.resume_at(progress.step)
    reporter.started -= kept.time_s
    print(f"resumed {folder.path} at step {progress.step}; {kept.dropped} later events dropped", flush=True)
    if progress.world_size != world_size:
        times = len(assignment) / len(progress.assignment)  # replicas
        tokens = "as many tokens" if times == 1 else f"{times:g} times the tokens"
        print(f"{world_size} ranks instead of {progress.world_size}: a step now counts {tokens}", flush=True)
    if progress.assignment != assignment and len({*progress.assignment, *assignment}) > 1:
        print(f"assigned anew, {shown(assignment)}; it was {' '.join(map(str, progress.assignment))}", flush=True)
