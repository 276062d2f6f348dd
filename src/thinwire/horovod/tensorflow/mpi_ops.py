"""Collectives on TensorFlow's tensors, as Horovod calls them: those of `thinwire.horovod.torch`, eager and in a `tf.function`.

Results, gradients and options (by keyword: op, compression, prescale_factor, postscale_factor, process_set) are as there.
A call without a name takes one: eager ones are counted, and those of a `tf.function` are called after their place in its graph.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import tensorflow as tf
import torch

import thinwire.horovod.torch.mpi_ops as on_torch
from thinwire.adapters.horovod.context import CONTEXT
from thinwire.adapters.tensorflow import on_host
from thinwire.horovod.torch.calls import Average, ProcessSet, Sum, check_differentiable, chosen_op, global_process_set, rows_for

Tensors = Sequence[Any]
__all__ = [
    "allgather", "allreduce", "alltoall", "broadcast", "grouped_allgather", "grouped_allreduce", "grouped_reducescatter",
    "reducescatter",
]  # fmt: skip


def grouped_allreduce(tensors: Tensors, average: bool | None = None, name: str | None = None, **options: Any) -> list[Any]:
    """Several tensors, which travel together, reduced over the ranks: means, unless `op` says otherwise."""
    name = _named("allreduce", name)

    def back(given: Tensors, found: Tensors, gradients: Tensors) -> list[Any]:
        check_differentiable(chosen_op(options.get("op"), average))
        return grouped_allreduce(gradients, average, name and f"{name}.gradient", **options)

    return _differentiable(partial(on_torch.grouped_allreduce, average=average, name=name, **options), tensors, back)


def allreduce(tensor: Any, average: bool | None = None, name: str | None = None, **options: Any) -> Any:
    """As `grouped_allreduce` of one tensor. Of IndexedSlices, all ranks' rows, without codes; Sum and Average only."""
    if not isinstance(tensor, tf.IndexedSlices):
        return grouped_allreduce([tensor], average, name, **options)[0]
    op, process_set = chosen_op(options.get("op"), average), options.get("process_set", global_process_set)
    if op not in (Average, Sum):
        raise NotImplementedError(f"{op.name} of IndexedSlices is not possible; make them dense, or take Average or Sum")
    rows, indices = grouped_allgather([tensor.values, tensor.indices], name, process_set)
    factor = options.get("prescale_factor", 1.0) * options.get("postscale_factor", 1.0)
    rows *= tf.cast(factor / (process_set.size() if op is Average else 1), rows.dtype)
    return tf.IndexedSlices(rows, indices, tensor.dense_shape)


def grouped_allgather(tensors: Tensors, name: str | None = None, process_set: ProcessSet = global_process_set) -> list[Any]:
    """As `allgather` of several tensors that travel together."""

    def back(given: Tensors, found: Tensors, gradients: Tensors) -> list[Any]:
        counts = tf.stack([tf.shape(one)[0] for one in given])
        before = tf.reduce_sum(allgather(counts[None], process_set=process_set)[: process_set.rank()], 0)
        means = grouped_allreduce(gradients, process_set=process_set)
        return [mean[before[number] :][: counts[number]] for number, mean in enumerate(means)]

    call = partial(on_torch.grouped_allgather, name=_named("allgather", name), process_set=process_set)
    return _differentiable(call, tensors, back, _any_rows)


def allgather(tensor: Any, name: str | None = None, **options: Any) -> Any:
    """The tensors of all ranks one behind another along the first dim, which may differ."""
    return grouped_allgather([tensor], name, **options)[0]


def broadcast(tensor: Any, root_rank: int, name: str | None = None, **options: Any) -> Any:
    """The tensor of rank `root_rank` (of all ranks, also in a process set)."""
    name = _named("broadcast", name)

    def back(given: Tensors, found: Tensors, gradients: Tensors) -> list[Any]:
        mean = allreduce(gradients[0], **options)
        return [mean if CONTEXT.rank() == root_rank else tf.zeros_like(mean)]

    return _differentiable(lambda it: [on_torch.broadcast(it[0], root_rank, name, **options)], [tensor], back)[0]


def alltoall(tensor: Any, splits: Any = None, name: str | None = None, process_set: ProcessSet = global_process_set) -> Any:
    """The first splits[0] rows go to rank 0, the next splits[1] to rank 1, ...; also returns how many came from each, if `splits`
    are given (int32), and without them all get as many."""
    name = _named("alltoall", name)

    def call(it: list[torch.Tensor]) -> list[torch.Tensor]:
        counts = rows_for(it[0], it[1] if len(it) > 1 else None, process_set)
        return list(on_torch.alltoall(it[0], torch.tensor(counts, dtype=torch.int32), name, process_set))

    def back(given: Tensors, found: Tensors, gradients: Tensors) -> list[Any]:
        returned = alltoall(gradients[0], found[1], process_set=process_set)[0]
        left = tf.zeros_like(given[0])[tf.shape(returned)[0] :]
        return [tf.concat([returned, left], 0), None][: len(given)]

    given = [tensor] if splits is None else [tensor, tf.convert_to_tensor(splits, tf.int32)]
    counts = tf.TensorSpec([process_set.size()], tf.int32)
    rows, received = _differentiable(call, given, back, lambda it: [*_any_rows(it[:1]), counts])
    return rows if splits is None else (rows, received)


def grouped_reducescatter(tensors: Tensors, name: str | None = None, **options: Any) -> list[Any]:
    """As `reducescatter` of several tensors that travel together."""
    op, process_set = chosen_op(options.get("op"), None), options.get("process_set", global_process_set)
    factor = options.get("prescale_factor", 1.0) * options.get("postscale_factor", 1.0) * (process_set.size() if op is Sum else 1)

    def back(given: Tensors, found: Tensors, gradients: Tensors) -> list[Any]:
        check_differentiable(op)
        return [one * tf.cast(factor, one.dtype) for one in grouped_allgather(gradients, process_set=process_set)]

    call = partial(on_torch.grouped_reducescatter, name=_named("reducescatter", name), **options)
    return _differentiable(call, tensors, back, _any_rows)


def reducescatter(tensor: Any, name: str | None = None, **options: Any) -> Any:
    """This rank's rows of the reduced tensor: n/p of its n rows, the first ranks one more if that is no whole number."""
    return grouped_reducescatter([tensor], name, **options)[0]


def _differentiable(
    call: Callable[[list[torch.Tensor]], Sequence[torch.Tensor]],
    tensors: Tensors,
    back: Callable[[Tensors, Tensors, Tensors], list[Any]],
    like: Callable[[Tensors], list[Any]] = list,
) -> list[Any]:
    """`call` of `tensors`; its results are `like` them. back: of those, results and their gradients, the gradients."""

    @tf.custom_gradient
    def run(*given: Any) -> Any:
        found = on_host(call, given, like(given))
        return found, lambda *gradients: back(given, found, gradients)

    return list(run(*map(tf.convert_to_tensor, tensors)))


def _named(kind: str, name: str | None) -> str | None:
    """After the place in the graph, which is the same on all ranks; eager calls are counted where they arrive."""
    if name or tf.executing_eagerly():
        return name
    graph = tf.compat.v1.get_default_graph()
    return f"{getattr(graph, 'name', 'graph')}/{graph.unique_name(kind)}"


def _any_rows(tensors: Tensors) -> list[Any]:
    return [tf.TensorSpec([None, *one.shape[1:]], one.dtype) for one in tensors]
