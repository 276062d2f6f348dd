"""Replicas begin from the same values. 32 bytes a rank show whether they do, where a model takes minutes on slow links.

Replicas that were made from one seed, or loaded from one file, are equal already; then nothing needs to be sent.

What a collective is handed is contiguous and belongs to nobody else: backends read and write numel() values from the first one
on, whatever the strides say. A tensor that is not (transposed, channels last, or expanded, where many values are one in memory)
is sent and received as a copy.
"""

import hashlib
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist

from thinwire.errors import UserError


def same_everywhere(tensors: Sequence[torch.Tensor], group: dist.ProcessGroup) -> bool:
    """Whether all ranks of `group` hold the same types, shapes and values, bit for bit and in this order. Collective.

    The tensors lie on the device that the group's backend serves; there the digests (SHA-256) are gathered.
    """
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    mine = torch.tensor(list(digest.digest()), dtype=torch.uint8, device=tensors[0].device if tensors else "cpu")
    digests = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(digests, mine, group)
    return all(torch.equal(one, mine) for one in digests)


@torch.no_grad()
def make_same(tensors: Mapping[str, torch.Tensor], group: dist.ProcessGroup) -> None:
    """Give all ranks of `group` the first one's values, if any differ. Collective, with tensors of the same shapes.

    UserError on all ranks if one has a tensor whose memory cannot hold the first rank's values.
    """
    if same_everywhere(list(tensors.values()), group):
        return
    wrong = ""
    for name, tensor in tensors.items():
        if not tensor.numel():
            continue
        own = tensor.detach().contiguous()
        own = own.clone() if own.untyped_storage().nbytes() < own.nbytes else own
        dist.broadcast(own, group=group, group_src=0)
        if (own.data_ptr() != tensor.data_ptr() or own.stride() != tensor.stride()) and not _put(tensor, own):
            wrong = wrong or f"{name} of shape {tuple(tensor.shape)}"
    any_wrong = torch.tensor([float(bool(wrong))], device=next(iter(tensors.values())).device)
    dist.all_reduce(any_wrong, dist.ReduceOp.MAX, group)
    if any_wrong:
        raise UserError(
            f"{wrong or 'a tensor of another rank'} keeps several values in one place of memory (it is expanded), and the first "
            "rank's differ there; call .contiguous() on it when the model is made"
        )


def _put(tensor: torch.Tensor, values: torch.Tensor) -> bool:
    """tensor <- values, each place in memory once; whether it holds them then."""
    once = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in tensor.stride())
    tensor[once].copy_(values[once])
    return torch.equal(tensor, values)
