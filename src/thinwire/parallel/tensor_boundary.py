"""What crosses a pipeline's boundary, sent once by all tensor ranks together, not once by each.

All t ranks of a stage have the same activation x, and the same gradient of it, and each has its peer in the next stage. So each
sends its own t-th part of the width to its peer (ceil(M / t) values, zeros behind the last), and the peers put x together over
their own, faster axis:

    part      behind the last unit of a stage: forward this rank's part of x, backward all-gather of the parts of the gradient
    gather    before the first unit of the next: forward all-gather of the parts of x, backward this rank's part of the gradient

    across the boundary B L M instead of t B L M values, each way; over the tensor axis B L M / t more from each rank to each

What is coded at the boundary is coded in parts, and decoded before it is gathered, so x stays the same bits on all ranks.
(Narayanan et al. 2021, Efficient large-scale language model training on GPU clusters, section 4.1.)
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from thinwire.collectives.ledger import Ledger
from thinwire.collectives.metered_calls import all_gather
from thinwire.parallel.chain import Shared, Unit
from thinwire.parallel.cut import Cut
from thinwire.parallel.waits import Waits
from thinwire.traffic import EVALUATION, Transfer

LABEL = "boundary parts"


def split_boundaries(
    cut: Cut,
    group: dist.ProcessGroup,
    ledger: Ledger,
    waits: Waits = Waits(),  # noqa: B008 (notes nothing)
) -> Cut:
    """Of a model that `tensor.apply` was called on: the same cut, whose stages hand on parts of the width wherever they send.

    waits: as for `tensor.apply`.
    """
    degree, width = group.size(), cut.crossing[0].shape[-1]
    sending = [number for number in range(len(cut.stages)) if cut.crosses(number)] if degree > 1 else []
    ends = {cut.stages[number][-1] for number in sending}

    def changed(index: int, unit: Unit) -> Unit:
        def run(owner: nn.Module, x: Tensor, shared: Shared) -> Tensor:
            trains = torch.is_grad_enabled()
            call = width, group, ledger, waits.label(LABEL) if trains else EVALUATION, waits if trains else Waits()
            if index - 1 in ends:
                x = Gather.apply(x, *call)
            x = unit.run(owner, x, shared)
            return _Part.apply(x, *call) if index in ends else x

        return replace(unit, run=run)

    def crosses(number: int, like: Tensor) -> Tensor:
        return like.new_empty((*like.shape[:-1], -(-width // degree))) if number in sending else like

    return replace(
        cut,
        chain=tuple(changed(index, unit) for index, unit in enumerate(cut.chain)),
        crossing=tuple(crosses(number, like) for number, like in enumerate(cut.crossing)),
    )


def boundary_traffic(cut: Cut, rank: int, degree: int, num_micro: int, *, evaluates: bool = False) -> list[Transfer]:
    """What rank `rank` of a pipeline sends over the tensor axis for it, exactly. cut: of `split_boundaries`; evaluates: as in
    `Passes`."""
    stages = cut.stages_of(rank)
    boundaries = [boundary for stage in stages for boundary in ((stage - 1,) if evaluates else (stage - 1, stage))]
    return gathers(cut, boundaries if degree > 1 else (), num_micro, EVALUATION if evaluates else LABEL)


def gathers(cut: Cut, boundaries: Iterable[int], num_micro: int, label: str = LABEL) -> list[Transfer]:
    """Of what crosses at each of these, if it does: forward behind it, or backward before it."""
    return [
        Transfer(
            label=label,
            axis="tensor",
            op="all_gather",
            message_bytes=part.nbytes,
            item_bytes=part.element_size(),
            calls=num_micro,
            in_passes=True,
        )
        for part in (cut.crossing[boundary] for boundary in boundaries if cut.crosses(boundary))
    ]


def _part(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    padded = F.pad(x, (0, -x.shape[-1] % group.size()))
    return padded.chunk(group.size(), dim=-1)[group.rank()].contiguous()


def _gathered(part: Tensor, width: int, group: dist.ProcessGroup, ledger: Ledger, label: str, waits: Waits) -> Tensor:
    parts = part.new_empty(group.size(), *part.shape)
    with waits.wait():
        all_gather(parts.view(-1), part.contiguous().view(-1), group, ledger, label).wait()
    return torch.cat(parts.unbind(), dim=-1)[..., :width]


class Gather(torch.autograd.Function):
    """apply(part, width, group, ledger, label, waits): parts of the width of all ranks of `group` put together."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, *call: Any) -> Tensor:
        ctx.group = call[1]
        return _gathered(part, *call)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return _part(gradients[0], ctx.group), None, None, None, None, None


class _Part(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *call: Any) -> Tensor:
        ctx.call = call
        return _part(x, call[1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return _gathered(gradients[0], *ctx.call), None, None, None, None, None
