"""Buckets of DistributedDataParallel: which parameters they hold, and how they are handed to an exchange.

Gradients go out in buckets while the backward pass goes on (Li et al. 2020, PyTorch Distributed, VLDB, section 4.2): parameters
are taken in reverse order of registration, and a bucket is closed when it holds `bucket_bytes` or more.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist

from thinwire.compress.averager import Piece
from thinwire.compress.exchange import Exchange
from thinwire.compress.plain import GRADIENT_BYTES
from thinwire.workload import Parameter

PYTORCH_BUCKETS = (2**20, 25 * 2**20)
"""Sizes of the first and of the other buckets where none is asked for."""


def assign_buckets(parameters: Sequence[Parameter], bucket_bytes: int) -> list[list[Parameter]]:
    """The buckets in the order in which they are sent, as DistributedDataParallel forms them. 0: its own sizes."""
    first, others = (bucket_bytes, bucket_bytes) if bucket_bytes else PYTORCH_BUCKETS
    buckets: list[list[Parameter]] = [[]]
    size = 0
    for parameter in reversed(parameters):
        buckets[-1].append(parameter)
        size += parameter.numel * GRADIENT_BYTES
        if size >= (first if len(buckets) == 1 else others):
            buckets.append([])
            size = 0
    return [bucket for bucket in buckets if bucket]


def names_of(model: torch.nn.Module) -> dict[int, str]:
    """Names of the parameters by their id()."""
    return {id(parameter): name for name, parameter in model.named_parameters()}


def exchange_bucket(
    exchange: Exchange, names: Mapping[int, str], bucket: dist.GradBucket
) -> "torch.futures.Future[torch.Tensor]":
    """Hand a full bucket to `exchange`; what a communication hook returns."""
    pieces, first = [], 0
    for parameter in bucket.parameters():
        pieces.append(Piece(names[id(parameter)], first, tuple(parameter.shape)))
        first += pieces[-1].numel
    return exchange.start(bucket.buffer(), pieces, f"bucket {bucket.index()}", last=bucket.is_last())
