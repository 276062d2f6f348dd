"""Gradients of a tape or of an optimizer, and variables, the same on all ranks."""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from thinwire.adapters.tensorflow import on_host
from thinwire.horovod.gradients import Reduction, names_of
from thinwire.horovod.tensorflow.mpi_ops import allreduce
from thinwire.horovod.torch.calls import ProcessSet, global_process_set
from thinwire.horovod.torch.mpi_ops import broadcast_async


def DistributedGradientTape(gradtape: Any, **options: Any) -> Any:
    """`gradtape`, with `gradient` reduced over the ranks, which all call it. options: of `Reduction`, but its name."""
    made: Any = object.__new__(type(type(gradtape).__name__, (_Tape, type(gradtape)), {}))
    made.__dict__ = vars(gradtape) | {"_reduction": Reduction(**options)}
    return made


class _Tape:
    """Before the user's class of tapes."""

    _reduction: Reduction

    def gradient(self, target: Any, sources: Any, *args: Any, **kwargs: Any) -> Any:
        gradients = super().gradient(target, sources, *args, **kwargs)  # type: ignore[misc]
        found = reduced_gradients(self._reduction, tf.nest.flatten(sources), tf.nest.flatten(gradients))
        return tf.nest.pack_sequence_as(gradients, found)


def reduced_gradients(reduction: Reduction, variables: Sequence[Any], gradients: Sequence[Any]) -> list[Any]:
    """New ones. Collective. Of IndexedSlices all ranks' rows, without codes, unless they are to become dense."""
    names, sparse = names_of(variables), [isinstance(one, tf.IndexedSlices) for one in gradients]
    if reduction.sparse_as_dense:
        gradients = [tf.convert_to_tensor(one) if its else one for one, its in zip(gradients, sparse, strict=True)]
        sparse = [False] * len(sparse)
    dense = reduction.of(names, [None if its else one for one, its in zip(gradients, sparse, strict=True)], on_host)
    how: dict[str, Any] = {"op": reduction.op, "process_set": reduction.process_set}
    given = zip(gradients, dense, names, sparse, strict=True)
    return [allreduce(one, name=name, **how) if its else new for one, new, name, its in given]


def broadcast_variables(
    variables: Sequence[Any], root_rank: int, process_set: ProcessSet = global_process_set, inplace: bool = False
) -> None:
    """Values of rank `root_rank` into the variables of all ranks. inplace: has no effect, they always keep their memory."""

    def sent(tensors: Sequence[Any]) -> list[Any]:
        named = zip(tensors, names_of(variables), strict=True)
        return [handle.value() for handle in [broadcast_async(one, root_rank, name, process_set) for one, name in named]]

    for variable, value in zip(variables, on_host(sent, variables), strict=True):
        variable.assign(value)
