"""Collectives on tensors, as Horovod calls them. None of them works on MPI; the module bears the name that scripts import.

Those without `_async` wait for their result and are differentiable:

    allreduce        Sum: the sum of all ranks' gradients; Average: the mean
    allgather        the mean of all ranks' gradients, of this rank's rows
    broadcast        the mean of all ranks' gradients on the root; zeros elsewhere
    alltoall         each row's gradient comes back
    reducescatter    Sum: p times the gathered gradients; Average: the gathered gradients

A call with a name meets the calls of that name on the other ranks, in whatever order each rank makes them; calls without are
counted. Ranks that differ in what they ask for all get a HorovodInternalError that names the tensor and the ranks.
"""

from collections.abc import Callable, Sequence
from functools import partial
from operator import itemgetter
from typing import Any, cast

import torch

from thinwire.adapters.horovod.context import CONTEXT
from thinwire.adapters.horovod.engine import Handle
from thinwire.adapters.horovod.members import ProcessSet
from thinwire.adapters.horovod.request import HorovodInternalError, Request
from thinwire.horovod.torch.calls import (
    Adasum,
    Average,
    Max,
    Min,
    Product,
    ReduceOp,
    Sum,
    asked,
    check_differentiable,
    chosen_op,
    global_process_set,
    no_scalars,
    only,
    reduced,
    rows_for,
    with_gradient,
)
from thinwire.horovod.torch.compression import Code, Compression

Tensor = torch.Tensor

__all__ = [
    "Adasum", "Average", "HorovodInternalError", "Max", "Min", "ProcessSet", "Product", "ReduceOp", "Sum", "allgather",
    "allgather_async", "allreduce", "allreduce_", "allreduce_async", "allreduce_async_", "alltoall", "alltoall_async",
    "barrier", "broadcast", "broadcast_", "broadcast_async", "broadcast_async_", "global_process_set", "grouped_allgather",
    "grouped_allgather_async", "grouped_allreduce", "grouped_allreduce_", "grouped_allreduce_async", "grouped_allreduce_async_",
    "grouped_reducescatter", "grouped_reducescatter_async", "join", "poll", "reducescatter", "reducescatter_async",
    "sparse_allreduce_async", "synchronize",
]  # fmt: skip


def synchronize(handle: Handle) -> Any:
    """Wait for an asynchronous call; its result. HorovodInternalError where it has failed."""
    return handle.value()


def poll(handle: Handle) -> bool:
    """Whether `synchronize` would not wait."""
    return handle.done()


def barrier(process_set: ProcessSet = global_process_set) -> None:
    """Wait until all ranks of the set have come."""
    asked("barrier", [], None, process_set).value()


def join(device: int = -1) -> int:
    """Wait until all ranks have joined; meanwhile stand in for others' allreduces with zeros. The rank that came last (-1 if this
    is the only one). device: has no effect."""
    handle = CONTEXT.engine.submit(Request(kind="join", name="join"))
    handle.value()
    CONTEXT.engine.names.clear()  # a rank that has joined has counted fewer calls
    return handle.result if CONTEXT.size() > 1 else -1


def grouped_allreduce_async(  # noqa: PLR0913 - Horovod's
    tensors: Sequence[Tensor],
    average: bool | None = None,
    name: str | None = None,
    op: ReduceOp | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
    *,
    in_place: bool = False,
) -> Handle:
    """Begin to reduce several tensors, which travel together, over the ranks; `synchronize` gives a list of new ones."""
    scales = prescale_factor, postscale_factor
    return reduced(tensors, chosen_op(op, average), name, scales, process_set, in_place=in_place)


def grouped_allreduce_async_(tensors: Sequence[Tensor], *args: Any, **kwargs: Any) -> Handle:
    """As `grouped_allreduce_async`, in place."""
    return grouped_allreduce_async(tensors, *args, **kwargs, in_place=True)


def allreduce_async(tensor: Tensor, *args: Any, **kwargs: Any) -> Handle:
    """As `grouped_allreduce_async` of one tensor; `synchronize` gives a new one."""
    return only(grouped_allreduce_async([tensor], *args, **kwargs))


def allreduce_async_(tensor: Tensor, *args: Any, **kwargs: Any) -> Handle:
    """As `allreduce_async`, in place."""
    return only(grouped_allreduce_async_([tensor], *args, **kwargs))


