"""A model cut into the stages of a pipeline: which units each stage has, what crosses between them, and how many bytes that is.

    sent by a rank in a step = sum over its stages of micro-batches * (activation to the next + gradient to the one before)

and once a step one message for each weight that it has together with another rank (a tied embedding), see `tied_codec`. With
`options.copies` an activation of a sample that came before is sent as the change since then; else in the code of the copies.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from thinwire.compress.activations.boundary import BoundaryCodec
from thinwire.compress.activations.differences import Differences
from thinwire.compress.base import make_codec
from thinwire.config.compress import FINE, read_coding
from thinwire.config.pipeline import PipelineSection
from thinwire.errors import UserError
from thinwire.parallel import balance
from thinwire.parallel.chain import Chain, boundaries, chain_of
from thinwire.traffic import EVALUATION, PIPELINE, Transfer

TIED = "tied weights"
COPIES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Cut:
    """ranks: of one pipeline. entering, crossing: what the first stage gets, what leaves each, of a micro-batch, on `meta`."""

    chain: Chain
    stages: tuple[range, ...]
    entering: Tensor
    crossing: tuple[Tensor, ...]
    options: PipelineSection
    ranks: int

    def stages_of(self, rank: int) -> list[int]:
        return balance.stages_of(self.options.schedule, self.ranks, self.options.per_rank, rank)

    def rank_of(self, stage: int) -> int:
        return next(rank for rank in range(self.ranks) if stage in self.stages_of(rank))

    def modules_of(self, rank: int) -> list[str]:
        """Names of those that a rank's stages use."""
        return [name for stage in self.stages_of(rank) for unit in self.stages[stage] for name in self.chain[unit].modules]

    def holders(self, name: str) -> list[int]:
        """Ranks whose stages use the module."""
        return [rank for rank in range(self.ranks) if name in self.modules_of(rank)]

    def tied(self) -> list[str]:
        """Modules that stages on two ranks use. UserError for one that more use."""
        names = dict.fromkeys(name for unit in self.chain for name in unit.modules)
        shared = [name for name in names if len(self.holders(name)) > 1]
        for name in shared:
            if len(self.holders(name)) > 2:
                raise UserError(
                    f"{name} is used by stages on {len(self.holders(name))} ranks, and a pipeline adds up gradients of weights "
                    "that two share; untie it"
                )
        return shared

    def crosses(self, boundary: int) -> bool:
        """Whether stages `boundary` and the next are on different ranks."""
        return 0 <= boundary < len(self.stages) - 1 and self.rank_of(boundary) != self.rank_of(boundary + 1)

    def codec(self, direction: str, boundary: int) -> BoundaryCodec | None:
        """Of what crosses between stage `boundary` and the next, None: as it is. direction: "activations", "gradients", or
        "first": activations of samples of which there is no copy."""
        codec = make_codec(read_coding(getattr(self.options, direction), f"pipeline.{direction}"))
        return None if codec is None else BoundaryCodec(codec, f"{direction} of boundary {boundary}-{boundary + 1}")

    def tied_codec(self) -> BoundaryCodec | None:
        """Of what the holders of a tied weight send each other, None: as it is. Int8 in place of coarse codes, since nothing
        keeps what these leave out."""
        kind = self.options.gradients
        codec = make_codec(read_coding(kind if kind in {"none", *FINE} else "int8", "pipeline.gradients"))
        return None if codec is None else BoundaryCodec(codec, "the gradient of a tied weight")

    def tied_bytes(self, shape: Sequence[int], stored_bytes: int) -> int:
        """Of such a message. stored_bytes: of the weight."""
        codec = self.tied_codec()
        return stored_bytes if codec is None else codec.payload_bytes(shape)

    def differences(self, boundary: int) -> Differences | None:
        """One side of a boundary that activations of samples that return cross, without copies as yet; None: none are kept."""
        coder = self.codec("activations", boundary)
        if coder is None or self.options.copies == "none":
            return None
        return Differences(coder.codec, coder.boundary, dtype=COPIES[self.options.copies])

    def message_bytes(self, direction: str, boundary: int) -> int:
        """Of one micro-batch."""
        values, codec = self.crossing[boundary], self.codec(direction, boundary)
        return values.nbytes if codec is None else codec.payload_bytes(values.shape)

    def traffic(self, rank: int, num_micro: int, tied_bytes: Sequence[int] = (), *, first: bool = False) -> list[Transfer]:
        """What rank `rank` of the pipeline sends in a step. tied_bytes: of each weight that it has together with another rank.
        first: whether there are no copies of its samples as yet."""
        forward = "first" if first else "activations"
        sent = [one for stage in self.stages_of(rank) for one in ((forward, stage), ("gradients", stage - 1))]
        tied = (Transfer(label=TIED, axis="pipe", op="send", message_bytes=size) for size in tied_bytes)
        return self._sent(PIPELINE, sent, num_micro) + list(tied)

    def evaluation_traffic(self, rank: int, num_micro: int) -> list[Transfer]:
        """What it sends in passes without gradients."""
        return self._sent(EVALUATION, [("first", stage) for stage in self.stages_of(rank)], num_micro)

    def _sent(self, label: str, messages: Sequence[tuple[str, int]], num_micro: int) -> list[Transfer]:
        """messages: (direction, boundary), those that cross one, for each micro-batch."""
        found = Counter[tuple[int, int]]()
        for direction, boundary in messages:
            if self.crosses(boundary):
                item_bytes = self.crossing[boundary].element_size() if self.codec(direction, boundary) is None else 1
                found[self.message_bytes(direction, boundary), item_bytes] += num_micro
        return [
            Transfer(label=label, axis="pipe", op="send", message_bytes=size, item_bytes=item_bytes, calls=calls)
            for (size, item_bytes), calls in found.items()
        ]


def cut_model(
    model: nn.Module,
    example: Tensor,
    options: PipelineSection,
    ranks: int,
    costs: Sequence[float] | None = None,
    rates: Sequence[float] | None = None,
) -> Cut:
    """Cut `model` so that the slowest rank is as fast as can be. example: the input of a micro-batch; no communication.

    costs: of each unit of the chain, None: all alike; rates: of each rank of the pipeline, None: all alike. UserError for a model
    of which no chain is known, or with fewer units than stages.
    """
    chain = chain_of(model)
    return cut_chain(chain, (example.to("meta"), boundaries(model, chain, example)), options, ranks, costs, rates)


def cut_chain(
    chain: Chain,
    shapes: tuple[Tensor, Sequence[Tensor]],
    options: PipelineSection,
    ranks: int,
    costs: Sequence[float] | None = None,
    rates: Sequence[float] | None = None,
) -> Cut:
    """As `cut_model`. shapes: of what enters the first unit, and of what crosses behind each, on `meta`."""
    entering, crossing = shapes
    places = [balance.stages_of(options.schedule, ranks, options.per_rank, rank) for rank in range(ranks)]
    by_stage = {stage: rates[rank] if rates else 1.0 for rank, stages in enumerate(places) for stage in stages}
    stages = balance.cut(costs or (1.0,) * len(chain), len(by_stage), [by_stage[stage] for stage in range(len(by_stage))])
    return Cut(
        chain=chain,
        stages=tuple(stages),
        entering=entering,
        crossing=tuple(crossing[units[-1]] for units in stages),
        options=options,
        ranks=ranks,
    )
