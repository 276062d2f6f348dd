"""One optimizer step: micro-batches forward and backward, clipping, update; and the seconds that each part took.

The parts lie between moments of the device's clock (`collectives.clock`): on a GPU events on the stream that computes, so that
the host may run ahead, and seconds are known when somebody asks for them. Nothing here reads a value of the device.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from thinwire.collectives.clock import clock_of, has_streams
from thinwire.collectives.ledger import Clock
from thinwire.compress.weights.rounding import rounded
from thinwire.compress.weights.shrink import Blocks
from thinwire.config.run import TrainSection
from thinwire.parallel.waits import Waits
from thinwire.sync.base import Synchroniser
from thinwire.traffic import Transfer
from thinwire.train.updates import early

Named = Iterable[tuple[str, nn.Parameter]]
Norm = Callable[[Named], Tensor]
"""Of the gradients of these parameters of a model, by name, [], where other ranks of its group may have parts of them too."""


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Seconds of one step on this rank. wait_s: from the last gradient of this rank until the exchange was over, and in the
    exchange after the step."""

    compute_s: float
    wait_s: float
    optimizer_s: float


@dataclass(frozen=True, kw_only=True)
class Ran:
    """A step that was called: this rank's loss ([], on the device), and moments. ready: when the last gradient was.

    computing: when this rank computed, from and to, if in a pipeline it waited in between; then the rest is waiting. waits: when
    passes stood still in that time.
    """

    loss: Tensor
    clock: Clock
    started: Any
    ready: Any
    exchanged: Any
    updated: Any
    synchronised: Any
    computing: Sequence[tuple[Any, Any]] = ()
    waits: Sequence[tuple[Any, Any]] = ()

    def times(self) -> StepTimes:
        """Waits until the device has done it."""
        seconds = self.clock.seconds
        compute_s, wait_s = seconds(self.started, self.ready), seconds(self.ready, self.exchanged)
        if self.computing:
            wait_s += compute_s
            compute_s = sum(seconds(*ends) for ends in self.computing)
            wait_s -= compute_s
        waited_s = sum(seconds(*ends) for ends in self.waits)
        compute_s, wait_s = compute_s - waited_s, wait_s + waited_s
        return StepTimes(
            compute_s=compute_s,
            wait_s=wait_s + seconds(self.updated, self.synchronised),
            optimizer_s=seconds(self.exchanged, self.updated),
        )


@contextmanager
def without_trace(model: nn.Module) -> Iterator[None]:
    """Around passes before training: what they draw at random, and note in buffers as batch norm does, is undone afterwards.

    A resumed run makes them too, and must go on as if it had not. Gradients are the caller's to clear.
    """
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = {parameter.device for parameter in model.parameters() if has_streams(parameter.device)}
    with torch.random.fork_rng(devices, device_type=next(iter(devices)).type) if devices else torch.random.fork_rng([]):
        yield
    with torch.no_grad():
        for buffer, before in buffers:
            buffer.copy_(before)


def gradient_norm(named: Named) -> Tensor:
    """Of all gradients together, []."""
    return nn.utils.get_total_norm([parameter.grad for _, parameter in named if parameter.grad is not None])


