"""What a rank of the expert axis shares with the others of its group: the norm, and what is sent within passes."""

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
from thinwire.parallel import experts
from thinwire.parallel.tensor import Passes
from thinwire.parallel.waits import Waits
from thinwire.traffic import Transfer
from thinwire.train.step import Named


@dataclass(frozen=True, kw_only=True)
class ExpertPart:
    """Of one rank, which has some experts of each block."""

    shape: ModelConfig
    train: TrainSection
    group: dist.ProcessGroup
    ledger: Ledger
    codec: Codec | None
    waits: Waits
    device: torch.device
    casts: bool

    @classmethod
    def split(cls, model: nn.Module, config: RunConfig, group: dist.ProcessGroup, ledger: Ledger, *, casts: bool) -> "ExpertPart":
        """Of `model`, a whole `Transformer` on its device, in which this rank's experts are left. Local."""
        device = next(model.parameters()).device
        codec, waits = make_codec(read_coding(config.experts.slots, "experts.slots")), Waits(clock_of(device))
        experts.apply(model, group, ledger, codec, waits)
        shape: Any = model.config
        return cls(
            shape=shape,
            train=config.train,
            group=group,
            ledger=ledger,
            codec=codec,
            waits=waits,
            device=device,
            casts=casts,
        )

    def norm(self, named: Named) -> Tensor:
        """Of the gradient of all parameters. Collective."""
        return experts.gradient_norm(named, self.group, self.ledger)

    def traffic(self, num_micro: int) -> list[Transfer]:
        """What this rank sends over the axis in a step."""
        return self._sent(num_micro=num_micro, casts=self.casts, clips=self.train.clip > 0)

    def evaluation_traffic(self, batches: int) -> list[Transfer]:
        """What an evaluation of so many batches sends."""
        every = self.train.eval_every
        sent = self._sent(num_micro=batches, evaluates=True) if every and batches else []
        return [replace(transfer, every=every) for transfer in sent]

    def _sent(self, **passes: Any) -> list[Transfer]:
        of_a_batch: dict[str, Any] = {"micro_batch": self.train.micro_batch, "sequence": self.train.sequence}
        return experts.traffic(self.shape, self.group.size(), Passes(device=self.device, **of_a_batch, **passes), self.codec)
