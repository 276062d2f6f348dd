"""An announcement, run on tensors of the CPU by one thread of each rank, over a metered group.

    allreduce        flat vectors of each dtype, summed (min, max, product) as they are; Average divides by the number of ranks
    allgather        each rank's bytes, filled up to the longest, and cut again
    broadcast        the root's bytes
    alltoall         each rank's rows for each other one, no more
    reducescatter    rank i gets rows of its own: n/p, and one more if i < n mod p; filled up to equal parts for the wire

prescale_factor multiplies before, postscale_factor after: integers in float64 and cut towards zero, float16 and bfloat16 in
float32. int16 and bool are added up as int32.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch.nn.functional import pad

from thinwire.adapters.horovod.adasum import adasum
from thinwire.adapters.horovod.controller import Part
from thinwire.adapters.horovod.request import Request
from thinwire.collectives.backend import ALL_GATHER, REDUCE_SCATTER
from thinwire.collectives.ledger import Ledger
from thinwire.compress.sparse import average_sparse

Tensors = list[torch.Tensor]
REDUCTIONS = {
    "sum": dist.ReduceOp.SUM,
    "average": dist.ReduceOp.SUM,
    "min": dist.ReduceOp.MIN,
    "max": dist.ReduceOp.MAX,
    "product": dist.ReduceOp.PRODUCT,
}
NARROW = (torch.float16, torch.bfloat16)
ADDED_AS = {torch.int16: torch.int32, torch.bool: torch.int32}


def run(parts: Sequence[Part], given: Sequence[Tensors], group: dist.ProcessGroup, ledger: Ledger) -> list[Tensors]:
    """Results for each part: as many tensors as were given, new ones. Collective over `group`, and waits."""
    kind = parts[0].request.kind
    with ledger.label(kind):
        if kind == "allreduce":
            return _all_reduced(parts, given, group, ledger)
        if kind == "broadcast":
            return _broadcast(parts, given, group)
        if kind == "allgather":
            return _gathered(parts, given, group)
        if kind == "reducescatter":
            return _scattered(parts, given, group)
        if kind == "alltoall":
            return [_exchanged(parts[0], given[0][0], group)]
        if kind == "sparse_allreduce":
            mean = average_sparse(given[0][0], group, ledger, kind)
            return [[mean * group.size() if parts[0].request.op == "sum" else mean]]
        return [[] for _ in parts]  # a barrier: that all have asked is all of it


def empty_of(request: Request) -> Tensors:
    """What a rank that has joined gives in place of its own: zeros."""
    return [torch.zeros(shape, dtype=getattr(torch, dtype)) for dtype, shape in request.tensors]


def rows_of(rows: int, ranks: int) -> list[int]:
    """How many of `rows` each of `ranks` gets."""
    return [rows // ranks + (rank < rows % ranks) for rank in range(ranks)]


def _all_reduced(parts: Sequence[Part], given: Sequence[Tensors], group: dist.ProcessGroup, ledger: Ledger) -> list[Tensors]:
    request = parts[0].request
    every = [tensor for tensors in given for tensor in tensors]
    done: dict[int, torch.Tensor] = {}
    for dtype in dict.fromkeys(tensor.dtype for tensor in every):
        alike = [number for number, tensor in enumerate(every) if tensor.dtype == dtype]
        flat = torch.cat([every[number].reshape(-1) for number in alike]).to(ADDED_AS.get(dtype, dtype))
        sizes = [every[number].numel() for number in alike]
        flat = _scaled(flat, request.prescale)
        if request.op == "adasum":
            flat = adasum(flat, sizes, group, ledger)
        elif flat.numel():
            dist.all_reduce(flat, REDUCTIONS[request.op], group=group)
        flat = _finished(flat, request, group.size()).to(dtype)
        done |= {number: piece.view(every[number].shape) for number, piece in zip(alike, flat.split(sizes), strict=True)}
    return _in_parts([done[number] for number in range(len(every))], given)


def _scaled(values: torch.Tensor, factor: float) -> torch.Tensor:
    if factor == 1.0:
        return values
    if values.is_floating_point() or values.is_complex():
        return (values.float() if values.dtype in NARROW else values).mul(factor).to(values.dtype)
    return values.double().mul(factor).to(values.dtype)


def _finished(values: torch.Tensor, request: Request, ranks: int) -> torch.Tensor:
    """The mean, where one is asked for, and postscale_factor."""
    if request.op != "average":
        return _scaled(values, request.postscale)
    if values.is_floating_point() or values.is_complex():
        return _scaled(values.div_(ranks), request.postscale)
    if request.postscale == 1.0:
        return values.div_(ranks, rounding_mode="trunc")
    return _scaled(values, request.postscale / ranks)


def _broadcast(parts: Sequence[Part], given: Sequence[Tensors], group: dist.ProcessGroup) -> list[Tensors]:
    every = [tensor for tensors in given for tensor in tensors]
    packed = _packed(every)
    if packed.numel():
        dist.broadcast(packed, src=parts[0].request.root, group=group)
    return _in_parts(_unpacked(packed, [(tensor.dtype, tensor.shape) for tensor in every]), given)


def _gathered(parts: Sequence[Part], given: Sequence[Tensors], group: dist.ProcessGroup) -> list[Tensors]:
    """In each rank's bytes, one tensor after the other."""
    every = [tensor for tensors in given for tensor in tensors]
    shapes = [
        [
            (tensor.dtype, (rows, *tensor.shape[1:]))
            for part, tensors in zip(parts, given, strict=True)
            for rows, tensor in zip(part.first_dims[rank], tensors, strict=True)
        ]
        for rank in range(group.size())
    ]
    sizes = [sum(torch.Size(shape).numel() * dtype.itemsize for dtype, shape in own) for own in shapes]
    own = _packed(every)
    received = own.new_empty(group.size(), max(sizes))
    if max(sizes):
        ALL_GATHER(received.view(-1), pad(own, (0, max(sizes) - own.numel())), group=group)
    by_rank = [_unpacked(row[:size], own) for row, size, own in zip(received, sizes, shapes, strict=True)]
    return _in_parts([torch.cat(pieces) for pieces in zip(*by_rank, strict=True)], given)


