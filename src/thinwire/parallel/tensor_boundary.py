"""What crosses a pipeline's boundary, sent once by all tensor ranks together, not once by each.

All t ranks of a stage have the same activation x, and the same gradient of it, and each has its peer in the next stage. So each
sends its own t-th part of the width to its peer, and the peers put x together over their own, faster axis:

    part      behind the last unit of a stage: forward this rank's part of x, backward all-gather of the parts of the gradient
    gather    before the first unit of the next: forward all-gather of the parts of x, backward this rank's part of the gradient

    across the boundary B L M instead of t B L M values, each way; over the tensor axis B L M / t more from each rank to each

What is coded at the boundary is coded in parts, and decoded before it is gathered, so x stays the same bits on all ranks.
(Narayanan et al. 2021, Efficient large-scale language model training on GPU clusters, section 4.1.)
"""

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from thinwire.collectives.ledger import Ledger
from thinwire.collectives.metered_calls import all_gather
from thinwire.config.model import ModelConfig
from thinwire.parallel.chain import Chain, Shared, Unit
from thinwire.parallel.tensor import Passes
from thinwire.parallel.tensor_loss import EVALUATION
from thinwire.traffic import Transfer

LABEL = "boundary parts"


def split_boundaries(chain: Chain, cuts: Collection[int], group: dist.ProcessGroup, ledger: Ledger) -> Chain:
    """The chain of a model that `tensor.apply` was called on, to be cut behind the units `cuts`, of which the next is on another
    rank. Of their outputs, last dim the width, the chain has parts."""

    def changed(index: int, unit: Unit) -> Unit:
        def run(owner: nn.Module, x: Tensor, shared: Shared) -> Tensor:
            if index - 1 in cuts:
                x = _Gather.apply(x, group, ledger, LABEL if torch.is_grad_enabled() else EVALUATION)
            x = unit.run(owner, x, shared)
            return _Part.apply(x, group, ledger) if index in cuts else x

        return replace(unit, run=run)

    return tuple(changed(index, unit) for index, unit in enumerate(chain)) if group.size() > 1 else chain


def boundary_traffic(config: ModelConfig, degree: int, passes: Passes, cuts: Collection[int]) -> list[Transfer]:
    """What a rank sends over the tensor axis for it in a step, exactly. passes.units: the rank's."""
    gathers = sum((unit in cuts) + (unit - 1 in cuts) for unit in passes.units or ())
    if degree == 1 or not gathers:
        return []
    item = getattr(torch, config.dtype).itemsize
    size = passes.micro_batch * passes.sequence * config.width // degree * item
    calls = gathers * passes.num_micro
    return [Transfer(label=LABEL, axis="tensor", op="all_gather", message_bytes=size, item_bytes=item, calls=calls)]


def _part(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    return x.chunk(group.size(), dim=-1)[group.rank()].contiguous()


def _gathered(part: Tensor, group: dist.ProcessGroup, ledger: Ledger, label: str) -> Tensor:
    degree = group.size()
    if isinstance(part, FakeTensor):
        return torch.cat([part] * degree, dim=-1)
    parts = part.new_empty(degree, *part.shape)
    all_gather(parts.view(-1), part.contiguous().view(-1), group, ledger, label).wait()
    return torch.cat(parts.unbind(), dim=-1)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, group: dist.ProcessGroup, ledger: Ledger, label: str) -> Tensor:
        ctx.group = group
        return _gathered(part, group, ledger, label)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return _part(gradients[0], ctx.group), None, None, None


class _Part(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, ledger: Ledger) -> Tensor:
        ctx.group, ctx.ledger = group, ledger
        return _part(x, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return _gathered(gradients[0], ctx.group, ctx.ledger, LABEL), None, None
