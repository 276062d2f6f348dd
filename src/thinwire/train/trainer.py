"""The loop: steps, reports, evaluations, checkpoints. The same for every synchroniser and layout."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from thinwire.collectives.chrome import write_trace
from thinwire.collectives.ledger import Ledger, Snapshot, difference
from thinwire.collectives.metered_calls import all_reduce
from thinwire.compress.exchange import make_exchange
from thinwire.config.run import TrainSection
from thinwire.errors import UserError
from thinwire.record import Step
from thinwire.traffic import EVALUATION, Transfer
from thinwire.train.assign import Assignment, index_in_step, reassign
from thinwire.train.checkpoint.files import Progress
from thinwire.train.checkpoint.saver import Saver
from thinwire.train.checkpoint.state import Parts
from thinwire.train.interval import Interval
from thinwire.train.pace import Pacer
from thinwire.train.pipelined import Pace
from thinwire.train.results import Reporter
from thinwire.train.runtime import StopRequest
from thinwire.train.step import Stepper, learning_rate
from thinwire.train.task import Task, shown
from thinwire.train.timeline import Timeline

if TYPE_CHECKING:
    from thinwire.train.replan import Replanner

NUMBER_BYTES = 8
"""Reports are float64."""
SUMMARY = 4
"""Numbers of a summary before the seconds by rank: loss, stop requests, whether a checkpoint is due, and whether one failed."""
SETTLE_POLL_S = 0.05
EXAMPLES = 8
"""Held-out ones that the report shows."""
PASS = ("kind", "stage", "micro", "begin_s", "end_s")


def report_traffic(train: TrainSection, axis: str, world_size: int, sums: int = 2) -> list[Transfer]:
    """What the loop itself sends: a summary per report (`Trainer._report`) and, per evaluation, `Task.num_sums` numbers."""
    summary = SUMMARY + world_size + train.replan
    messages = (("summary", summary, train.log_every), ("evaluation", sums, train.eval_every))
    return [
        Transfer(
            label=label,
            axis=axis,
            op="all_reduce",
            message_bytes=numbers * NUMBER_BYTES,
            item_bytes=NUMBER_BYTES,
            every=every,
        )
        for label, numbers, every in messages
        if every
    ]


@dataclass(kw_only=True)
class Trainer:
    """One per rank; everything it does is collective over `group`, all ranks. `reporter` on rank 0 only.

    replica: of this rank, among `len(assignment)`. loss_ranks: of a replica, whose losses' mean is its own. bubble_s: what a
    step of a pipeline waits even on idle wires, as predicted.
    """

    task: Task
    stepper: Stepper
    train: TrainSection
    parts: Parts
    group: dist.ProcessGroup
    replica: int
    device: torch.device
    stop: StopRequest
    saver: Saver
    reporter: Reporter | None
    assignment: Assignment
    """Micro-batches of a step by replica."""
    pipeline: Sequence[int] = ()
    """The ranks of rank 0's pipeline, whose passes are written down."""
    loss_ranks: int = 1
    bubble_s: float = 0.0
    by_speed: bool = False
    """Whether `assignment` follows the seconds in the reports."""
    replanner: "Replanner | None" = None
    """Who changes the plan while it trains."""
    tokens: int = 0
    saved_step: int = -1
    """Of the newest checkpoint, if there is one."""
    timeline: Timeline | None = None
    _interval: Interval = field(init=False)
    _interval_bytes: int = 0
    _steady: tuple[int, Snapshot] | None = None
    _last: tuple[int, Snapshot] | None = None
    _saved_at: float = field(default_factory=time.perf_counter)
    _chosen: int = 0
    """By rank 0, of the replanner; said to all in the next report."""
    _due_change: tuple[int, Sequence[float]] = (0, ())
    """The same, as all know it, and seconds of computing by rank."""

    @property
    def ledger(self) -> Ledger:
        return self.parts.ledger

    def run(self, first_step: int) -> str:
        """Train from `first_step` to the end or until asked to stop. Returns "done" or "interrupted"."""
        train, reason = self.train, "done"
        self._begin_interval()
        for step in range(first_step, train.steps):
            self.ledger.step = step
            self._change(step)
            num_micro = self.assignment[self.replica]
            batches = (self.task.batch(step, index_in_step(self.assignment, self.replica, micro)) for micro in range(num_micro))
            with self.ledger.label("replica"):
                ran = self.stepper.run(step, batches, num_micro, sum(self.assignment) / len(self.assignment))
            self._interval.add(ran)
            if self.timeline:
                self.timeline.step(step, ran)
            self.tokens += self.task.workload.tokens_per_microbatch * sum(self.assignment)
            done = step + 1
            due = False
            if done % train.log_every == 0 or done == train.steps:
                stop, due = self._report(done)
                if stop:
                    reason = "interrupted"
                    break
            evaluates = train.eval_every and done % train.eval_every == 0 and done < train.steps
            saves = due or (train.checkpoint_every and done % train.checkpoint_every == 0)
            if evaluates or saves:
                with self._interval.paused():
                    if evaluates:
                        self.evaluate(done)
                    if saves:
                        self.save(done)
        else:
            done = max(first_step, train.steps)
        if reason == "done":
            self.parts.sync.finish()
            self.evaluate(done, shows=EXAMPLES)
        if self.saved_step != done:
            self.save(done)
        self._settle()
        if self.reporter:
            self.reporter.end(done, reason)
        return reason

    def evaluate(self, step: int, shows: int = 0) -> float:
        """The loss on the held-out part, over all ranks; so many examples go into the run folder."""
        before = self.ledger.sent_bytes
        with self.parts.sync.averaged(), self.stepper.evaluated(self.parts.model) as model:
            found = self.stepper.score(self.task, model, self.replica)
            if self.reporter and shows:
                self.reporter.examples(step, shown(self.task, model, shows))
        sums = self._sum(torch.tensor(found, dtype=torch.float64), "evaluation").tolist()
        self._interval_bytes += self.ledger.sent_bytes - before  # no step's
        loss = sums[0] / sums[1] if sums[1] else math.nan
        if self.reporter:
            self.reporter.evaluation(step, self.tokens, loss, self.task.score_of(sums))
        return loss

    def save(self, step: int) -> None:
        """Begin to write a checkpoint of the state after `step` steps, when the one before it is whole."""
        self._settle()
        progress = Progress(
            step=step,
            tokens=self.tokens,
            world_size=self.group.size(),
            assignment=self.assignment,
            replanned=self.replanner.changes if self.replanner else {},
        )
        self.saver.begin(self.parts, progress)
        self.saved_step, self._saved_at = step, time.perf_counter()

    def _settle(self) -> None:
        """Wait until no rank is writing any more. Together, so that a rank that is gone meanwhile is missed. UserError on all if
        a checkpoint failed."""
        busy, before = True, self.ledger.sent_bytes
        while busy:
            states = self._sum(torch.tensor([self.saver.busy, self.saver.failed], dtype=torch.float64), "checkpoint")
            if float(states[1]):
                raise UserError(self.saver.reason())
            busy = float(states[0]) > 0
            time.sleep(SETTLE_POLL_S if busy else 0)
        self._interval_bytes += self.ledger.sent_bytes - before  # no step's
        self._take_checkpoint()

    def _take_checkpoint(self) -> None:
        if (saved := self.saver.take()) and self.reporter:
            self.reporter.checkpoint(saved)

    def measured_transfers(self) -> list[dict[str, Any]]:
        """What the ledger has for the steps between the first and the last report, per step; empty if there were not two."""
        if self._steady is None or self._last is None or self._last[0] <= self._steady[0]:
            return []
        steps = self._last[0] - self._steady[0]
        return [
            {
                "label": call.label,
                "axis": call.axis,
                "op": call.op,
                "message_bytes": call.message_bytes,
                "calls": max(1, round(total.calls / steps)),
                "every": max(1, round(steps / total.calls)),
                "wire_bytes_per_step": total.wire_bytes / steps,
                "seconds": total.seconds / total.calls,
            }
            for call, total in difference(self._last[1], self._steady[1]).items()
        ]

    def write_end(self, pacer: Pacer | Pace | None, results: Path | None) -> None:
        """After the last step: gather the ledgers of all ranks; rank 0 writes what was measured, and into `results` where."""
        rank = self.group.rank()
        mine = {
            "entries": self.ledger.entries(rank),
            "missed": pacer.missed_fraction if pacer else None,
            "passes": [{"rank": rank} | dict(zip(PASS, one, strict=True)) for one in self.stepper.timeline()],
            "events": self.timeline.events() if self.timeline else [],
        }
        gathered: list[Any] = [None] * self.group.size()
        with self.ledger.label("results"):
            dist.gather_object(mine, gathered if self.reporter else None, dst=0)
        if self.reporter is None:
            return
        self.reporter.folder.write("ledger.json", {"entries": [entry for rank in gathered for entry in rank["entries"]]})
        if self.timeline:
            write_trace(self.reporter.folder.path / "timeline.json", [event for rank in gathered for event in rank["events"]])
        medians, transfers = self.reporter.medians(), self.measured_transfers()
        if medians:
            if transfers:  # more exact, since intervals may cut rare exchanges
                medians["wire_bytes_per_step"] = sum(
                    row["wire_bytes_per_step"] for row in transfers if row["label"] != EVALUATION
                )
            measured = {
                **medians,
                "transfers": transfers,
                "passes": [one for rank in self.pipeline for one in gathered[rank]["passes"]],
                "missed_pace": max((rank["missed"] for rank in gathered if rank["missed"] is not None), default=None),
            }
            self.reporter.folder.write("measured.json", measured)
        if results is not None:
            (results / "run_folder").write_text(str(self.reporter.folder.path), encoding="utf-8")

    def _report(self, done: int) -> tuple[bool, bool]:
        """End an interval: all ranks exchange loss, stop requests and compute times. Returns whether any rank was asked to stop,
        and whether it is time for a checkpoint, by rank 0's clock."""
        count, mean_loss, times = len(self._interval), self._interval.loss(), self._interval.times()
        usual = median(one.compute_s for one in times)  # one disturbed step is no sign of a rank's speed
        ranks = self.group.size()
        vector = torch.zeros(SUMMARY + ranks + self.train.replan, dtype=torch.float64)
        vector[:SUMMARY] = torch.tensor([mean_loss, self.stop.requested, self._due(), self.saver.failed], dtype=vector.dtype)
        vector[SUMMARY + self.group.rank()] = usual
        vector[SUMMARY + ranks :] = self._chosen
        vector = self._sum(vector, "summary")
        loss, stops, due, failed = vector[:SUMMARY].tolist()
        computing = vector[SUMMARY : SUMMARY + ranks].tolist()
        seconds = self._interval.end(times)
        wait = seconds.pop("wait_s")
        waiting = min(wait, max(0.0, max(computing) - usual, self.bubble_s))
        if self.reporter:
            tokens = self.task.workload.tokens_per_microbatch * sum(self.assignment)
            self.reporter.step(
                Step(
                    step=done,
                    time_s=0.0,
                    tokens=self.tokens,
                    loss=loss / (len(self.assignment) * self.loss_ranks),
                    exposed_s=wait - waiting,
                    waiting_s=waiting,
                    **seconds,
                    tokens_per_s=tokens / seconds["step_s"],
                    wire_bytes=(self.ledger.sent_bytes - self._interval_bytes) / count,
                    learning_rate=learning_rate(self.train, done - 1),
                )
            )
        mark = (done, self.ledger.snapshot())
        if self._steady is None:
            self._steady = mark if self.stepper.settled(done) else None
        elif count == self.train.log_every:
            self._last = mark
        if self.by_speed and done < self.train.steps:
            self._reassign(done, computing)
        if self.replanner and (number := int(vector[-1])):
            self._due_change, self._chosen = (number, computing), 0
        elif self.replanner and self.reporter:
            self._chosen = self.replanner.look(count, computing, wait - waiting, self.assignment)
        self._begin_interval()
        if failed:
            raise UserError(self.saver.reason())
        self._take_checkpoint()
        return stops > 0, due > 0

    def _due(self) -> bool:
        every_s = 0 if self.train.checkpoint_every else self.train.checkpoint_every_s
        return self.reporter is not None and every_s > 0 and time.perf_counter() - self._saved_at >= every_s

    def _reassign(self, done: int, compute_s: Sequence[float]) -> None:
        """compute_s: of a usual step, by replica, the same numbers on all of them; so all come to the same assignment."""
        before = self.assignment
        self.assignment = reassign(before, [seconds / count for seconds, count in zip(compute_s, before, strict=True)])
        if self.reporter and self.assignment != before:
            self.reporter.assigned(done, self.assignment)

    def _change(self, step: int) -> None:
        """To the plan that rank 0 has chosen, if it has. Collective."""
        number, compute_s = self._due_change
        if self.replanner is None or not number:
            return
        compress, self._due_change = self.replanner.config.compress, (0, ())
        self.replanner.take(number)
        config = self.replanner.config
        exchange = None
        if config.compress != compress:
            exchange = make_exchange(config.compress, self.ledger, moments=not config.sync.rare)
        self.parts.sync.switch(exchange, getattr(config.sync, "every", 1))
        self.assignment = self.replanner.assignment(self.assignment, compute_s)
        self.replanner.choose()
        self._steady = self._last = None
        if self.reporter:
            self.reporter.replanned(step, self.replanner, self.assignment)
        self._begin_interval()

    def _begin_interval(self) -> None:
        self._interval, self._interval_bytes = Interval(self.stepper.clock), self.ledger.sent_bytes

    def _sum(self, vector: torch.Tensor, label: str) -> torch.Tensor:
        vector = vector.to(self.device)
        all_reduce(vector, self.group, self.ledger, label).wait()
        return vector.cpu()
