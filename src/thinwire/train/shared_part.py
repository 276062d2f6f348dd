"""What a rank shares with others that compute with it: of matrices with those of the tensor axis, of sequences with those of the
seq axis, of experts with those of the expert axis; the gradient's norm, and what is sent for it all within passes."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from thinwire.collectives.ledger import Ledger
from thinwire.compress.base import Codec
from thinwire.config.model import ModelConfig
from thinwire.config.run import RunConfig, TrainSection
from thinwire.layout import Layout
from thinwire.parallel import experts, sequence, tensor
from thinwire.parallel.apply import Applied, Asked, codec_of
from thinwire.parallel.cut import Cut
from thinwire.parallel.recompute import units_of
from thinwire.parallel.sequence_attention import GRADIENTS, Ring
from thinwire.parallel.tensor_boundary import boundary_traffic, gathers, split_boundaries
from thinwire.parallel.tensor_parts import Parts
from thinwire.parallel.waits import Waits
from thinwire.traffic import Transfer, merged
from thinwire.train.step import Named
from thinwire.workload import is_of_expert


@dataclass(frozen=True, kw_only=True)
class SharedPart:
    """Of one rank. codec: of tensor ranks' sums; slots: of experts'; parts: of parameters, by name in the model; ring: of ranks
    that share its sequences; cut: into stages, of which this rank has those of `stage_rank`; recomputed: as of `Passes`."""

    shape: ModelConfig
    train: TrainSection
    layout: Layout
    group: dist.ProcessGroup
    """Of the tensor axis, or where experts are shared of theirs."""
    shards: dist.ProcessGroup | None
    """Of ranks that each have rows of all that this one has, if states are shared too."""
    ledger: Ledger
    codec: Codec | None
    slots: Codec | None
    casts: bool
    parts: Parts
    ring: Ring | None
    waits: Waits
    device: torch.device
    cut: Cut | None = None
    stage_rank: int = 0
    recomputed: Mapping[int, str] = field(default_factory=dict)

    @classmethod
    def of(cls, applied: Applied, shape: ModelConfig, config: RunConfig, asked: Asked, *, casts: bool) -> "SharedPart":
        """Of what `parallel.apply` has left of a `Transformer`."""
        pipeline = applied.pipeline
        return cls(
            shape=shape,
            train=config.train,
            layout=asked.layout,
            group=asked.groups[axis_of(asked.layout)],
            shards=asked.groups["shard"] if asked.layout.shard > 1 else None,
            ledger=asked.ledger,
            codec=codec_of(config.tensor.sums),
            slots=codec_of(config.experts.slots),
            casts=casts,
            parts=applied.parts,
            ring=applied.ring,
            waits=applied.waits,
            device=next(applied.module.parameters()).device,
            cut=None if pipeline is None else pipeline.cut,
            stage_rank=0 if pipeline is None else pipeline.rank,
            recomputed=units_of(asked.recompute),
        )

    def pace(self, flops_per_s: float) -> None:
        """From now on a turn of the ring takes as long as on a device that achieves this in training."""
        if self.ring is not None:
            turn = sequence.turn_flops(self.shape, self._passes(), self.layout.tensor, self.group.rank())
            self.ring.turn_s = turn / flops_per_s

    def in_stages(self, cut: Cut, stage_rank: int) -> "SharedPart":
        """The same, when the model has been cut; `cut.stages` hand on parts of the width."""
        splits = self.layout.tensor > 1
        return replace(
            self, cut=split_boundaries(cut, self.group, self.ledger, self.waits) if splits else cut, stage_rank=stage_rank
        )

    def norm(self, named: Named) -> Tensor:
        """Of the gradient of the whole parameters. Collective."""
        if self.layout.expert > 1:
            return experts.gradient_norm(named, self.group, self.ledger)
        return tensor.gradient_norm(self._plain(named), self.parts, self.group, self.ledger, self.shards)

    def traffic(self, num_micro: int, names: Iterable[str]) -> list[Transfer]:
        """What this rank sends in a step. names: of all whose `norm` is asked for, which is sent where one of them is split."""
        split = any(is_of_expert(name) if self.layout.expert > 1 else name in self.parts for name in names)
        clips = self.train.clip > 0 and split
        passes = self._passes(num_micro=num_micro, units=self._units(), clips=clips)
        return merged(self._sent(passes) + self._at_boundaries(num_micro))

    def pass_traffic(self) -> dict[tuple[str, int], list[Transfer]]:
        """What a pass of one micro-batch through a stage sends, by (F forward or B backward, stage)."""
        assert self.cut is not None
        found: dict[tuple[str, int], list[Transfer]] = {}
        for stage, units in enumerate(self.cut.stages):
            once, sent = (merged(self._sent(self._passes(units=units, recomputed=again))) for again in ({}, self.recomputed))
            backward = tensor.GRADIENTS, GRADIENTS, experts.GRADIENTS
            forward = [one for one in once if not one.label.startswith(backward)]
            entering, leaving = ((stage - 1,), (stage,)) if self.layout.tensor > 1 else ((), ())
            found["F", stage] = forward + gathers(self.cut, entering, 1)
            found["B", stage] = _less(sent, forward) + gathers(self.cut, leaving, 1)
        return found

    def evaluation_traffic(self, task: Any, replica: int) -> list[Transfer]:
        """What one evaluation sends."""
        every, batches = self.train.eval_every, sum(1 for _ in task.held_out(replica))
        if not every or not batches:
            return []
        passes = self._passes(num_micro=batches, units=self._units(), evaluates=True, casts=False)
        found = self._sent(passes) + self._at_boundaries(batches, evaluates=True)
        return merged(replace(transfer, every=every) for transfer in found)

    def _sent(self, passes: tensor.Passes) -> list[Transfer]:
        """Over all of these axes."""
        if self.layout.expert > 1:
            return experts.traffic(self.shape, self.layout.expert, passes, self.slots)
        degree = self.layout.tensor
        found = tensor.traffic(self.shape, degree, passes, self.codec)
        return found + sequence.traffic(self.shape, self.layout.seq, passes, tensor=degree, tensor_rank=self.group.rank())

    def _passes(self, **changes: Any) -> tensor.Passes:
        of_a_batch = {
            "micro_batch": self.train.micro_batch,
            "sequence": self.train.sequence // self.layout.seq,
            "recomputed": self.recomputed,
        }
        return tensor.Passes(**{**of_a_batch, "casts": self.casts, "device": self.device, **changes})

    def _units(self) -> list[int] | None:
        if self.cut is None:
            return None
        return [unit for stage in self.cut.stages_of(self.stage_rank) for unit in self.cut.stages[stage]]

    def _at_boundaries(self, num_micro: int, *, evaluates: bool = False) -> list[Transfer]:
        if self.cut is None:
            return []
        return boundary_traffic(self.cut, self.stage_rank, self.layout.tensor, num_micro, evaluates=evaluates)

    @staticmethod
    def _plain(named: Named) -> Iterator[tuple[str, nn.Parameter]]:
        """Without what DistributedDataParallel adds to names."""
        return ((name.removeprefix("module."), one) for name, one in named)


def axis_of(layout: Layout) -> str:
    """Of a `SharedPart`'s group. A model of experts has no other of these axes."""
    return "expert" if layout.expert > 1 else "tensor"


def _less(transfers: Sequence[Transfer], without: Sequence[Transfer]) -> list[Transfer]:
    """The calls that are left."""
    calls = {replace(one, calls=0): one.calls for one in without}
    left = (replace(one, calls=one.calls - calls.get(replace(one, calls=0), 0)) for one in transfers)
    return [one for one in left if one.calls]
