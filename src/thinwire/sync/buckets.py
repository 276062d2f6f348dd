"""Buckets of DistributedDataParallel: which parameters they hold, and how they are handed to an exchange.

Gradients go out in buckets while the backward pass goes on (Li et al. 2020, PyTorch Distributed, VLDB, section 4.2): parameters
are taken in reverse order of registration, and a bucket is closed when it holds `bucket_bytes` or more.

A bucket is a flat vector of real numbers of one dtype: of a complex parameter [..] it holds pairs, as `torch.view_as_real` gives
them. The pieces of a bucket cover it without a gap, whatever is in it; what they would not cover, nobody would average. A sparse
gradient is a bucket of its own.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist

from thinwire.compress.averager import Piece
from thinwire.compress.exchange import Exchange, at_end_of_backward
from thinwire.errors import UserError
from thinwire.workload import Parameter, plain_name

Sent = TypeVar("Sent", bound=Parameter)
PYTORCH_BUCKETS = (2**20, 25 * 2**20)
"""Sizes of the first and of the other buckets where none is asked for."""


def assign_buckets(parameters: Sequence[Sent], bucket_bytes: int) -> list[list[Sent]]:
    """The buckets in the order in which they are sent, as DistributedDataParallel forms them. 0: its own sizes.

    Each dtype has buckets of its own, and a first one among them. Those that are not full are sent last; of several such
    DistributedDataParallel leaves the order open.
    """
    sizes = (bucket_bytes, bucket_bytes) if bucket_bytes else PYTORCH_BUCKETS
    full: list[list[Sent]] = []
    open_: dict[str, list[Sent]] = {}
    held_bytes, closed = Counter[str](), Counter[str]()
    for parameter in reversed(parameters):
        dtype = parameter.dtype
        open_.setdefault(dtype, []).append(parameter)
        held_bytes[dtype] += parameter.stored_bytes
        if held_bytes[dtype] >= sizes[min(closed[dtype], 1)]:
            full.append(open_.pop(dtype))
            held_bytes[dtype] = 0
            closed[dtype] += 1
    return [*full, *open_.values()]


def real_shape(parameter: torch.Tensor) -> tuple[int, ...]:
    """Of the real numbers that a bucket holds for `parameter`; a complex vector stays a vector, of twice the length."""
    if not parameter.is_complex():
        return tuple(parameter.shape)
    return (*parameter.shape, 2) if parameter.dim() >= 2 else (2 * parameter.numel(),)


def described(model: torch.nn.Module) -> list[Parameter]:
    """The parameters of `model` that are trained, as buckets have them."""
    return [
        Parameter(name, real_shape(one), dtype=str(torch.view_as_real(one).dtype if one.is_complex() else one.dtype)[6:])
        for name, one in model.named_parameters()
        if one.requires_grad
    ]


def filled(bucket: Sequence[Parameter], model: torch.nn.Module) -> tuple[torch.Tensor, list[Piece]]:
    """A buffer, and whose gradient lies where in it; from now on the parameters' gradients are views of it."""
    trained = dict(model.named_parameters())
    first_one = trained[bucket[0].name]
    dtype = getattr(torch, bucket[0].dtype)
    buffer = torch.zeros(sum(one.numel for one in bucket), dtype=dtype, device=first_one.device)
    pieces, first = [], 0
    for one in bucket:
        pieces.append(Piece(one.name, first, one.shape))
        part = buffer[first : first + one.numel].view(one.shape)
        parameter = trained[one.name]
        parameter.grad = torch.view_as_complex(part.view(*parameter.shape, 2)) if parameter.is_complex() else part
        first += one.numel
    return buffer, pieces


class Names:
    """Of the parameters of `model` that are trained, by the objects that DistributedDataParallel hands over."""

    def __init__(self, model: torch.nn.Module) -> None:
        trained = [(plain_name(name), one) for name, one in model.named_parameters() if one.requires_grad]
        self._names = {id(parameter): name for name, parameter in trained}
        self.trained: dict[str, torch.Tensor] = dict(trained)
        """By name."""
        self.shapes = {name: real_shape(parameter) for name, parameter in trained}
        """By name, as they come in buckets."""
        self.device = trained[0][1].device if trained else torch.device("cpu")
        """Of the first; DistributedDataParallel takes models on one device."""

    def of(self, parameter: torch.Tensor) -> str:
        """UserError for one that the model did not have."""
        if id(parameter) not in self._names:
            raise UserError(
                f"a bucket holds a parameter of shape {tuple(parameter.shape)} that the model did not have when its hook was "
                "registered; wrap it in DistributedDataParallel again after changing it"
            )
        return self._names[id(parameter)]


def exchange_bucket(
    exchange: Exchange, names: Names, bucket: dist.GradBucket, used: Mapping[str, bool] | None = None
) -> "torch.futures.Future[torch.Tensor]":
    """Hand a full bucket to `exchange`; what a communication hook returns. UserError for a bucket that it cannot average.

    An error of the exchange ends the backward pass, as it is, when all buckets are over: what a future holds would reach the
    caller as an object that is no tensor.

    used: by name, whether this rank's backward pass has reached the parameter, if use is tracked.
    """
    pieces, first, buffer = [], 0, bucket.buffer()
    if buffer.layout == torch.sparse_coo:
        name = names.of(bucket.parameters()[0])
        future = exchange.start_sparse(buffer, name, f"bucket {bucket.index()}", last=bucket.is_last())
        return _handed_over(exchange, future, bucket)
    for parameter in bucket.parameters():
        pieces.append(Piece(names.of(parameter), first, real_shape(parameter)))
        first += pieces[-1].numel
    if first != buffer.numel():
        raise UserError(
            f"a bucket of {buffer.numel()} values ({buffer.layout}) belongs to parameters of {first} values, first "
            f"{pieces[0].name}: what of it is whose is not known; train without this hook"
        )
    future = exchange.start(buffer, pieces, f"bucket {bucket.index()}", last=bucket.is_last(), used=used)
    return _handed_over(exchange, future, bucket)


def _handed_over(
    exchange: Exchange, future: "torch.futures.Future[torch.Tensor]", bucket: dist.GradBucket
) -> "torch.futures.Future[torch.Tensor]":
    """A future that always holds a tensor; the backward pass ends with `exchange.settle`."""
    if not exchange.settles:
        return future
    if (bucket.is_last() and not at_end_of_backward(exchange.settle)) or exchange.on_device:
        return future  # on a device it does; else no backward pass: a rank that is out of data stands in for itself (`join`)
    done: torch.futures.Future[torch.Tensor] = torch.futures.Future()

    def end(over: "torch.futures.Future[torch.Tensor]") -> None:
        try:
            done.set_result(over.value())
        except Exception:  # which `settle` raises
            done.set_result(bucket.buffer())

    future.add_done_callback(end)
    return done
