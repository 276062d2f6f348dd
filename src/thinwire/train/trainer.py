"""The loop: steps, reports, evaluations, checkpoints. The same for every synchroniser and layout."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from thinwire.collectives.ledger import Ledger, Snapshot, difference
from thinwire.collectives.metered_calls import all_reduce
from thinwire.config.run import TrainSection
from thinwire.record import Step
from thinwire.traffic import Transfer
from thinwire.train import checkpoint
from thinwire.train.deal import Deal, place_of, redeal
from thinwire.train.reporter import Reporter
from thinwire.train.runtime import StopRequest
from thinwire.train.step import Stepper, StepTimes, learning_rate
from thinwire.train.task import Task

NUMBER_BYTES = 8
"""Reports are float64."""


def report_traffic(train: TrainSection, axis: str, world_size: int) -> list[Transfer]:
    """What the loop itself sends: a summary per report (loss, stop, seconds by rank) and two numbers per evaluation."""
    transfers = [
        Transfer(
            label="summary",
            axis=axis,
            op="all_reduce",
            message_bytes=(2 + world_size) * NUMBER_BYTES,
            item_bytes=NUMBER_BYTES,
            every=train.log_every,
        )
    ]
    if train.eval_every:
        transfers.append(
            Transfer(
                label="evaluation",
                axis=axis,
                op="all_reduce",
                message_bytes=2 * NUMBER_BYTES,
                item_bytes=NUMBER_BYTES,
                every=train.eval_every,
            )
        )
    return transfers


@dataclass(kw_only=True)
class Trainer:
    """One per rank; everything it does is collective over `group`, the replicas. `reporter` on rank 0 only."""

    task: Task
    stepper: Stepper
    train: TrainSection
    parts: checkpoint.Parts
    group: dist.ProcessGroup
    device: torch.device
    stop: StopRequest
    checkpoints: Path
    reporter: Reporter | None
    deal: Deal
    """Micro-batches of a step by replica."""
    by_speed: bool = False
    """Whether `deal` follows what the reports say."""
    tokens: int = 0
    _interval: list[StepTimes] = field(default_factory=list)
    _interval_loss: float = 0.0
    _interval_started: float = 0.0
    _interval_bytes: int = 0
    _steady: tuple[int, Snapshot] | None = None
    _last: tuple[int, Snapshot] | None = None
    _saved_step: int = -1

    @property
    def replica(self) -> int:
        """The number of this replica."""
        return self.group.rank()

    @property
    def ledger(self) -> Ledger:
        return self.parts.ledger

    def run(self, first_step: int) -> str:
        """Train from `first_step` to the end or until asked to stop. Returns "done" or "interrupted"."""
        train, reason = self.train, "done"
        self._begin_interval()
        for step in range(first_step, train.steps):
            self.ledger.step = step
            num_micro = self.deal[self.replica]
            batches = (self.task.batch(step, place_of(self.deal, self.replica, micro)) for micro in range(num_micro))
            with self.ledger.label("replica"):
                loss, times = self.stepper.run(step, batches, num_micro, sum(self.deal) / len(self.deal))
            self._interval.append(times)
            self._interval_loss += loss
            self.tokens += self.task.workload.tokens_per_microbatch * sum(self.deal)
            done = step + 1
            if (done % train.log_every == 0 or done == train.steps) and self._report(done):
                reason = "interrupted"
                break
            pause = time.perf_counter()
            if train.eval_every and done % train.eval_every == 0 and done < train.steps:
                self.evaluate(done)
            if train.checkpoint_every and done % train.checkpoint_every == 0:
                self.save(done)
            self._interval_started += time.perf_counter() - pause
        else:
            done = max(first_step, train.steps)
        if reason == "done":
            self.parts.sync.finish()
            self.evaluate(done)
        if self._saved_step != done:
            self.save(done)
        if self.reporter:
            self.reporter.end(done, reason)
        return reason

    def evaluate(self, step: int) -> float:
        """The score on the held-out part, over all ranks."""
        with self.parts.sync.averaged():
            total, weight = self.task.score(self.parts.model, self.replica)
        sums = self._sum(torch.tensor([total, weight], dtype=torch.float64), "evaluation")
        score = float(sums[0] / sums[1])
        if self.reporter:
            self.reporter.evaluation(step, self.tokens, score)
        return score

    def save(self, step: int) -> None:
        """Write a checkpoint of the state after `step` steps."""
        started = time.perf_counter()
        progress = checkpoint.Progress(step=step, tokens=self.tokens, world_size=self.group.size(), deal=self.deal)
        path = checkpoint.save(self.checkpoints, self.parts, progress)
        self._saved_step = step
        if self.reporter:
            self.reporter.checkpoint(step, f"{path.parent.name}/{path.name}", time.perf_counter() - started)

    def measured_transfers(self) -> list[dict[str, Any]]:
        """What the ledger has for the steps between the first and the last report, per step; empty if there were not two."""
        if self._steady is None or self._last is None or self._last[0] <= self._steady[0]:
            return []
        steps = self._last[0] - self._steady[0]
        rows = []
        for call, total in difference(self._last[1], self._steady[1]).items():
            every = max(1, round(steps / total.calls))
            rows.append(
                {
                    "label": call.label,
                    "axis": call.axis,
                    "op": call.op,
                    "message_bytes": call.message_bytes,
                    "calls": max(1, round(total.calls / steps)),
                    "every": every,
                    "wire_bytes_per_step": total.wire_bytes / steps,
                    "seconds": total.seconds / total.calls,
                }
            )
        return rows

    def _report(self, done: int) -> bool:
        """End an interval: all ranks exchange loss, stop requests and compute times. True if any rank was asked to stop."""
        count, rank = len(self._interval), self.group.rank()
        compute = sum(times.compute_s for times in self._interval) / count
        wait = sum(times.wait_s for times in self._interval) / count
        usual = median(
            times.compute_s for times in self._interval
        )  # one step that was disturbed says nothing about a rank's speed
        vector = torch.zeros(2 + self.group.size(), dtype=torch.float64)
        vector[0], vector[1], vector[2 + rank] = self._interval_loss / count, float(self.stop.requested), usual
        vector = self._sum(vector, "summary")
        waiting = min(wait, max(0.0, float(vector[2:].max()) - usual))
        seconds = (time.perf_counter() - self._interval_started) / count
        if self.reporter:
            tokens = self.task.workload.tokens_per_microbatch * sum(self.deal)
            self.reporter.step(
                Step(
                    step=done,
                    time_s=0.0,
                    tokens=self.tokens,
                    loss=float(vector[0]) / self.group.size(),
                    step_s=seconds,
                    compute_s=compute,
                    exposed_s=wait - waiting,
                    waiting_s=waiting,
                    optimizer_s=max(0.0, seconds - compute - wait),
                    tokens_per_s=tokens / seconds,
                    wire_bytes=(self.ledger.sent_bytes - self._interval_bytes) / count,
                    learning_rate=learning_rate(self.train, done - 1),
                )
            )
        mark = (done, self.ledger.snapshot())
        if self._steady is None:
            self._steady = mark if done >= self.stepper.sync.settled_after else None
        elif count == self.train.log_every:
            self._last = mark
        if self.by_speed and done < self.train.steps:
            self._redeal(done, vector[2:].tolist())
        self._begin_interval()
        return float(vector[1]) > 0

    def _redeal(self, done: int, compute_s: Sequence[float]) -> None:
        """compute_s: of a usual step, by replica, the same numbers on all of them; so all come to the same deal."""
        before = self.deal
        self.deal = redeal(before, [seconds / count for seconds, count in zip(compute_s, before, strict=True)])
        if self.reporter and self.deal != before:
            self.reporter.dealt(done, self.deal)

    def _begin_interval(self) -> None:
        self._interval, self._interval_loss = [], 0.0
        self._interval_started, self._interval_bytes = time.perf_counter(), self.ledger.sent_bytes

    def _sum(self, vector: torch.Tensor, label: str) -> torch.Tensor:
        vector = vector.to(self.device)
        all_reduce(vector, self.group, self.ledger, label).wait()
        return vector.cpu()
