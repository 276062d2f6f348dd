"""A pipeline: stages of a model on the ranks of one axis, which hand micro-batches on to each other.

A step runs one schedule of PyTorch (`schedules`): each micro-batch goes forward through all stages and back. Between stages on
different ranks travel one message of an activation and one of its gradient per micro-batch, as they are or coded (`boundary`).
Gradients add up in the parameters. The losses are those of one rank with the whole model; codes change them by their error.

    bytes that a rank sends in a step = sum over its stages of micro-batches * (activation to the next + gradient to the one before)

Weights that the first and the last stage both use (a tied embedding) exist twice where these are on different ranks; their
gradients are added up after the backward passes, the same sum on both, so that they stay equal to the bit.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from thinwire.collectives.ledger import Ledger
from thinwire.compress.activations.boundary import BoundaryCodec
from thinwire.compress.base import make_codec
from thinwire.config.compress import read_coding
from thinwire.config.pipeline import PipelineSection
from thinwire.errors import UserError
from thinwire.parallel.boundary import CodedStage, Computed, Crossing
from thinwire.parallel.chain import Chain, Owner, Stage
from thinwire.parallel.schedules import make_schedule, stages_of
from thinwire.traffic import Transfer

LABEL = "pipeline"
TIED = "tied weights"
EVALUATION = "evaluation"

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Cut:
    """A model cut into stages. crossing: what leaves each stage, of one micro-batch, on `meta`."""

    chain: Chain
    stages: tuple[range, ...]
    entering: Tensor
    crossing: tuple[Tensor, ...]
    options: PipelineSection
    ranks: int

    def __post_init__(self) -> None:
        if len(self.stages) != self.ranks * self.options.per_rank:
            raise UserError(
                f"{len(self.stages)} stages for {self.ranks} ranks with {self.options.per_rank} each; "
                "cut the model into as many as there are"
            )

    def stages_of(self, rank: int) -> list[int]:
        return stages_of(self.options.schedule, self.ranks, self.options.per_rank, rank)

    def rank_of(self, stage: int) -> int:
        return next(rank for rank in range(self.ranks) if stage in self.stages_of(rank))

    def modules_of(self, rank: int) -> list[str]:
        """Names of those that a rank's stages use."""
        return [
            name for stage in self.stages_of(rank) for index in self.stages[stage] for name in self.chain[index].modules
        ]

    def tied(self) -> list[str]:
        """Modules that stages on several ranks use."""
        holders: dict[str, set[int]] = {}
        for rank in range(self.ranks):
            for name in self.modules_of(rank):
                holders.setdefault(name, set()).add(rank)
        return [name for name, ranks in holders.items() if len(ranks) > 1]

    def codec(self, direction: str, boundary: int) -> BoundaryCodec | None:
        """Of what crosses between stage `boundary` and the next. direction: "activations" or "gradients"."""
        kind = getattr(self.options, direction)
        codec = make_codec(read_coding(kind, f"pipeline.{direction}"))
        word = "activation" if direction == "activations" else "gradient"
        return None if codec is None else BoundaryCodec(codec, f"the {word} of boundary {boundary}-{boundary + 1}")

    def crosses(self, boundary: int) -> bool:
        """Whether stages `boundary` and the next are on different ranks."""
        return 0 <= boundary < len(self.stages) - 1 and self.rank_of(boundary) != self.rank_of(boundary + 1)

    def message_bytes(self, direction: str, boundary: int) -> int:
        values, codec = self.crossing[boundary], self.codec(direction, boundary)
        return values.nbytes if codec is None else codec.payload_bytes(values.shape)

    def traffic(self, rank: int, num_micro: int, tied_bytes: Sequence[int] = ()) -> list[Transfer]:
        """What rank `rank` of the pipeline sends in a step. tied_bytes: of the gradient of each parameter of modules in `tied`."""
        found: dict[tuple[int, int], int] = {}
        for stage in self.stages_of(rank):
            for direction, boundary in (("activations", stage), ("gradients", stage - 1)):
                if self.crosses(boundary):
                    item = self.crossing[boundary].element_size() if self.codec(direction, boundary) is None else 1
                    key = self.message_bytes(direction, boundary), item
                    found[key] = found.get(key, 0) + num_micro
        sent = [
            Transfer(label=LABEL, axis="pipe", op="send", message_bytes=size, item_bytes=item, calls=calls)
            for (size, item), calls in found.items()
        ]
        if self.holds_tied(rank):
            sent += [Transfer(label=TIED, axis="pipe", op="send", message_bytes=size) for size in tied_bytes]
        return sent

    def holds_tied(self, rank: int) -> bool:
        mine = self.modules_of(rank)
        return any(name in mine for name in self.tied())


