"""What a run writes about itself: what it is, what was predicted, its events while it runs, what was measured. Rank 0 writes."""

import datetime
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isfinite
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from thinwire import __version__
from thinwire.cluster import Cluster, dump_cluster
from thinwire.config.run import RunConfig, dump_run
from thinwire.environment import Lab
from thinwire.layout import Layout
from thinwire.plan.cost import Prediction
from thinwire.record import Assigned, Checkpoint, End, Examples, Replanned, RunFolder, Scored, Step
from thinwire.train.assign import Assignment, shown
from thinwire.train.checkpoint.files import Progress
from thinwire.train.checkpoint.saver import Saved
from thinwire.train.loggers import Board
from thinwire.train.task import Task
from thinwire.units import show

if TYPE_CHECKING:
    from thinwire.train.replan import Replanner

TIMES = ("step_s", "compute_s", "exposed_s", "waiting_s", "optimizer_s", "tokens_per_s")


@dataclass
class Reporter:
    """A line in the terminal, an event in the run folder, scalars on `boards`. started: time.perf_counter() at which the run's
    clock stands at 0."""

    folder: RunFolder
    num_steps: int
    task: Task
    boards: Sequence[Board] = ()
    started: float = field(default_factory=time.perf_counter)
    _intervals: list[Step] = field(default_factory=list)

    def step(self, event: Step) -> None:
        """After each interval of steps. time_s is filled in here."""
        event = event.model_copy(update={"time_s": self.now_s})
        self._intervals.append(event)
        self.folder.append(event)
        wait = (event.exposed_s + event.waiting_s) / event.step_s
        print(
            f"step {event.step:>{len(str(self.num_steps))}}/{self.num_steps}  loss {event.loss:.3f}  "
            f"{event.tokens_per_s:,.0f} {self.task.item}s/s  {show(event.step_s, 's')} a step  "
            f"{show(event.wire_bytes, 'B')} a step on the wire  {wait:.0%} waiting for the wire",
            flush=True,
        )
        self._scalars(event.step, {"loss/train": event.loss, "learning_rate": event.learning_rate})
        self._scalars(event.step, {f"step/{name}": getattr(event, name) for name in (*self._times(), "wire_bytes")})

    def evaluation(self, step: int, tokens: int, loss: float, score: float | None = None) -> None:
        """After an evaluation on the held-out part."""
        scored = {} if score is None else {"score": score}
        self.folder.append({"event": "eval", "step": step, "time_s": self.now_s, "tokens": tokens, "loss": loss, **scored})
        said = f", {is_.name} {score:.2f} {is_.unit}" if (is_ := self.task.score_is) else ""
        print(f"step {step}: held-out loss {loss:.4f} {self.task.unit}{said}", flush=True)
        self._scalars(step, {"loss/held_out": loss, **scored})

    def examples(self, step: int, lines: Sequence[str]) -> None:
        """Held-out ones beside what the model says of them, if there are any."""
        if lines:
            self.folder.write("examples.json", Examples(step=step, lines=tuple(lines)))

    def assigned(self, step: int, counts: Assignment) -> None:
        """From this step on, faster ranks have more micro-batches."""
        self.folder.append(Assigned(step=step, time_s=self.now_s, micro_batches=counts))
        print(f"step {step}: {shown(counts)}", flush=True)

    def replanned(self, step: int, by: "Replanner", counts: Assignment) -> None:
        """From this step on; what was measured before is no part of what is measured."""
        self.folder.append(Replanned(step=step, time_s=self.now_s, changes=by.changes, why=by.why))
        self.folder.write("predicted.json", by.prediction(counts).as_record())
        self._intervals.clear()
        print(f"step {step}: planned anew: {by.choice.plan}: {by.why}", flush=True)
        if by.choice.by_speed:
            self.assigned(step, counts)

    def checkpoint(self, saved: Saved) -> None:
        """After a checkpoint is whole."""
        step, path = saved.progress.step, f"checkpoints/{saved.progress.name}"
        self.folder.append(Checkpoint(step=step, time_s=self.now_s, path=path, save_s=saved.save_s, blocked_s=saved.blocked_s))
        times = f"{show(saved.save_s, 's')}, training stood for {show(saved.blocked_s, 's')}"
        print(f"step {step}: checkpoint {path} ({times})", flush=True)

    def end(self, step: int, reason: str) -> None:
        """The last thing."""
        self.folder.append(End(step=step, time_s=self.now_s, reason=reason))
        for board in self.boards:
            board.close()

    def medians(self) -> dict[str, float]:
        """Of a step's seconds and bytes over the intervals, without the first, in which buffers are made and caches are cold."""
        steady = self._intervals[1:] or self._intervals
        if not steady:
            return {}
        times = {name: median(getattr(event, name) for event in steady) for name in self._times()}
        return times | {"wire_bytes_per_step": median(event.wire_bytes for event in steady)}

    def _times(self) -> list[str]:
        """With that of the host where it is known: on a device."""
        return [*TIMES, *(["host_s"] if isfinite(self._intervals[-1].host_s) else [])]

    @property
    def now_s(self) -> float:
        return time.perf_counter() - self.started

    def _scalars(self, step: int, values: dict[str, Any]) -> None:
        for board in self.boards:
            board.scalars(step, values)


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
        "places": [_place(about.layout, rank) for rank in range(about.layout.world_size)],
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
    if "score" in described:
        score = Scored.model_validate(described["score"])
        print(f"{score.baseline.name}: {score.name} {score.baseline.score:.2f} {score.unit}; asked is {score.margin:g} better")
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


def _place(layout: Layout, rank: int) -> dict[str, int]:
    """Of a rank on the axes that are used."""
    return {axis: place for axis, place in layout.coordinates(rank).items() if getattr(layout, axis) > 1}
