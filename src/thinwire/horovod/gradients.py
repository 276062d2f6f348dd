"""Gradients of a step, reduced over the ranks together: what a tape, an optimizer of Keras and a loop of JAX have alike.

All of them travel as one request that knows each by its name: by it a code keeps what it has left out, and a difference between
ranks is told. `DistributedOptimizer` of PyTorch sends each gradient as it comes (`torch.optimizer`).
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from thinwire.adapters.horovod.members import ProcessSet
from thinwire.horovod.torch.calls import Average, ReduceOp, global_process_set
from thinwire.horovod.torch.compression import Compression
from thinwire.horovod.torch.mpi_ops import all_reduced


@dataclass(kw_only=True)
class Reduction:
    """How gradients are reduced, and for whom. num_groups and groups have no effect: all travel together. name: alike on all
    ranks; "": after the first of the gradients. sparse_as_dense: whether sparse ones become dense. ValueError for
    gradient_predivide_factor without Average."""

    name: str = ""
    op: ReduceOp = Average
    compression: Any = Compression.none
    gradient_predivide_factor: float = 1.0
    process_set: ProcessSet = global_process_set
    sparse_as_dense: bool = False
    num_groups: int = 0
    groups: Any = None

    def __post_init__(self) -> None:
        if self.gradient_predivide_factor != 1.0 and self.op is not Average:
            raise ValueError(f"gradient_predivide_factor = {self.gradient_predivide_factor} works with op=hvd.Average only")

    def of(self, names: Sequence[str], gradients: Sequence[Any], on_host: Callable[..., Sequence[Any]]) -> list[Any]:
        """New gradients; None stays. Collective, unless this rank has nobody to reduce with.

        on_host: how tensors of the framework come to a call that takes those of PyTorch (`adapters.jax`).
        """
        found, there = list(gradients), [number for number, one in enumerate(gradients) if one is not None]
        if there and self.process_set.included() and self.process_set.size() > 1:
            call = partial(self._reduced, [names[number] for number in there])
            for number, new in zip(there, on_host(call, [found[number] for number in there]), strict=True):
                found[number] = new
        return found

    def _reduced(self, names: Sequence[str], tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        scales = 1 / self.gradient_predivide_factor, self.gradient_predivide_factor
        name = self.name or f"gradients from {names[0]} on"
        return all_reduced(tensors, self.op, name, self.compression, scales, self.process_set, names)


def names_of(variables: Sequence[Any]) -> list[str]:
    """Of Keras, of TensorFlow, or of none; with its number where several have the same."""
    names = [getattr(one, "path", None) or getattr(one, "name", None) or "tensor" for one in variables]
    times = Counter(names)
    return [name if times[name] == 1 else f"{name}.{number}" for number, name in enumerate(names)]