def learning_rate(train: TrainSection, step: int) -> float:
    """Linear warm-up, then a cosine to `final_learning_rate` of the peak (Loshchilov & Hutter 2017). A function of the step."""
    if step < train.warmup_steps:
        return train.learning_rate * (step + 1) / (train.warmup_steps + 1)
    progress = (step - train.warmup_steps) / max(1, train.steps - train.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return train.learning_rate * (train.final_learning_rate + (1 - train.final_learning_rate) * cosine)


@dataclass(frozen=True, kw_only=True)
class Stepper:
    """What a step needs besides its batches. `precision()` is entered around each forward pass; norm: of the gradient, for
    clipping; waits: of its passes, for other ranks."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    sync: Synchroniser
    loss: Callable[[nn.Module, object], Tensor]
    precision: Callable[[], AbstractContextManager]
    train: TrainSection
    norm: Norm = gradient_norm
    waits: Waits = field(default_factory=Waits)

    @cached_property
    def clock(self) -> Clock:
        """Of the model's device."""
        return clock_of(next(self.model.parameters()).device)

    def settled(self, done: int) -> bool:
        """Whether steps behind the first `done` send what steps send as a rule."""
        return done >= self.sync.settled_after

    def rehearse(self, batch: object) -> None:
        """Once before training, on any batch of this rank: the synchroniser learns in which order gradients come. Collective."""
        with self.sync.rehearsal(), without_trace(self.model), self._updates(moves=False):
            for _ in range(2):
                self.loss(self.model, batch).backward()
        self.optimizer.zero_grad(set_to_none=False)

    def run(self, step: int, batches: Iterable[object], num_micro: int, mean_micro: float | None = None) -> Ran:
        """Collective over the synchroniser's axis. On a device what is returned may still be under way.

        num_micro: micro-batches of this rank; mean_micro: the mean over the ranks, if that differs. Losses are divided by the
        mean, so that the ranks' average, of gradients and of what is returned, is over the whole step's micro-batches.
        """
        clock, ready_before = self.clock, self.sync.ready_at
        self.waits.clear()
        started = clock.now()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.train, step)
        with self._updates(), self._rounded(self.model):
            loss = self.passes(batches, num_micro, mean_micro or num_micro)
        exchanged = clock.now()
        if self.train.clip:
            self.clip()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)  # gradients are views of the buckets
        updated = clock.now()
        self.sync.after_step(step)
        synchronised, ready = clock.now(), self.sync.ready_at
        return Ran(
            loss=loss,
            clock=clock,
            started=started,
            ready=exchanged if ready == ready_before else ready,
            exchanged=exchanged,
            updated=updated,
            synchronised=synchronised,
            computing=self._computing(),
            waits=tuple(self.waits.ends),
        )

    @contextmanager
    def evaluated(self, model: nn.Module) -> Iterator[nn.Module]:
        """Inside, what `score` is given of `model`."""
        with self._rounded(model):
            yield model

    def score(self, task: Any, model: nn.Module, replica: int) -> tuple[float, ...]:
        """As `Task.score`: of the held-out part that is this replica's."""
        found: tuple[float, ...] = task.score(model, replica)
        return found

    def timed_pass(self, batch: object) -> None:
        """Forward and backward of one micro-batch, as a step has them, for its time; nothing is exchanged."""
        with self._micro_batch(False), self._updates(moves=False):
            with self.precision():
                loss = self.loss(self.model, batch)
            loss.backward()

    def evaluation_traffic(self, task: Any, replica: int) -> list[Transfer]:
        """What `score` sends in one evaluation: nothing where a rank has the whole model."""
        return []

    def timeline(self) -> list[tuple[str, int, int, float, float]]:
        """As `Pipeline.timeline`; nothing where there is none."""
        return []

    def passes(self, batches: Iterable[object], num_micro: int, mean_micro: float) -> Tensor:
        """Of all micro-batches, and the exchange of gradients. Returns this rank's part of the loss. Collective."""
        losses = []
        for index, batch in enumerate(batches):
            with self._micro_batch(index == num_micro - 1):
                with self.precision():
                    loss = self.loss(self.model, batch) / mean_micro
                loss.backward()
                losses.append(loss.detach())
        return torch.stack(losses).sum()

    def _micro_batch(self, last: bool) -> AbstractContextManager[None]:
        """Entered around forward and backward of one; `last`: of the step."""
        return self.sync.microbatch(last=last)

    def _updates(self, *, moves: bool = True) -> AbstractContextManager[None]:
        """Entered around passes whose gradients are used, or given up, behind each."""
        return early(self.optimizer, moves=moves) if self.train.updates == "early" else nullcontext()

    def _rounded(self, model: nn.Module) -> AbstractContextManager[None]:
        """Entered around passes: weights as train.rounded says."""
        kind = self.train.rounded
        return nullcontext() if kind == "none" else rounded(model, Blocks(kind))

    def clip(self) -> None:
        """Gradients to a norm of at most train.clip. Collective where `norm` is."""
        norm = self.norm(self.model.named_parameters())
        nn.utils.clip_grads_with_norm_(self.model.parameters(), self.train.clip, norm)

    def _computing(self) -> Sequence[tuple[Any, Any]]:
        return ()