def _scattered(parts: Sequence[Part], given: Sequence[Tensors], group: dist.ProcessGroup) -> list[Tensors]:
    p, rank, request = group.size(), group.rank(), parts[0].request
    every = [tensor for tensors in given for tensor in tensors]
    done: dict[int, torch.Tensor] = {}
    for dtype in dict.fromkeys(tensor.dtype for tensor in every):
        alike = [number for number, tensor in enumerate(every) if tensor.dtype == dtype]
        wire = ADDED_AS.get(dtype, dtype)
        cut = [every[number].split(rows_of(len(every[number]), p)) for number in alike]
        for_rank = [torch.cat([pieces[at].reshape(-1) for pieces in cut]).to(wire) for at in range(p)]
        longest = max(map(len, for_rank))
        flat = _scaled(torch.cat([pad(own, (0, longest - len(own))) for own in for_rank]), request.prescale)
        own = flat.new_empty(longest)
        if longest:
            REDUCE_SCATTER(own, flat, REDUCTIONS[request.op], group=group)
        mine = [pieces[rank] for pieces in cut]
        own = _finished(own, request, p).to(dtype)[: len(for_rank[rank])]
        split = own.split([piece.numel() for piece in mine])
        done |= {number: new.view(old.shape) for number, new, old in zip(alike, split, mine, strict=True)}
    return _in_parts([done[number] for number in range(len(every))], given)


def _exchanged(part: Part, tensor: torch.Tensor, group: dist.ProcessGroup) -> Tensors:
    """The rows, and how many came from each rank."""
    own, rank = part.splits[group.rank()], group.rank()
    received = [splits[rank] for splits in part.splits]
    row = tensor.shape[1:].numel() * tensor.dtype.itemsize
    sent = _packed([tensor[: sum(own)]])
    got = sent.new_empty(sum(received) * row)
    even = len({count for splits in part.splits for count in splits}) == 1
    to = None if even else [count * row for count in own]
    of = None if even else [count * row for count in received]
    dist.all_to_all_single(got, sent, output_split_sizes=of, input_split_sizes=to, group=group)
    (rows,) = _unpacked(got, [(tensor.dtype, (sum(received), *tensor.shape[1:]))])
    return [rows, torch.tensor(received, dtype=torch.int32)]


def _packed(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Their bytes, one after the other, a new flat vector."""
    return torch.cat([tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in tensors])


def _unpacked(packed: torch.Tensor, shapes: Sequence[tuple[torch.dtype, Sequence[int]]]) -> Tensors:
    sizes = [torch.Size(shape).numel() * dtype.itemsize for dtype, shape in shapes]
    pieces = zip(packed.split(sizes), shapes, strict=True)
    return [piece.clone().view(dtype).view(tuple(shape)) for piece, (dtype, shape) in pieces]


def _in_parts(flat: Tensors, given: Sequence[Tensors]) -> list[Tensors]:
    found, first = [], 0
    for tensors in given:
        found.append(flat[first : first + len(tensors)])
        first += len(tensors)
    return found