class Pipeline:
    """This rank's part. `owner` holds all modules of its stages, under the names that they have in the model.

    loss(output, target): the mean of a micro-batch, a scalar. Collective calls come in the same order on all ranks of `group`.
    """

    def __init__(self, model: nn.Module, cut: Cut, group: dist.ProcessGroup, ledger: Ledger, loss: Loss) -> None:
        self.cut, self._group, self._ledger, self._loss = cut, group, ledger, loss
        self.rank = group.rank()
        self.owner = Owner(model, cut.modules_of(self.rank))
        self.device = next(self.owner.parameters()).device
        self.stages = [
            CodedStage(
                Stage(model, [cut.chain[index] for index in cut.stages[number]]),
                (number, len(cut.stages)),
                group,
                self.device,
                self._crossing(number),
            )
            for number in cut.stages_of(self.rank)
        ]
        self._schedules: dict[int, object] = {}
        self._scale = 1.0
        self._tied = self._tied_parameters()
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

    def step(self, inputs: Sequence[Tensor], targets: Sequence[Tensor], scale: float = 1.0) -> list[Tensor]:
        """Forward and backward of these micro-batches, all of one shape. Gradients are those of the sum of losses times `scale`.

        Returns the losses on the rank that has the last stage, detached and not scaled; elsewhere none. Collective.
        """
        num_micro = len(inputs)
        if num_micro not in self._schedules:
            self._schedules[num_micro] = make_schedule(self.cut.options.schedule, self.stages, num_micro, self._scaled_loss)
        self._scale, losses = scale, []
        arguments = (torch.cat(list(inputs)),) if self.has_first else ()
        target = torch.cat(list(targets)) if self.has_last else None
        with self._ledger.label(LABEL):
            self._schedules[num_micro].step(*arguments, target=target, losses=losses, return_outputs=False)  # type: ignore[attr-defined]
        return [loss.detach() / scale for loss in losses] if self.has_last else []

    def add_up_tied(self) -> None:
        """After the backward passes of a step: both holders of a tied weight get the sum of both gradients. Collective."""
        with self._ledger.label(TIED):
            for other, parameters in self._tied.items():
                for parameter in parameters:
                    gradient = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
                    received = torch.empty_like(gradient)
                    work = dist.isend(gradient, group=self._group, group_dst=other)
                    dist.recv(received, group=self._group, group_src=other)
                    assert work is not None
                    work.wait()
                    parameter.grad = gradient.add_(received)

    @torch.no_grad()
    def evaluate(self, batches: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """Losses of (inputs, targets), each of a micro-batch's shape, on the rank that has the last stage. Nothing is coded.
        Collective: every rank gives as many batches."""
        losses, sent = [], []
        with self._ledger.label(EVALUATION):
            for inputs, targets in batches:
                x = inputs
                for stage in self.stages:
                    number = stage.stage_index
                    if self.cut.crosses(number - 1):
                        like = self.cut.crossing[number - 1]
                        x = torch.empty(like.shape, dtype=like.dtype, device=self.device)
                        dist.recv(x, group=self._group, group_src=self.cut.rank_of(number - 1))
                    x = stage.submod(x)
                    if self.cut.crosses(number):
                        sent.append((x, dist.isend(x, group=self._group, group_dst=self.cut.rank_of(number + 1))))
                if self.has_last:
                    losses.append(self._loss(x, targets))
            for _, work in sent:
                assert work is not None
                work.wait()
        return losses

    def _scaled_loss(self, output: Tensor, target: Tensor) -> Tensor:
        return self._loss(output, target) * self._scale

    def _crossing(self, number: int) -> Crossing:
        before = self.cut.crossing[number - 1] if number else self.cut.entering
        into, out = self.cut.crosses(number - 1), self.cut.crosses(number)
        codec = self.cut.codec
        needs_gradient = number > 0 and before.is_floating_point()
        return Crossing(
            arriving=(before.clone().requires_grad_(needs_gradient),),
            leaving=(self.cut.crossing[number].clone().requires_grad_(),),
            activations_in=codec("activations", number - 1) if into else None,
            activations_out=codec("activations", number) if out else None,
            gradients_in=codec("gradients", number) if out else None,
            gradients_out=codec("gradients", number - 1) if into else None,
        )

    def _tied_parameters(self) -> Mapping[int, list[nn.Parameter]]:
        """By the other rank that has them."""
        found: dict[int, list[nn.Parameter]] = {}
        for name in self.cut.tied():
            holders = [rank for rank in range(self.cut.ranks) if name in self.cut.modules_of(rank)]
            if len(holders) > 2:
                raise UserError(f"{name} is used by stages on {len(holders)} ranks; pipelines take weights that two ranks share")
            if self.rank in holders:
                other = next(rank for rank in holders if rank != self.rank)
                trained = [one for one in self.owner.get_submodule(name).parameters() if one.requires_grad]
                found.setdefault(other, []).extend(trained)
        return found
