"""Sparse gradients (COO: rows of an embedding, say) averaged exactly: each rank gets the rows of all, and adds them up.

    n_i     rows that rank i has                             all-gather, 8 bytes
    rows    their places and values, filled up to max n_i    all-gather of bytes
    result  1/p sum over i, in the order of ranks, in float32 or float64, at the places that any rank has

A rank sends (p-1) times its padded rows, so this pays while the ranks' rows are few beside the whole. How many they are depends
on the batch: nothing is predicted before it is drawn, and then `rows_bytes` says it to the byte.
"""

from math import prod

import torch
import torch.distributed as dist
from torch.nn.functional import pad

from thinwire.collectives.ledger import Ledger
from thinwire.collectives.metered_calls import all_gather
from thinwire.compress.precision import widened

COUNT_BYTES = 8


def rows_bytes(ranks: int, rows: int, gradient_shape: torch.Size, itemsize: int = 4) -> int:
    """What each of `ranks` sends to average a matrix [number, ...] of which the rank with most has `rows` rows."""
    index_bytes = _index_dtype(gradient_shape[:1]).itemsize
    return (ranks - 1) * (COUNT_BYTES + rows * (index_bytes + gradient_shape[1:].numel() * itemsize))


def _index_dtype(whole: torch.Size) -> torch.dtype:
    """Of places in so many."""
    return torch.int32 if max(whole) < 2**31 else torch.int64


def average_sparse(gradient: torch.Tensor, group: dist.ProcessGroup, ledger: Ledger, label: str) -> torch.Tensor:
    """[...] sparse COO -> the mean over the ranks of `group`, coalesced, bit-equal on all of them. Collective, and waits."""
    p, gradient = group.size(), gradient.coalesce()
    count = torch.tensor([gradient._nnz()], device=gradient.device)
    counts = count.new_empty(p)
    all_gather(counts, count, group, ledger, f"{label} counts").wait()
    rows, whole = int(counts.max()), gradient.shape[: gradient.sparse_dim()]
    indices = gradient.indices().to(_index_dtype(whole))
    values = gradient.values().reshape(gradient._nnz(), -1)
    width = values.shape[1]
    packed = torch.cat([pad(part, (0, 0, 0, rows - len(part))).reshape(-1).view(torch.uint8) for part in (indices.t(), values)])
    received = packed.new_empty(p, packed.numel())
    all_gather(received.view(-1), packed, group, ledger, f"{label} rows").wait()

    border = rows * indices.shape[0] * indices.element_size()
    places, parts = [], []
    for row, size in zip(received, counts.tolist(), strict=True):
        places.append(row[:border].clone().view(indices.dtype).view(rows, -1)[:size].long())
        parts.append(widened(row[border:].clone().view(values.dtype).view(rows, width)[:size]))
    strides = torch.tensor([prod(whole[number + 1 :]) for number in range(len(whole))], device=gradient.device)
    flat, where = torch.unique((torch.cat(places) * strides).sum(1), return_inverse=True)
    total = parts[0].new_zeros(len(flat), width)
    for part, own in zip(parts, where.split(counts.tolist()), strict=True):
        total.index_add_(0, own, part)  # no place twice: the order of additions is that of the ranks on every device
    mean = (total / p).to(values.dtype).view(-1, *gradient.shape[len(whole) :])
    found = torch.stack(torch.unravel_index(flat, whole)) if len(flat) else flat.new_zeros(len(whole), 0)
    return torch.sparse_coo_tensor(found, mean, gradient.shape, is_coalesced=True, check_invariants=False)
