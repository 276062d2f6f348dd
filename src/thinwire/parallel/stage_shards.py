"""The optimizer's state of a pipeline's stage shared out to its replicas (ZeRO stage 1, Rajbhandari et al. 2020).

Schedules run passes of several micro-batches at once, some in two halves, which FSDP2's hooks do not take; so here every rank of
s keeps whole weights and gradients of its stages, and what is trained is its rows of each parameter, as in `sharded`:

    before the passes    all-gather of what each rank has trained         message: all rows of a rank, padded to equal numbers
    after them           all-to-all of the gradients' rows; each rank takes the mean of what is for its own, in the order of ranks
"""

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import pad

from thinwire.collectives.ledger import Ledger
from thinwire.collectives.metered_calls import all_gather, all_to_all
from thinwire.compress.base import sum_in_order
from thinwire.compress.precision import widened
from thinwire.compress.sharded.layout import shard_length
from thinwire.parallel.sharded import Rows, give_gradient, parts_of, rows_of
from thinwire.parallel.tensor import gradient_norm, norm_transfers
from thinwire.parallel.tensor_parts import Parts
from thinwire.traffic import EVALUATION, Transfer
from thinwire.workload import ITEM_BYTES, Workload

WEIGHTS, GRADIENTS = "stage weights", "stage gradients"
Named = Iterable[tuple[str, nn.Parameter]]


class StageShards(Rows):
    """Of one rank. Parameters are of one dtype."""

    def __init__(self, owner: nn.Module, group: dist.ProcessGroup, ledger: Ledger, parts: Parts) -> None:
        """owner: of the stages' parameters, the same on all ranks of `group`; parts: which tensor ranks have of them."""
        whole = dict(owner.named_parameters())
        rows = {name: rows_of(one.shape[0], group.size(), group.rank()).ranges[0] for name, one in whole.items()}
        own = {name: one.detach()[rows[name].start : rows[name].stop].clone() for name, one in whole.items()}
        super().__init__(own, parts_of(owner, group, parts))
        self.group, self._ledger = group, ledger
        self._whole = list(whole.values())
        self._lengths = [shard_length(one.shape, group.size()) for one in self._whole]
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

    def norm_of(self, named: Named, norm: Callable[[Named], Tensor] | None = None) -> Tensor:
        """Of the gradients of these parameters of the stages. norm: of shards; None: where no tensor ranks have parts of them.
        Collective."""
        own = dict(self.named_parameters())
        shards = [(name, own[name]) for name, _ in named]
        return norm(shards) if norm else gradient_norm(shards, (), self.group, self._ledger, self.group)


def traffic(whole: Workload, degree: int, *, clips: bool) -> list[Transfer]:
    """What a rank sends over the group in a step. whole: of its stages; clips: with `norm_of`."""
    item = ITEM_BYTES[whole.parameters[0].dtype]
    chunk = item * sum(shard_length(one.shape, degree) for one in whole.parameters)
    found = [
        Transfer(label=WEIGHTS, axis="shard", op="all_gather", message_bytes=chunk, item_bytes=item),
        Transfer(label=GRADIENTS, axis="shard", op="all_to_all", message_bytes=degree * chunk, item_bytes=item),
    ]
    return found + (norm_transfers("shard", getattr(torch, whole.parameters[0].dtype)) if clips else [])


def evaluation_traffic(sent: Iterable[Transfer], every: int) -> list[Transfer]:
    """Of an evaluation every so many steps, 0: none. sent: in a step."""
    return [replace(one, label=EVALUATION, every=every) for one in sent if one.label == WEIGHTS and every]


def _filled(tensor: Tensor, length: int) -> Tensor:
    """Flat, with zeros behind it."""
    return pad(tensor.detach().reshape(-1), (0, length - tensor.numel()))
