"""What a run says while it runs: a line in the terminal, an event in the run folder, TensorBoard scalars. Rank 0 only."""

import time
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from thinwire.record import Checkpoint, End, Eval, RunFolder, Step
from thinwire.train.deal import Deal, shown
from thinwire.units import show


@dataclass
class Reporter:
    """Writes to `folder`. started: time.perf_counter() at which the run's clock stands at 0."""

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
        self._say(
            f"step {event.step:>{len(str(self.num_steps))}}/{self.num_steps}  loss {event.loss:.3f}  "
            f"{event.tokens_per_s:,.0f} tokens/s  "
            f"{show(event.step_s, 's')} a step  {show(event.wire_bytes, 'B')} a step on the wire  {wait:.0%} waiting for the wire"
        )
        self._scalars(event.step, {"loss/train": event.loss, "learning_rate": event.learning_rate})
        for name in ("step_s", "compute_s", "exposed_s", "waiting_s", "optimizer_s", "tokens_per_s", "wire_bytes"):
            self._scalars(event.step, {f"step/{name}": getattr(event, name)})

    def evaluation(self, step: int, tokens: int, loss: float) -> None:
        """After an evaluation on the held-out part."""
        self.folder.append(Eval(step=step, time_s=self.now_s, tokens=tokens, loss=loss))
        self._say(f"step {step}: held-out loss {loss:.4f} {self.unit}")
        self._scalars(step, {"loss/held_out": loss})

    def dealt(self, step: int, counts: Deal) -> None:
        """From this step on, faster ranks have more micro-batches."""
        self._say(f"step {step}: {shown(counts)}")

    def checkpoint(self, step: int, path: str, save_s: float) -> None:
        """After a checkpoint is whole."""
        self.folder.append(Checkpoint(step=step, time_s=self.now_s, path=path, save_s=save_s))
        self._say(f"step {step}: checkpoint {path} ({show(save_s, 's')})")

    def end(self, step: int, reason: str) -> None:
        """The last thing."""
        self.folder.append(End(step=step, time_s=self.now_s, reason=reason))
        if self._board is not None:
            self._board.close()

    def medians(self) -> dict[str, float]:
        """Of the seconds of a step over the intervals, without the first, in which buffers are made and caches are cold."""
        steady = self._intervals[1:] or self._intervals
        names = ("step_s", "compute_s", "exposed_s", "waiting_s", "optimizer_s", "tokens_per_s")
        return {name: median(getattr(event, name) for event in steady) for name in names} if steady else {}

    @property
    def now_s(self) -> float:
        return time.perf_counter() - self.started

    def _scalars(self, step: int, values: dict[str, Any]) -> None:
        if self._board is None:
            self._board = SummaryWriter(str(self.folder.path / "tensorboard"))
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def _say(self, line: str) -> None:
        print(line, flush=True)
