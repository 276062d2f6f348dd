"""The two operators of tensor parallelism, with sums that travel coded.

A matrix product that is split over a group leaves a partial result on each rank; their sum is needed in the forward pass behind a
row-parallel layer (Megatron's g), and in the backward pass before a column-parallel one (its conjugate f):

    coded_all_reduce      forward: y = sum over ranks of x_i        backward: the gradient as it is
    coded_gradient_sum    forward: x as it is                       backward: sum over ranks of the gradients

The sum goes in two shots, as the average of gradients does (`twoshot`), but without error feedback. p ranks; x is padded to p
shards of whole blocks; C a codec, D its decoder:

    all-to-all    rank i sends C(x_i[s]) to rank s, for each shard s but its own
    sum           a[r] = x_r[r] + sum over i != r of D C(x_i[r]), in float32, in the order of ranks
    all-gather    each rank gets D C(a[s]) for every s, so results are bit-equal on all ranks

    |result - sum| <= sum over i != s of bound(x_i[s]) + bound(a[s]) + what float32 rounds off

On a device nothing is read on the host, and what is not finite arrives so on all ranks alike (`boundary`). Without a codec x is
all-reduced as it is, in its own dtype. Shoeybi et al. 2019 (Megatron-LM: f and g).
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from thinwire.collectives.ledger import Ledger
from thinwire.collectives.metered_calls import all_gather, all_reduce, all_to_all
from thinwire.compress.activations.boundary import encode_finite, flat_float32
from thinwire.compress.base import Codec, sum_in_order
from thinwire.compress.twoshot import shard_length
from thinwire.traffic import Transfer


def sum_transfers(values: tuple[int, torch.dtype], codec: Codec | None, axis: str, world_size: int, label: str) -> list[Transfer]:
    """What one coded sum sends, exactly. values: their number and dtype. Coding time is the caller's to add (`work_s`)."""
    numel, dtype = values
    if world_size == 1 or numel == 0:
        return []
    if codec is None:
        item = dtype.itemsize
        return [Transfer(label=label, axis=axis, op="all_reduce", message_bytes=numel * item, item_bytes=item)]
    size = codec.payload_bytes(shard_length((numel,), world_size, codec.block))
    return [
        Transfer(label=f"{label} codes", axis=axis, op="all_to_all", message_bytes=world_size * size, item_bytes=1),
        Transfer(label=f"{label} sums", axis=axis, op="all_gather", message_bytes=size, item_bytes=1),
    ]


def coded_sum(x: Tensor, group: dist.ProcessGroup, codec: Codec | None, ledger: Ledger, label: str) -> Tensor:
    """The sum of x over `group`, bit-equal on all ranks; a new tensor. Collective. UserError if not finite, on a CPU."""
    p, rank = group.size(), group.rank()
    if p == 1 or x.numel() == 0:
        return x.detach().clone()
    if codec is None:
        total = x.detach().clone(memory_format=torch.contiguous_format)
        all_reduce(total, group, ledger, label).wait()
        return total
    length = shard_length(x.shape, p, codec.block)
    flat = flat_float32(x, label)
    shards = torch.nn.functional.pad(flat, (0, p * length - flat.numel())).view(p, length)
    size = codec.payload_bytes(length)
    codes = flat.new_zeros(p, size, dtype=torch.uint8)
    for shard in range(p):
        if shard != rank:
            codes[shard] = encode_finite(codec, shards[shard], label)
    received = torch.empty_like(codes)
    all_to_all(received, codes, group, ledger, f"{label} codes").wait()
    total = sum_in_order([shards[i] if i == rank else codec.decode(received[i], length) for i in range(p)])
    results = torch.empty_like(codes)
    code = encode_finite(codec, total, label)
    all_gather(results.view(-1), code, group, ledger, f"{label} sums").wait()
    decoded = flat.new_empty(p, length)
    codec.decode_rows(results, decoded)
    return decoded.view(-1)[: x.numel()].view(x.shape).to(x.dtype)


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *arguments: Any) -> Tensor:
        return coded_sum(x, *arguments)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return gradients[0], None, None, None, None


class _GradientSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *arguments: Any) -> Tensor:
        ctx.arguments = arguments
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return coded_sum(gradients[0], *ctx.arguments), None, None, None, None


def coded_all_reduce(x: Tensor, group: dist.ProcessGroup, codec: Codec | None, ledger: Ledger, label: str) -> Tensor:
    """Behind a row-parallel layer: the sum over `group` forward, nothing backward. Collective in the forward pass."""
    return _AllReduce.apply(x, group, codec, ledger, label)


def coded_gradient_sum(x: Tensor, group: dist.ProcessGroup, codec: Codec | None, ledger: Ledger, label: str) -> Tensor:
    """Before a column-parallel layer: nothing forward, the sum of gradients over `group` backward; collective there."""
    return _GradientSum.apply(x, group, codec, ledger, label)
