"""Sequence (or context) parallelism of thinwire's `Transformer`: the tokens of each sequence on several ranks, from outside.

Every rank has all parameters, and of each sequence of L tokens L / s: slices r and 2s-1-r of 2s equal ones (`sequence_attention`
says why). All that a model does to one token at a time needs no other rank; attention is a ring, in which keys and values travel.

    x      embeddings of the own tokens, with the positions that they have in the whole sequence
    loss   s n_r / n times the mean over the own targets, n_r of all n that count: the mean over the ranks is that of the whole

So the mean of the gradients over the ranks is the gradient of the whole sequence's loss: ranks of a sequence are averaged like
replicas, and together with them (`Layout.of_gradients`). Callers give all ranks of a group the same whole sequences.

Activations are an s-th of one rank's, but for keys and values, of which a rank keeps those of the whole sequence (`Ring.keeps`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from thinwire.collectives.ledger import Ledger
from thinwire.config.model import ModelConfig
from thinwire.errors import UserError
from thinwire.layout import check_sequence
from thinwire.models.transformer import Transformer, rotation_of
from thinwire.parallel.sequence_attention import AXIS, GRADIENTS, KEYS, Ring
from thinwire.parallel.tensor import Passes
from thinwire.parallel.tensor_loss import IGNORED
from thinwire.parallel.tensor_parts import kv_heads_of
from thinwire.parallel.waits import Waits
from thinwire.traffic import EVALUATION, Transfer
from thinwire.workload import BACKWARD_OVER_FORWARD


@dataclass(frozen=True)
class Share:
    """The tokens of a sequence that one of `degree` ranks has."""

    degree: int
    rank: int

    def of(self, x: Tensor) -> Tensor:
        """[.., L] of whole sequences -> [.., L/s]. UserError as `check_sequence`."""
        check_sequence(x.shape[-1], self.degree)
        slices = x.unflatten(-1, (2 * self.degree, -1))
        return torch.cat((slices[..., self.rank, :], slices[..., -1 - self.rank, :]), dim=-1)


def apply(
    model: nn.Module,
    group: dist.ProcessGroup,
    ledger: Ledger,
    *,
    keeps: bool = True,
    waits: Waits = Waits(),  # noqa: B008 (notes nothing)
) -> Ring:
    """Let `model` compute on this rank's tokens of the sequences that it is given, in place; parameters stay as they are. Local.

    From then on all ranks of `group` give it the same tokens and targets, and each forward and backward pass is collective;
    logits are of the own tokens, in the order of `Share`, and the loss is as above. Call it after `tensor.apply`, if both are
    wanted, and before a cut into stages. keeps, waits: see `Ring`, which is returned. UserError for a model that is no
    `Transformer`, or one of experts.
    """
    if not isinstance(model, Transformer):
        raise UserError(
            f"a {type(model).__name__} cannot share out sequences: layout.seq takes thinwire's Transformer; "
            "train it without layout.seq"
        )
    degree, ring = group.size(), Ring(group, ledger, keeps, waits)
    if degree == 1:
        return ring
    if model.config.experts:
        raise UserError(
            f"layout.seq = {degree} with model.experts = {model.config.experts}: experts have slots for whole sequences; "
            "train it without layout.seq"
        )
    ledger.axes[group.group_name] = AXIS
    share, blocks = Share(degree, group.rank()), model.blocks
    for looked_up in (model.embed, model.positions):
        if looked_up is not None:
            looked_up.register_forward_pre_hook(lambda _, arguments: (share.of(arguments[0]),))
    for block in blocks:
        attention: Any = block.attention
        attention.attend = ring.attend
        block.register_forward_pre_hook(partial(_with_rotation, model.config, share))
    model.loss = _loss_of_share(model.loss, share)
    return ring


def _with_rotation(config: ModelConfig, share: Share, _: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """A block's arguments, with the rotation of the positions that the rank's tokens have."""
    x_BLM: Tensor = arguments[0]
    position_L = share.of(torch.arange(x_BLM.shape[1] * share.degree, device=x_BLM.device))
    return x_BLM, rotation_of(x_BLM, config, position_L)


def _loss_of_share(loss: Callable[[Tensor, Tensor], Tensor], share: Share) -> Callable[[Tensor, Tensor], Tensor]:
    """Of the own tokens' logits and all tokens' targets."""

    def own_loss(logits_BLV: Tensor, targets_BL: Tensor) -> Tensor:
        mine_BL = share.of(targets_BL)
        count, own_count = (targets_BL != IGNORED).sum(), (mine_BL != IGNORED).sum()
        mean = loss(logits_BLV, mine_BL.masked_fill(own_count == 0, 0))  # a mean over none is not a number, even times 0
        return mean * ((share.degree * own_count).to(mean.dtype) / count)

    return own_loss


def traffic(
    config: ModelConfig, degree: int, passes: Passes, *, tensor: int = 1, tensor_rank: int = 0, keeps: bool = True
) -> list[Transfer]:
    """What a rank sends over the axis for these passes, exactly; passes.sequence: tokens of a sequence that it has.

    Each message may hide under the turn in which it travels. tensor: degree of that axis, on which this is rank `tensor_rank`;
    keeps: see `Ring`.
    """
    blocks = range(1, config.layers + 1) if passes.units is None else [one for one in passes.units if 0 < one <= config.layers]
    calls, again = (degree - 1) * passes.num_micro, sum(unit in passes.recomputed for unit in blocks)
    if calls * len(blocks) == 0:
        return []
    kept: torch.dtype = getattr(torch, config.dtype)
    product = torch.bfloat16 if passes.casts else kept
    values = 2 * passes.micro_batch * passes.sequence * len(kv_heads_of(config, tensor, tensor_rank)) * config.head_width

    def sent(label: str, dtype: torch.dtype, times: int, window_flops: float) -> Transfer:
        return Transfer(
            label=label,
            axis=AXIS,
            op="send",
            message_bytes=values * dtype.itemsize,
            item_bytes=dtype.itemsize,
            calls=times * calls,
            window_flops=window_flops,
            in_passes=True,
            around=True,
        )

    turn = turn_flops(config, passes, tensor, tensor_rank)
    if passes.evaluates:
        return [sent(EVALUATION, product, len(blocks), turn)]
    back = BACKWARD_OVER_FORWARD * turn if keeps else 0.0  # else the last sums leave when there is no turn to come
    wide = torch.promote_types(product, torch.float32)
    return [sent(KEYS, product, (1 if keeps else 2) * len(blocks) + again, turn), sent(GRADIENTS, wide, len(blocks), back)]


def turn_flops(config: ModelConfig, passes: Passes, tensor: int = 1, tensor_rank: int = 0) -> float:
    """Forward, of a micro-batch, in a turn of one block's ring: an s-th of what `Workload` counts as the rank's attention."""
    heads = len(kv_heads_of(config, tensor, tensor_rank)) / config.kv_heads
    return 4.0 * config.width * passes.micro_batch * passes.sequence**2 * heads
