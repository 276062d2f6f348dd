"""Expert parallelism of thinwire's `Transformer`: each of e ranks has E / e experts of every block, applied from outside.

Ranks of the axis are replicas: each has tokens of its own, and all parameters but experts'. In each block

    dispatch    the slots of rank i's tokens for the experts of rank r go from i to r, S M values for each expert
    combine     what comes out of them goes back

by all-to-all, and in the backward pass gradients go the same ways, each way back. Slots are as many as `models.experts` says,
empty ones too, so that a message's size follows from shapes alone: of n blocks, with slots for S = B C choices of each expert,

    a micro-batch sends    2 n all-to-alls of E S M values forward, 2 n backward

The loss of a rank is the mean over its own tokens. Gradients of dense parameters are averaged over all replicas, e ranks for each
of d data ranks. An expert sees the tokens of the e ranks of its group; their gradients add up in it, divided by e on the way, so
that averaged over the d data ranks alone (`sync.expert_ranks`) they are those of the mean over all replicas:

    1/d sum over data ranks of ( 1/e sum over expert ranks of dloss/dW )

Parameters keep the names that they have in the model. Lepikhin et al. 2020 (GShard, 2006.16668), section 3.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from thinwire.collectives.ledger import Ledger
from thinwire.compress.activations.swap import swap_transfer, swapped
from thinwire.compress.base import Codec, padded
from thinwire.compress.speed import seconds_per_value
from thinwire.config.model import ModelConfig
from thinwire.errors import UserError
from thinwire.models.experts import compute
from thinwire.models.transformer import Transformer
from thinwire.parallel import tensor
from thinwire.parallel.tensor import Passes
from thinwire.parallel.waits import Waits
from thinwire.traffic import EVALUATION, Transfer
from thinwire.workload import is_of_expert, plain_name

AXIS = "expert"
SLOTS = "experts' slots"
GRADIENTS = "gradients of slots"


def apply(
    model: nn.Module,
    group: dist.ProcessGroup,
    ledger: Ledger,
    codec: Codec | None = None,
    waits: Waits = Waits(),  # noqa: B008 (notes nothing)
) -> None:
    """Leave this rank's experts in `model`, in place: make optimizers afterwards. Local.

    Before, the model must be the same, whole, on all ranks of `group`; from then on each gives it as many sequences of the same
    length, and each forward and backward pass is collective. codec: of all slots in training passes; those without gradients are
    never coded. waits: when this rank waited in training passes. UserError for a model that is no `Transformer`, or as
    `ModelConfig.check_experts`.
    """
    if not isinstance(model, Transformer):
        raise UserError(
            f"a {type(model).__name__} has no experts that can be shared out: layout.expert takes thinwire's Transformer; "
            "train it without layout.expert"
        )
    degree, rank = group.size(), group.rank()
    model.config.check_experts(degree)
    if degree == 1:
        return
    ledger.axes[group.group_name] = AXIS
    travel, each = _Travel(group, ledger, codec, waits), model.config.experts // degree
    for block in model.blocks:
        experts: Any = block.mlp
        experts.compute = travel.compute
        for number in range(model.config.experts):
            if number // each != rank:
                delattr(experts.experts, str(number))


@dataclass(frozen=True)
class _Travel:
    """Between the ranks of `group`, for one model."""

    group: dist.ProcessGroup
    ledger: Ledger
    codec: Codec | None
    waits: Waits

    def compute(self, experts: Iterable[nn.Module], slots_ESM: Tensor) -> Tensor:
        """In place of `models.experts.compute`; experts: of this rank. Collective, forward and backward. Of fake tensors, where
        only shapes are wanted, nothing is sent."""
        if isinstance(slots_ESM, FakeTensor):
            return torch.empty_like(slots_ESM)
        degree, device = self.group.size(), slots_ESM.device.type
        if torch.is_autocast_enabled(device):
            slots_ESM = slots_ESM.to(torch.get_autocast_dtype(device))
        mine = _Swap.apply(slots_ESM.unflatten(0, (degree, -1)), self, torch.is_grad_enabled(), float(degree))
        y_ESM = compute(experts, mine.transpose(0, 1).flatten(1, 2))
        back = y_ESM.unflatten(1, (degree, -1)).transpose(0, 1)
        return _Swap.apply(back, self, torch.is_grad_enabled(), 1 / degree).flatten(0, 1)

    def swap(self, rows: Tensor, label: str) -> Tensor:
        with self.waits.wait():
            return swapped(rows, self.group, self.codec, self.ledger, self.waits.label(label))


class _Swap(torch.autograd.Function):
    """Row s of [e, E/e, .., M] goes to rank s; backward its gradient comes back, times `factor`."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, travel: _Travel, trains: bool, factor: float) -> Tensor:
        ctx.travel, ctx.factor = travel, factor
        return travel.swap(rows, SLOTS) if trains else swapped(rows, travel.group, None, travel.ledger, EVALUATION)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.travel.swap(gradients[0], GRADIENTS) * ctx.factor, None, None, None


def gradient_norm(named: Iterable[tuple[str, nn.Parameter]], group: dist.ProcessGroup, ledger: Ledger) -> Tensor:
    """As `tensor.gradient_norm`: experts of all ranks count. Collective."""
    listed = list(named)
    return tensor.gradient_norm(listed, {plain_name(name) for name, _ in listed if is_of_expert(name)}, group, ledger)


def traffic(config: ModelConfig, degree: int, passes: Passes, codec: Codec | None = None) -> list[Transfer]:
    """What a rank sends over the axis for these passes, exactly. Coding is timed here."""
    if degree == 1:
        return []
    kept: torch.dtype = getattr(torch, config.dtype)
    slots = passes.micro_batch * config.expert_slots(passes.sequence)
    row = config.experts // degree * slots * config.width, torch.bfloat16 if passes.casts else kept
    blocks = range(1, config.layers + 1) if passes.units is None else [one for one in passes.units if 0 < one <= config.layers]
    again, swaps = sum(unit in passes.recomputed for unit in blocks), 2 * passes.num_micro
    if passes.evaluates:
        sent = swap_transfer(row, None, AXIS, degree, EVALUATION)
        return [replace(sent, calls=swaps * len(blocks), in_passes=True)]
    norm = tensor.norm_transfers(AXIS, kept) if passes.clips else []
    work_s = 0.0
    if codec is not None:
        encode_s, decode_s = seconds_per_value(codec, passes.device)
        work_s = padded(row[0], codec.block) * ((degree - 1) * encode_s + degree * decode_s)
    return [
        replace(swap_transfer(row, codec, AXIS, degree, label), calls=swaps * count, in_passes=True, work_s=work_s)
        for label, count in ((SLOTS, len(blocks) + again), (GRADIENTS, len(blocks)))
    ] + norm
