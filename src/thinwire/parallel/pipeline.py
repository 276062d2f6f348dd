"""A pipeline: stages of a model on the ranks of one axis, which hand micro-batches on to each other.

A step runs one schedule of PyTorch (`schedules`): each micro-batch goes forward through all stages and back. Between stages on
different ranks travel one message of an activation and one of its gradient per micro-batch, as they are or coded (`boundary`).
Gradients add up in the parameters. The losses are those of one rank with the whole model; codes change them by their error.
Weights that the first and the last stage both use are `tied`'s.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from thinwire.collectives.backend import MeteredGroup
from thinwire.collectives.ledger import Ledger
from thinwire.compress.activations.differences import Differences
from thinwire.errors import UserError
from thinwire.parallel.boundary import CodedStage, Computed, Crossing
from thinwire.parallel.chain import Owner, Stage
from thinwire.parallel.cut import Cut
from thinwire.parallel.schedules import arrivals, make_schedule, without_log
from thinwire.parallel.tied import TiedWeights
from thinwire.traffic import EVALUATION, PIPELINE, Transfer, merged

Loss = Callable[[Tensor, Tensor], Tensor]


class Pipeline:
    """This rank's part. `owner` holds all modules of its stages, under the names that they have in the model.

    loss(output, target): the mean of a micro-batch, a scalar. Collective calls come in the same order on all ranks of `group`.
    """

    def __init__(
        self,
        model: nn.Module,
        cut: Cut,
        group: dist.ProcessGroup,
        ledger: Ledger,
        loss: Loss,
        precision: Callable[[], AbstractContextManager] = nullcontext,
    ) -> None:
        """precision: entered around each forward pass of training, such as torch.autocast. UserError for a metered group over
        NCCL, in which PyTorch's schedules would begin messages one by one."""
        if isinstance(group, MeteredGroup) and group.coalesces:
            raise UserError(
                "a pipeline on GPUs needs NCCL's own group, where its messages begin together: take collectives.kind = 'native', "
                "or init_process_group('nccl')"
            )
        self.cut, self.group, self.ledger, self.loss, self._precision = cut, group, ledger, loss, precision
        self.rank = group.rank()
        self.owner = Owner(model, cut.modules_of(self.rank))
        self.device = next(self.owner.parameters()).device
        self.stages = [
            CodedStage(
                Stage(model, [cut.chain[index] for index in cut.stages[number]], lambda: self._scale),
                (number, len(cut.stages)),
                group,
                self.device,
                self._crossing(number),
                precision,
            )
            for number in cut.stages_of(self.rank)
        ]
        self._schedules: dict[int, Any] = {}
        self._begun = False
        self._started: Any = None
        self._scale = 1.0
        self.tied = TiedWeights(self._tied_parameters(), group, ledger, cut.tied_codec())
        self.samples: Sequence[Sequence[int]] = ()
        """Numbers of the samples of the next step's micro-batches, the same on all ranks, where copies of activations are kept;
        none: it sends as if they came for the first time, and keeps nothing."""
        self.returning = True
        """Whether all samples of the step before had come before that."""
        ledger.axes[group.group_name] = "pipe"

    @property
    def has_first(self) -> bool:
        return self.stages[0].is_first

    @property
    def has_last(self) -> bool:
        return self.stages[-1].is_last

    @property
    def computed(self) -> list[Computed]:
        """What this rank computed in the step before."""
        return [one for stage in self.stages for one in stage.computed]

    def timeline(self) -> list[tuple[str, int, int, float, float]]:
        """(kind, stage, micro-batch, begin, end) of the step before, in seconds since it began on this rank. On a device it waits
        for the step's end."""
        clock, begun = self.stages[0].clock, self._started
        return [
            (one.kind, one.stage, one.micro, clock.seconds(begun, one.begin), clock.seconds(begun, one.end))
            for one in self.computed
        ]

    @property
    def copies(self) -> dict[str, Differences]:
        """What this rank keeps of activations of samples, by which side of which boundary it is; for checkpoints."""
        sides = ((f"{side} of stage {stage.stage_index}", copies) for stage in self.stages for side, copies in stage.copies())
        return dict(sides)

    def traffic(self, num_micro: int) -> list[Transfer]:
        """What this rank sends in a step."""
        tied = [self.cut.tied_bytes(one.shape, one.nbytes) for one in self.tied]
        return merged(self.cut.traffic(self.rank, num_micro, tied))

    def step(
        self, inputs: Sequence[Tensor], targets: Sequence[Tensor], scale: float = 1.0, label: str = PIPELINE
    ) -> list[Tensor]:
        """Forward and backward of these micro-batches, all of one shape. Gradients are those of the sum of losses times `scale`.

        Returns the losses on the rank that has the last stage, detached and not scaled; elsewhere none. Collective. The first
        step sends some bytes more. label: in the ledger. UserError for another number of micro-batches than the first step's.
        """
        num_micro = len(inputs)
        if self._schedules and num_micro not in self._schedules:
            raise UserError(
                f"pipeline: a step of {num_micro} micro-batches, and the first one had {next(iter(self._schedules))}; "
                "keep their number, or leave out those that are left over"
            )
        if not self._schedules:
            self._schedules[num_micro] = make_schedule(self.cut.options.schedule, self.stages, num_micro, self.scaled_loss)
        losses: list[Tensor] = []
        self._scale = scale
        for stage in self.stages:
            stage.samples = self.samples
        self.returning = all(copies.knows(ids) for copies in self.copies.values() for ids in self.samples)
        arguments = (torch.cat(list(inputs)).to(self.device),) if self.has_first else ()
        target = torch.cat(list(targets)).to(self.device) if self.has_last else None
        self._started = self.stages[0].clock.now()
        with self.ledger.label(label), without_log():
            if self._begun:  # in the first step stages send each other more, and receives come after that
                self._post(self._schedules[num_micro])
            self._schedules[num_micro].step(*arguments, target=target, losses=losses, return_outputs=False)
        self._begun = True
        return [loss.detach() / scale for loss in losses] if self.has_last else []

    def add_up_tied(self) -> None:
        """After the backward passes of a step: see `TiedWeights.add_up`. Collective."""
        self.tied.add_up()

    @torch.no_grad()
    def evaluate(self, batches: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """Losses of (inputs, targets), each of a micro-batch's shape, on the rank that has the last stage. Activations are coded
        as in training. Collective: every rank gives as many batches."""
        arriving: dict[tuple[int, int], Callable[[], Tensor]] = {}
        handed_on: dict[int, Tensor] = {}
        losses: list[Tensor] = []
        leaving: deque[list[Callable[[], Any]]] = deque()
        groups, ahead = self._forward_passes(len(batches)), int(self.stages[0].posts)
        with self.ledger.label(EVALUATION):
            for number, group in enumerate(groups):
                for stage, micro in chain(*groups[number + ahead if number else 0 : number + ahead + 1]):
                    if self.cut.crosses(stage.stage_index - 1):
                        arriving[stage.stage_index, micro] = stage.arrival(self.cut.rank_of(stage.stage_index - 1))
                leaving.append([])
                for stage, micro in group:
                    index, (inputs, targets) = stage.stage_index, batches[micro]
                    if self.cut.crosses(index - 1):
                        x = arriving.pop((index, micro))()
                    else:
                        x = inputs.to(self.device) if stage.is_first else handed_on.pop(micro)
                    y = stage.submod(x)
                    if stage.is_last:
                        losses.append(self.loss(y, targets.to(self.device)))
                    elif self.cut.crosses(index):
                        leaving[-1].append(stage.send(y, self.cut.rank_of(index + 1)))
                    else:
                        handed_on[micro] = y
                for gone in leaving.popleft() if number else ():
                    gone()
            for gone in chain(*leaving):
                gone()
        return losses

    def _forward_passes(self, count: int) -> list[list[tuple[CodedStage, int]]]:
        """Of `count` micro-batches without gradients, by groups: what the next one gets is asked for before a group begins, and
        what the one before has sent is gone when it ends. Of several stages a rank each does a whole group, two micro-batches for
        each rank, so that all have work. On a device, whose messages follow one another, each pass is a group."""
        if not self.stages[0].posts:
            return [[(stage, micro)] for micro in range(count) for stage in self.stages]
        size = 2 * self.cut.ranks
        groups = (range(begin, min(count, begin + size)) for begin in range(0, count, size))
        return [[(stage, micro) for stage in self.stages for micro in group] for group in groups]

    def counted(self) -> list[tuple[str, nn.Parameter]]:
        """Of this rank, by name, but those that a rank before it has too: all ranks together have each parameter once."""
        elsewhere = {
            id(one)
            for name in self.cut.tied()
            if self.rank == self.cut.holders(name)[-1]
            for one in self.owner.get_submodule(name).parameters()
        }
        return [(name, one) for name, one in self.owner.named_parameters() if id(one) not in elsewhere]

    def use(self, schedule: Any, num_micro: int) -> None:
        """A schedule of PyTorch's own over `stages`, with the loss `scaled_loss`, for steps of so many micro-batches."""
        self._schedules[num_micro] = schedule

    def scaled_loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Of one micro-batch, as the step under way scales it."""
        with self._precision():
            return self.loss(output, target) * self._scale

    def _post(self, schedule: Any) -> None:
        """Receives of the step that is about to begin."""
        stages = {stage.stage_index: stage for stage in self.stages}
        for kind, stage, micro in arrivals(schedule, self.rank) if self.stages[0].posts else ():
            stages[stage].post(kind, micro)

    def _crossing(self, number: int) -> Crossing:
        before = self.cut.crossing[number - 1] if number else self.cut.entering
        into, out = self.cut.crosses(number - 1), self.cut.crosses(number)
        codec = self.cut.codec
        needs_gradient = number > 0 and before.is_floating_point()
        return Crossing(
            arriving=(before.clone().requires_grad_(needs_gradient),),
            leaving=(self.cut.crossing[number].clone().requires_grad_(),),
            activations_in=codec("first", number - 1) if into else None,
            activations_out=codec("first", number) if out else None,
            gradients_in=codec("gradients", number) if out else None,
            gradients_out=codec("gradients", number - 1) if into else None,
            copies_in=self.cut.differences(number - 1) if into else None,
            copies_out=self.cut.differences(number) if out else None,
        )

    def _tied_parameters(self) -> Mapping[int, list[nn.Parameter]]:
        """By the other rank that has them."""
        found: dict[int, list[nn.Parameter]] = {}
        for name in self.cut.tied():
            holders = self.cut.holders(name)
            if self.rank in holders:
                other = holders[1 - holders.index(self.rank)]
                trained = [one for one in self.owner.get_submodule(name).parameters() if one.requires_grad]
                found.setdefault(other, []).extend(trained)
        return found
