"""The steps between two reports, and where their seconds went.

    step_s = compute_s + wait_s + optimizer_s + host_s                 on a device, by events on the stream that computes

host_s: between the steps the stream had nothing to do, or a report. On the CPU, whose work is the host's, that is the optimizer's
(`optimizer_s` is what compute and waiting leave), and there is no host_s.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from thinwire.collectives.ledger import Clock
from thinwire.train.step import Ran, StepTimes


class Interval:
    """Begins when it is made, with nothing under way."""

    def __init__(self, clock: Clock) -> None:
        self._clock, self._ran = clock, list[Ran]()
        self._between: list[tuple[Any, Any]] = []
        """Moments between which no step ran."""
        self._since = clock.now()
        self._started = time.perf_counter()

    def __len__(self) -> int:
        return len(self._ran)

    def add(self, ran: Ran) -> None:
        """The next step."""
        self._ran.append(ran)
        self._between.append((self._since, ran.started))
        self._since = ran.synchronised

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What is done inside is no step's."""
        begun = time.perf_counter()
        self._between.append((self._since, self._clock.now()))
        yield
        self._since = self._clock.now()
        self._started += time.perf_counter() - begun

    def loss(self) -> float:
        """The mean. Waits until the device has done the steps."""
        return sum(torch.stack([ran.loss for ran in self._ran]).tolist()) / len(self)

    def times(self) -> list[StepTimes]:
        """Of each step. Waits as `loss` does."""
        return [ran.times() for ran in self._ran]

    def end(self, times: Sequence[StepTimes]) -> dict[str, float]:
        """Seconds of a step by their keys, after nothing is under way any more; compute and waiting are of `times`."""
        self._between.append((self._since, self._clock.now()))
        count = len(self)
        step_s = (time.perf_counter() - self._started) / count
        compute_s, wait_s, optimizer_s = (
            sum(getattr(one, key) for one in times) / count for key in ("compute_s", "wait_s", "optimizer_s")
        )
        parts = {"step_s": step_s, "compute_s": compute_s, "wait_s": wait_s}
        if not self._clock.on_device:
            return parts | {"optimizer_s": max(0.0, step_s - compute_s - wait_s)}
        host_s = sum(self._clock.seconds(*ends) for ends in self._between) / count
        return parts | {"optimizer_s": optimizer_s, "host_s": host_s}
