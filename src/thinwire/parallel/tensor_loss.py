"""Cross-entropy of logits whose vocabulary is split over ranks: three numbers a token travel, never the logits.

Rank r has the logits z_v of its words v; y is the target, n the number of targets that count:

    m = max over all v of z_v                        one all-reduce of the maximum
    s = sum over all v of exp(z_v - m)
    u = z_y - m, of the rank that has y              one all-reduce of the sum, of s and u together
    loss = mean over the n targets of log s - u      the same bits on all ranks
    dloss/dz_v = (exp(z_v - m) / s - [v = y]) / n    local

Columns behind the last word are padding (`tensor_parts`) and count as z = -inf. (Shoeybi et al. 2019, section 3.)

Shapes: T tokens, V the words of one rank with its padding.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from thinwire.collectives.ledger import Ledger
from thinwire.collectives.metered_calls import all_reduce
from thinwire.errors import UserError
from thinwire.parallel.tensor_parts import words_of
from thinwire.parallel.waits import Waits
from thinwire.traffic import EVALUATION

IGNORED = -100
LOSS = "loss"


def tensor_cross_entropy(
    group: dist.ProcessGroup,
    ledger: Ledger,
    vocabulary: int,
    waits: Waits = Waits(),  # noqa: B008 (notes nothing)
) -> Callable[[Tensor, Tensor], Tensor]:
    """loss(logits_BLV of this rank, targets_BL), equal to `models.transformer.cross_entropy` of the whole logits.

    vocabulary: of the model, without padding. waits: as for `tensor.apply`. Targets of -100 do not count. The loss is collective
    in its forward pass. UserError on a CPU for targets outside of the vocabulary.
    """

    def loss(logits_BLV: Tensor, targets_BL: Tensor) -> Tensor:
        precise = torch.promote_types(logits_BLV.dtype, torch.float32)
        trains = torch.is_grad_enabled()
        call = group, ledger, waits.label(LOSS) if trains else EVALUATION, waits if trains else Waits()
        logits_TV, targets_T = logits_BLV.flatten(0, 1).to(precise), targets_BL.flatten()
        check_words(targets_T[targets_T != IGNORED] if targets_T.device.type == "cpu" else targets_T, vocabulary)
        result: Tensor = _CrossEntropy.apply(logits_TV, targets_T, vocabulary, *call)
        return result

    return loss


def check_words(tokens: Tensor, vocabulary: int) -> None:
    """UserError on a CPU for a token that is in no rank's part; on a device nothing is read."""
    if tokens.device.type == "cpu" and tokens.numel():
        lowest, highest = torch.aminmax(tokens)
        if lowest < 0 or highest >= vocabulary:
            wrong = int(lowest) if lowest < 0 else int(highest)
            raise UserError(f"token {wrong} is none of the model's {vocabulary}; enlarge model.vocabulary, or tokenize anew")


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_TV: Tensor, targets_T: Tensor, vocabulary: int, *call: Any) -> Tensor:
        group, ledger, label, waits = call
        words = words_of(vocabulary, group.size(), group.rank())
        z_TV = logits_TV.clone()
        z_TV[:, len(words) :] = -torch.inf
        most_T = z_TV.amax(dim=-1)
        with waits.wait():
            all_reduce(most_T, group, ledger, label, dist.ReduceOp.MAX).wait()
        z_TV -= most_T[:, None]
        here_T = (targets_T >= words.start) & (targets_T < words.stop)
        column_T = torch.where(here_T, targets_T - words.start, 0)
        target_T = torch.where(here_T, z_TV.gather(1, column_T[:, None])[:, 0], 0.0)
        p_TV = z_TV.exp_()
        sums_2T = torch.stack((p_TV.sum(dim=-1), target_T))
        with waits.wait():
            all_reduce(sums_2T, group, ledger, label).wait()
        p_TV /= sums_2T[0, :, None]
        counts_T = targets_T != IGNORED
        share_T = counts_T.to(p_TV.dtype) / counts_T.sum()
        ctx.save_for_backward(p_TV, column_T, here_T, share_T)
        return torch.where(counts_T, sums_2T[0].log() - sums_2T[1], 0.0).sum() / counts_T.sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        p_TV, column_T, here_T, share_T = ctx.saved_tensors
        dz_TV = p_TV.scatter_add(1, column_T[:, None], -here_T[:, None].to(p_TV.dtype))
        return dz_TV.mul_((share_T * gradients[0])[:, None]), None, None, None, None, None, None
