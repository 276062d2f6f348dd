"""How a call on tensors becomes a request of this rank, and its result part of an autograd graph."""

import warnings
from collections.abc import Callable, Sequence
from enum import Enum
from operator import itemgetter
from typing import Any

import torch

from thinwire.adapters.horovod.adasum import power_of_two
from thinwire.adapters.horovod.context import CONTEXT
from thinwire.adapters.horovod.engine import Handle
from thinwire.adapters.horovod.members import ProcessSet
from thinwire.adapters.horovod.request import Request

Tensor = torch.Tensor


class ReduceOp(Enum):
    """How an allreduce brings values together."""

    Average = "average"
    Sum = "sum"
    Adasum = "adasum"
    Min = "min"
    Max = "max"
    Product = "product"


Average, Sum, Adasum = ReduceOp.Average, ReduceOp.Sum, ReduceOp.Adasum
Min, Max, Product = ReduceOp.Min, ReduceOp.Max, ReduceOp.Product
global_process_set = CONTEXT.everyone


def reduced(  # noqa: PLR0913 - what is asked for, how it is coded, and where the result goes
    tensors: Sequence[Tensor],
    op: ReduceOp,
    name: str | None,
    scales: tuple[float, float],
    process_set: ProcessSet,
    *,
    in_place: bool = False,
    coding: str = "",
    owner: str = "",
    names: Sequence[str] = (),
) -> Handle:
    """Begin an allreduce of tensors that travel together; a list. coding: of a `Code`, whose residuals are `owner`'s.

    names: of each tensor; then they are all that `owner` has in a step."""
    floating = all(tensor.is_floating_point() for tensor in tensors)
    if op is Adasum and not power_of_two(process_set.size()):
        raise NotImplementedError(f"Adasum of {process_set.size()} ranks is not possible; their number is to be a power of two")
    if op is Adasum and not floating:
        raise ValueError("Adasum takes tensors of floating dtypes")
    fields: dict[str, Any] = {"op": op.value, "prescale": scales[0], "postscale": scales[1], "names": tuple(names)}
    if coding and floating:
        if op not in (Average, Sum) or process_set.process_set_id:
            raise ValueError("codes average or sum over all ranks; leave out compression=, or op= and process_set=")
        if not name:
            raise ValueError("a code keeps what it has left out by the tensor's name; give name=")
        fields |= {"coding": coding, "owner": owner, "last": bool(names) or not owner}
    return asked("allreduce", tensors, name, process_set, in_place=in_place, **fields)


def asked(
    kind: str,
    tensors: Sequence[Tensor],
    name: str | None,
    process_set: ProcessSet,
    *,
    in_place: bool = False,
    **fields: Any,
) -> Handle:
    """Ask for it. ValueError for a process set that this rank is not in, and where Horovod has not been initialised."""
    engine = CONTEXT.engine
    if not process_set.included():
        raise ValueError(f"{kind}: rank {engine.rank} is not in {process_set}")
    members = process_set.process_set_id or 0
    described = tuple((str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)) for tensor in tensors)
    name = name or engine.unnamed(kind, members)
    return engine.submit(Request(kind=kind, name=name, members=members, tensors=described, **fields), tensors, in_place)


def only(handle: Handle) -> Handle:
    """A handle of one tensor, which its value is."""
    handle.finish = itemgetter(0)
    return handle


def chosen_op(op: ReduceOp | None, average: bool | None) -> ReduceOp:
    """Average unless another is asked for. ValueError for both forms at once, and for what is no ReduceOp."""
    if average is not None:
        if op is not None:
            raise ValueError("average= is the old form of op=; give only op=")
        warnings.warn("average= is the old form of op=hvd.Average or op=hvd.Sum", DeprecationWarning, stacklevel=3)
        return Average if average else Sum
    if op is not None and not isinstance(op, ReduceOp):
        raise ValueError(f"op = {op!r}; there are {', '.join(one.name for one in ReduceOp)}")
    return op or Average


def rows_for(tensor: Tensor, splits: Tensor | Sequence[int] | None, process_set: ProcessSet) -> tuple[int, ...]:
    """How many rows of `tensor` an alltoall sends to each rank. ValueError for splits that do not fit."""
    ranks = process_set.size()
    no_scalars("alltoall", [tensor])
    rows = len(tensor)
    if splits is None:
        if rows % ranks:
            raise ValueError(f"alltoall: {rows} rows cannot be split evenly over {ranks} ranks; give splits=")
        return (rows // ranks,) * ranks
    if isinstance(splits, Tensor) and splits.dtype != torch.int32:
        raise ValueError(f"alltoall: splits are of {splits.dtype}; they are to be of torch.int32")
    counts = tuple(int(count) for count in splits)
    if len(counts) != ranks or min(counts) < 0 or sum(counts) > rows:
        raise ValueError(f"alltoall: splits {list(counts)} do not share out {rows} rows to {ranks} ranks")
    return counts


def no_scalars(kind: str, tensors: Sequence[Tensor]) -> None:
    """ValueError for a tensor without dims."""
    if any(tensor.dim() == 0 for tensor in tensors):
        raise ValueError(f"{kind}: a tensor without dims has no rows; give it one, as in tensor.view(1)")


def check_differentiable(op: ReduceOp) -> None:
    """NotImplementedError for an op without a gradient."""
    if op not in (Average, Sum):
        raise NotImplementedError(f"{op.name} has no gradient here; Average and Sum have")


def with_gradient(tensor: Tensor, new: Tensor, back: Callable[[Tensor], Tensor]) -> Tensor:
    """`new`, made of `tensor`; `back` turns its gradient into that of `tensor`."""
    if not (tensor.requires_grad and torch.is_grad_enabled()):
        return new
    result: Tensor = _Result.apply(tensor, lambda: new, back)
    return result


class _Result(torch.autograd.Function):
    """A result that is there already, and how its gradient becomes that of what it was made of."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, made: Callable[[], Tensor], back: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.back = back
        return made()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return ctx.back(gradients[0]), None, None