def grouped_allreduce(  # noqa: PLR0913 - Horovod's
    tensors: Sequence[Tensor],
    average: bool | None = None,
    name: str | None = None,
    compression: Any = Compression.none,
    op: ReduceOp | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> list[Tensor]:
    """Several tensors, which travel together, reduced over the ranks: means, unless `op` says otherwise. New; differentiable."""
    return all_reduced(tensors, chosen_op(op, average), name, compression, (prescale_factor, postscale_factor), process_set)


def allreduce(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """As `grouped_allreduce` of one tensor."""
    return grouped_allreduce([tensor], *args, **kwargs)[0]


def grouped_allreduce_(tensors: Sequence[Tensor], *args: Any, **kwargs: Any) -> list[Tensor]:
    """As `grouped_allreduce_async_`, and waits. Not differentiable."""
    return list(grouped_allreduce_async_(tensors, *args, **kwargs).value())


def allreduce_(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """As `allreduce_async_`, and waits. Not differentiable."""
    return cast(Tensor, allreduce_async_(tensor, *args, **kwargs).value())


def sparse_allreduce_async(
    tensor: Tensor, name: str | None, op: ReduceOp, process_set: ProcessSet = global_process_set
) -> Callable[[], Tensor]:
    """Begin to reduce a sparse COO tensor, with Sum or Average; call what is returned for the result, coalesced."""
    if op not in (Average, Sum):
        raise ValueError(f"sparse_allreduce_async: {op} is not possible; there are Average and Sum")
    return only(asked("sparse_allreduce", [tensor], name, process_set, op=op.value)).value


def allgather_async(tensor: Tensor, name: str | None = None, process_set: ProcessSet = global_process_set) -> Handle:
    """Begin to gather; see `allgather`."""
    return only(grouped_allgather_async([tensor], name, process_set))


def allgather(tensor: Tensor, name: str | None = None, process_set: ProcessSet = global_process_set) -> Tensor:
    """The tensors of all ranks one behind another along the first dim, which may differ. Differentiable."""
    return grouped_allgather([tensor], name, process_set)[0]


def grouped_allgather_async(
    tensors: Sequence[Tensor], name: str | None = None, process_set: ProcessSet = global_process_set
) -> Handle:
    """As `allgather_async` of several tensors that travel together; a list."""
    no_scalars("allgather", tensors)
    return asked("allgather", tensors, name, process_set)


def grouped_allgather(
    tensors: Sequence[Tensor], name: str | None = None, process_set: ProcessSet = global_process_set
) -> list[Tensor]:
    """As `allgather` of several tensors that travel together."""
    gathered = grouped_allgather_async(tensors, name, process_set).value()

    def back(rows: int, gradient: Tensor) -> Tensor:
        mean = allreduce(gradient, op=Average, process_set=process_set)
        before = allgather(torch.tensor([rows]), process_set=process_set)[: process_set.rank()]
        return mean[int(before.sum()) :][:rows]

    return [with_gradient(one, new, partial(back, len(one))) for one, new in zip(tensors, gathered, strict=True)]


def broadcast_async(
    tensor: Tensor,
    root_rank: int,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
    *,
    in_place: bool = False,
) -> Handle:
    """Begin to broadcast; `synchronize` gives a new tensor."""
    if process_set.included() and root_rank not in (process_set.ranks or []):
        raise ValueError(f"broadcast: rank {root_rank} is not in {process_set}")
    return only(asked("broadcast", [tensor], name, process_set, in_place=in_place, root=root_rank))


def broadcast(tensor: Tensor, root_rank: int, name: str | None = None, process_set: ProcessSet = global_process_set) -> Tensor:
    """The tensor of rank `root_rank` (of all ranks, also in a process set). A new one; differentiable."""
    sent = broadcast_async(tensor, root_rank, name, process_set).value()

    def back(gradient: Tensor) -> Tensor:
        mean = allreduce(gradient, op=Average, process_set=process_set)
        return mean if CONTEXT.rank() == root_rank else torch.zeros_like(mean)

    return with_gradient(tensor, sent, back)


def broadcast_async_(tensor: Tensor, *args: Any, **kwargs: Any) -> Handle:
    """As `broadcast_async`, in place."""
    return broadcast_async(tensor, *args, **kwargs, in_place=True)


def broadcast_(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """As `broadcast`, in place, and not differentiable."""
    return cast(Tensor, broadcast_async_(tensor, *args, **kwargs).value())


def alltoall_async(
    tensor: Tensor,
    splits: Tensor | Sequence[int] | None = None,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> Handle:
    """Begin to exchange rows; see `alltoall`."""
    handle = asked("alltoall", [tensor], name, process_set, splits=rows_for(tensor, splits, process_set))
    device = splits.device if isinstance(splits, Tensor) else torch.device("cpu")
    handle.finish = itemgetter(0) if splits is None else lambda found: (found[0], found[1].to(device))
    return handle


def alltoall(
    tensor: Tensor,
    splits: Tensor | Sequence[int] | None = None,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> Any:
    """The first splits[0] rows go to rank 0, the next splits[1] to rank 1, ... Differentiable.

    The rows received, in the order of ranks; and, if `splits` were given, how many came from each, int32. Without splits all get
    as many. ValueError for splits that are no int32, or want more rows than there are.
    """
    counts = rows_for(tensor, splits, process_set)
    rows, received = alltoall_async(tensor, counts, name, process_set).value()

    def back(gradient: Tensor) -> Tensor:
        returned, _ = alltoall(gradient, received, process_set=process_set)
        return torch.cat([returned, returned.new_zeros(len(tensor) - len(returned), *tensor.shape[1:])])

    result = with_gradient(tensor, rows, back)
    return result if splits is None else (result, received.to(splits.device) if isinstance(splits, Tensor) else received)


def reducescatter_async(tensor: Tensor, *args: Any, **kwargs: Any) -> Handle:
    """As `grouped_reducescatter_async` of one tensor."""
    return only(grouped_reducescatter_async([tensor], *args, **kwargs))


def reducescatter(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """This rank's rows of the reduced tensor: n/p of its n rows, the first ranks one more if that is no whole number.
    Differentiable. Arguments as of `grouped_reducescatter`."""
    return grouped_reducescatter([tensor], *args, **kwargs)[0]


def grouped_reducescatter_async(
    tensors: Sequence[Tensor],
    name: str | None = None,
    op: ReduceOp = Average,
    process_set: ProcessSet = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> Handle:
    """Begin to reduce and scatter several tensors that travel together; a list."""
    if op is Adasum:
        raise NotImplementedError("reducescatter: Adasum is not possible; there are Average, Sum, Min, Max and Product")
    no_scalars("reducescatter", tensors)
    fields: dict[str, Any] = {"prescale": prescale_factor, "postscale": postscale_factor, "op": chosen_op(op, None).value}
    return asked("reducescatter", tensors, name, process_set, **fields)


def grouped_reducescatter(
    tensors: Sequence[Tensor],
    name: str | None = None,
    compression: Any = Compression.none,
    op: ReduceOp = Average,
    process_set: ProcessSet = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> list[Tensor]:
    """As `reducescatter` of several tensors that travel together."""
    if isinstance(compression, Code):
        raise ValueError("reducescatter: codes are not possible; there are Compression.none, fp16 and bf16")
    small, contexts = zip(*map(compression.compress, _detached(tensors)), strict=True)
    found = grouped_reducescatter_async(small, name, op, process_set, prescale_factor, postscale_factor).value()
    factor = prescale_factor * postscale_factor * (process_set.size() if op is Sum else 1)

    def back(gradient: Tensor) -> Tensor:
        check_differentiable(op)
        return allgather(gradient, process_set=process_set) * factor

    given = zip(tensors, found, contexts, strict=True)
    return [with_gradient(tensor, compression.decompress(new, context), back) for tensor, new, context in given]


def all_reduced(
    tensors: Sequence[Tensor],
    op: ReduceOp,
    name: str | None,
    compression: Any,
    scales: tuple[float, float],
    process_set: ProcessSet,
    names: Sequence[str] = (),
) -> list[Tensor]:
    """As `grouped_allreduce`, with (prescale, postscale). names: of each, if they are all that `name` reduces in a step."""
    given = _detached(tensors)
    if isinstance(compression, Code):
        owner = name if name and names else ""
        found = reduced(given, op, name, scales, process_set, coding=compression.coding, owner=owner, names=names).value()
    else:
        small, contexts = zip(*map(compression.compress, given), strict=True)
        arrived = reduced(small, op, name, scales, process_set, names=names).value()
        found = [compression.decompress(new, context) for new, context in zip(arrived, contexts, strict=True)]

    def back(gradient: Tensor) -> Tensor:
        check_differentiable(op)
        return all_reduced([gradient], op, name and f"{name}.gradient", compression, scales, process_set)[0]

    return [with_gradient(tensor, new, back) for tensor, new in zip(tensors, found, strict=True)]


def _detached(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.detach() for tensor in tensors]
