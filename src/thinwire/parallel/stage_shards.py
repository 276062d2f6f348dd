"""The optimizer's state of a pipeline's stage shared out to its replicas (ZeRO stage 1, Rajbhandari et al. 2020).

Schedules run passes of several micro-batches at once, some in two halves, which FSDP2's hooks do not take; so here every rank of
s keeps whole weights and gradients of its stages, and what is trained is its rows of each parameter, as in `sharded`:

    before the passes    all-gather of what each rank has trained         message: all rows of a rank, padded to equal numbers
    after them           all-to-all of the gradients' rows; each rank takes the mean of what is for its own, in the order of ranks
"""

from collections.abc import Iterable
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import pad

from thinwire.collectives.ledger import Ledger
from thinwire.collectives.metered_calls import all_gather, all_to_all
from thinwire.compress.base import sum_in_order
from thinwire.compress.precision import widened
from thinwire.parallel.sharded import Rows, give_gradient, parts_of
from thinwire.parallel.tensor import gradient_norm, norm_transfers
from thinwire.traffic import EVALUATION, Transfer

WEIGHTS, GRADIENTS = "stage weights", "stage gradients"


class StageShards(Rows):
    """Of one rank. Parameters are of one dtype."""

    def __init__(self, owner: nn.Module, group: dist.ProcessGroup, ledger: Ledger) -> None:
        """owner: of the stages' parameters, the same on all ranks of `group`."""
        parts, whole = parts_of(owner, group), dict(owner.named_parameters())
        own = {
            name: one.detach()[parts[name].ranges[0].start : parts[name].ranges[0].stop].clone() for name, one in whole.items()
        }
        super().__init__(own, parts)
        self.group, self._ledger = group, ledger
        self._whole = list(whole.values())
        self._lengths = [-(-one.shape[0] // group.size()) * (one.numel() // one.shape[0]) for one in self._whole]
        """Values of each parameter in a rank's chunk, with what fills up the last one's."""

    @torch.no_grad()
    def gather(self, label: str = WEIGHTS) -> None:
        """The stages compute with what all ranks have trained. Collective."""
        own = torch.cat([_filled(one, length) for one, length in zip(self.locals, self._lengths, strict=True)])
        chunks = own.new_empty(self.group.size(), own.numel())
        all_gather(chunks.view(-1), own, self.group, self._ledger, label).wait()
        for whole, rows in zip(self._whole, chunks.split(self._lengths, dim=1), strict=True):
            whole.copy_(rows.reshape(-1)[: whole.numel()].view(whole.shape))

    @torch.no_grad()
    def reduce(self) -> None:
        """The mean of the ranks' gradients becomes that of the shards. After the passes of a step. Collective."""
        degree, rows = self.group.size(), []
        for one, length in zip(self._whole, self._lengths, strict=True):
            assert one.grad is not None, "the passes are over"
            rows.append(_filled(one.grad, degree * length).view(degree, length))
        sent = torch.cat(rows, dim=1)
        taken = torch.empty_like(sent)
        all_to_all(taken, sent, self.group, self._ledger, GRADIENTS).wait()
        mean = sum_in_order([widened(one) for one in taken]).div_(degree)
        for local, its in zip(self.locals, mean.split(self._lengths), strict=True):
            give_gradient(local, its[: local.numel()].view(local.shape).to(local.dtype))
        self.forget()

    def forget(self) -> None:
        """Whole gradients."""
        for one in self._whole:
            one.grad = None

    def norm_of(self, named: Iterable[tuple[str, nn.Parameter]]) -> Tensor:
        """Of the gradients of these parameters of the stages. Collective."""
        own = dict(self.named_parameters())
        return gradient_norm([(name, own[name]) for name, _ in named], self.parts, self.group, self._ledger)

    def traffic(self, *, clips: bool) -> list[Transfer]:
        """What this rank sends over the group in a step. clips: with `norm_of`."""
        item = self._whole[0].itemsize
        chunk = item * sum(self._lengths)
        found = [
            Transfer(label=WEIGHTS, axis="shard", op="all_gather", message_bytes=chunk, item_bytes=item),
            Transfer(label=GRADIENTS, axis="shard", op="all_to_all", message_bytes=self.group.size() * chunk, item_bytes=item),
        ]
        return found + (norm_transfers("shard", self._whole[0].dtype) if clips else [])

    def evaluation_traffic(self, every: int) -> list[Transfer]:
        """Of an evaluation every so many steps, 0: none."""
        return [replace(self.traffic(clips=False)[0], label=EVALUATION, every=every)] if every else []


def _filled(tensor: Tensor, length: int) -> Tensor:
    """Flat, with zeros behind it."""
    return pad(tensor.detach().reshape(-1), (0, length - tensor.numel()))
