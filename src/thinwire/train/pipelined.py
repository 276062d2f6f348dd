"""Steps of a model whose layers lie on several ranks: a pipeline runs the passes, everything else is as in `step`.

The gradient's norm is that of the whole model: each rank adds up its own parameters, the first of two those that they share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from thinwire.collectives.metered_calls import all_reduce
from thinwire.config.run import TrainSection
from thinwire.data.loader import IGNORED
from thinwire.parallel.waits import SETUP, Waits, sleep_until
from thinwire.traffic import EVALUATION, Transfer
from thinwire.train.step import Ran, Stepper, without_trace
from thinwire.workload import BACKWARD_OVER_FORWARD

if TYPE_CHECKING:
    from thinwire.parallel.pipeline import Pipeline
    from thinwire.parallel.stage_shards import StageShards

NORM = "norm"
NORM_BYTES = 8


@dataclass(frozen=True, kw_only=True)
class PipelinedStepper(Stepper):
    """`model` is the pipeline's owner. Batches are (inputs, targets)."""

    pipeline: Pipeline
    shards: StageShards | None = None
    """What is trained of the stages' parameters, if not these; then `model` is that."""
    samples: Callable[[int, int], Sequence[int]] | None = None
    """Of a step and a micro-batch of this replica, where stages keep copies of activations."""

    def run(self, step: int, batches: Iterable[Any], num_micro: int, mean_micro: float | None = None) -> Ran:
        self.pipeline.samples = [self.samples(step, micro) for micro in range(num_micro)] if self.samples else ()
        return super().run(step, batches, num_micro, mean_micro)

    def settled(self, done: int) -> bool:
        return super().settled(done) and self.pipeline.returning

    def rehearse(self, batch: Any) -> None:
        """The stages tell each other what they send; connections are made."""
        inputs, targets = batch
        count = self.sync.num_micro
        with self.sync.rehearsal(), without_trace(self.model), self.sync.microbatch(last=True):
            self.pipeline.step([inputs] * count, [targets] * count, label=SETUP)
        self._forget()
        self.optimizer.zero_grad(set_to_none=False)

    def score(self, task: Any, model: nn.Module, replica: int) -> tuple[float, float]:
        """Through the pipeline; the ranks with the last stage have the score, the others 0. Collective over the pipeline."""
        taken = list(task.held_out(replica))
        padded = [_padded(batch, self.pipeline.cut.entering.shape) for batch, _ in taken]
        if self.shards is not None:
            self.shards.gather(EVALUATION)
        counts = [scored for _, scored in taken] if self.pipeline.has_last else []
        losses = zip(self.pipeline.evaluate(padded), counts, strict=True)
        return sum(float(loss) * scored for loss, scored in losses if scored), float(sum(counts))  # a mean over none is no number

    def timed_pass(self, batch: Any) -> None:
        """Through this rank's stages, one after the other, on anything of the right shape."""
        for stage in self.pipeline.stages:
            arriving = self.pipeline.cut.crossing[stage.stage_index - 1]
            with self.precision():
                x = (
                    batch[0].to(stage.device)
                    if stage.is_first
                    else torch.zeros(arriving.shape, dtype=arriving.dtype, device=stage.device)
                )
                output = stage.submod(x if stage.is_first else x.requires_grad_())
                loss = self.pipeline.loss(output, batch[1].to(stage.device)) if stage.is_last else output.sum()
            loss.backward()
        self._forget()

    def evaluation_traffic(self, task: Any, replica: int) -> list[Transfer]:
        """Of `score`."""
        if not self.train.eval_every:
            return []
        every, batches = self.train.eval_every, sum(1 for _ in task.held_out(replica))
        return [replace(one, every=every) for one in self.pipeline.cut.evaluation_traffic(self.pipeline.rank, batches)]

    def timeline(self) -> list[tuple[str, int, int, float, float]]:
        return self.pipeline.timeline()

    def passes(self, batches: Iterable[Any], num_micro: int, mean_micro: float) -> Tensor:
        taken = list(batches)
        if self.shards is not None:
            self.shards.gather()
        with self.sync.microbatch(last=True):
            losses = self.pipeline.step([x for x, _ in taken], [y for _, y in taken], 1 / mean_micro)
            self.pipeline.add_up_tied()
            if self.shards is not None:
                self.shards.reduce()
        self.pipeline.tied.share()
        return torch.stack(losses).sum() / mean_micro if losses else torch.zeros((), device=self.pipeline.device)

    def clip(self) -> None:
        square = self.norm(self.pipeline.counted()).double().square().reshape(1)
        all_reduce(square, self.pipeline.group, self.pipeline.ledger, NORM).wait()
        nn.utils.clip_grads_with_norm_(self.model.parameters(), self.train.clip, square.sqrt()[0])

    def _forget(self) -> None:
        """Whole gradients of passes that are none of a step, where shards have others."""
        if self.shards is not None:
            self.shards.forget()

    def _computing(self) -> Sequence[tuple[Any, Any]]:
        return [(one.begin, one.end) for one in self.pipeline.computed]


def norm_transfers(train: TrainSection) -> list[Transfer]:
    """What clipping sends over a pipeline in a step."""
    if not train.clip:
        return []
    return [Transfer(label=NORM, axis="pipe", op="all_reduce", message_bytes=NORM_BYTES, item_bytes=NORM_BYTES)]


@dataclass
class Pace:
    """Holds the passes of a rank's stages to the rate that its device declares, as `pace.Pacer` does with whole models.

    forward_s, recomputed_s: of one micro-batch, by stage, the latter going backward; waits: in which it does not compute.
    """

    forward_s: dict[int, float]
    recomputed_s: dict[int, float]
    waits: Waits = field(default_factory=Waits)
    declared_s: float = 0.0
    late_s: float = 0.0

    @contextmanager
    def attached(self, pipeline: Pipeline) -> Iterator[None]:
        """Inside, passes take as long as declared."""
        for stage in pipeline.stages:
            stage.hold = self._holder(stage.stage_index)
        try:
            yield
        finally:
            for stage in pipeline.stages:
                stage.hold = None

    @property
    def missed_fraction(self) -> float:
        """How much longer than declared the passes took so far."""
        return self.late_s / self.declared_s if self.declared_s else 0.0

    def _holder(self, stage: int) -> Callable[[str, float], None]:
        forward_s = self.forward_s[stage]
        backward_s = BACKWARD_OVER_FORWARD * forward_s
        takes = {"F": forward_s, "B": backward_s + self.recomputed_s[stage], "I": backward_s / 2, "W": backward_s / 2}

        def hold(kind: str, begun: float) -> None:
            self.declared_s += takes[kind]
            self.late_s += max(0.0, -sleep_until(begun + takes[kind] + self.waits.since(begun)))

        return hold


def _padded(batch: tuple[Tensor, Tensor], shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """With rows that do not count, up to the pipeline's micro-batch."""
    inputs, targets = batch
    missing = shape[0] - inputs.shape[0]
    if not missing:
        return batch
    return (
        torch.cat([inputs, inputs[:1].expand(missing, -1)]),
        torch.cat([targets, targets.new_full((missing, targets.shape[1]), IGNORED)]),
    )
