"""What a rank shares with others that compute with it: of matrices with those of the tensor axis, of sequences with those of the
seq axis; the gradient's norm, and what is sent for it all within passes."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from thinwire.collectives.clock import clock_of
from thinwire.collectives.ledger import Ledger
from thinwire.compress.base import Codec, make_codec
from thinwire.config.compress import read_coding
from thinwire.config.model import ModelConfig
from thinwire.config.run import RunConfig, TrainSection
from thinwire.layout import Layout
from thinwire.parallel import sequence, tensor
from thinwire.parallel.cut import Cut
from thinwire.parallel.sequence_attention import GRADIENTS, Ring
from thinwire.parallel.tensor_boundary import boundary_traffic, gathers, split_boundaries
from thinwire.parallel.tensor_parts import Parts
from thinwire.parallel.waits import Waits
from thinwire.traffic import Transfer, merged
from thinwire.train.step import Named


@dataclass(frozen=True, kw_only=True)
class SharedPart:
    """Of one rank. parts: of parameters, by name in the model; ring: of the ranks that share its sequences; cut: into stages, of
    which this rank has those of `stage_rank`; recomputed: units that are computed again in full."""

    shape: ModelConfig
    train: TrainSection
    layout: Layout
    group: dist.ProcessGroup
    """Of the tensor axis."""
    ledger: Ledger
    codec: Codec | None
    casts: bool
    parts: Parts
    ring: Ring
    waits: Waits
    device: torch.device
    cut: Cut | None = None
    stage_rank: int = 0
    recomputed: Collection[int] = ()

    @classmethod
    def split(
        cls,
        model: nn.Module,
        config: RunConfig,
        layout: Layout,
        groups: Mapping[str, dist.ProcessGroup],
        ledger: Ledger,
        *,
        casts: bool,
    ) -> "SharedPart":
        """Of `model`, a whole `Transformer` on its device, of which this rank's part is left. groups: by axis. Local."""
        device = next(model.parameters()).device
        codec, waits = make_codec(read_coding(config.tensor.sums, "tensor.sums")), Waits(clock_of(device))
        shape: Any = model.config
        return cls(
            shape=shape,
            train=config.train,
            layout=layout,
            group=groups["tensor"],
            ledger=ledger,
            codec=codec,
            casts=casts,
            parts=tensor.apply(model, groups["tensor"], ledger, codec, waits),
            ring=sequence.apply(model, groups["seq"], ledger, waits=waits),
            waits=waits,
            device=device,
        )

    def pace(self, flops_per_s: float) -> None:
        """From now on a turn of the ring takes as long as on a device that achieves this in training."""
        self.ring.turn_s = sequence.turn_flops(self.shape, self._passes(), self.layout.tensor, self.group.rank()) / flops_per_s

    def in_stages(self, cut: Cut, stage_rank: int) -> "SharedPart":
        """The same, when the model has been cut; `cut.stages` hand on parts of the width."""
        return replace(self, cut=split_boundaries(cut, self.group, self.ledger, self.waits), stage_rank=stage_rank)

    def norm(self, named: Named) -> Tensor:
        """Of the gradient of the whole parameters. Collective."""
        return tensor.gradient_norm(self._plain(named), self.parts, self.group, self.ledger)

    def traffic(self, num_micro: int, named: Named) -> list[Transfer]:
        """What this rank sends in a step. named: as for `norm`, which is sent where one of them is split."""
        clips = self.train.clip > 0 and any(name in self.parts for name, _ in self._plain(named))
        passes = self._passes(num_micro=num_micro, units=self._units(), clips=clips)
        return merged(self._sent(passes) + self._at_boundaries(num_micro))

    def pass_traffic(self) -> dict[tuple[str, int], list[Transfer]]:
        """What a pass of one micro-batch through a stage sends, by (F forward or B backward, stage)."""
        assert self.cut is not None
        found: dict[tuple[str, int], list[Transfer]] = {}
        for stage, units in enumerate(self.cut.stages):
            once, sent = (merged(self._sent(self._passes(units=units, **changes))) for changes in ({"recomputed": ()}, {}))
            forward = [one for one in once if not one.label.startswith((tensor.GRADIENTS, GRADIENTS))]
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
        """Over both axes."""
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


def _less(transfers: Sequence[Transfer], without: Sequence[Transfer]) -> list[Transfer]:
    """The calls that are left."""
    calls = {replace(one, calls=0): one.calls for one in without}
    left = (replace(one, calls=one.calls - calls.get(replace(one, calls=0), 0)) for one in transfers)
    return [one for one in left if one.calls]
