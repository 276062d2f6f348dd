"""An optimizer of Keras 3 that steps with the gradients of all ranks, with each backend.

In a step that TensorFlow or JAX compiles they are one operation of the host (`adapters.tensorflow`, `adapters.jax`). With
gradient_accumulation_steps the gradients of each batch travel.
"""

from collections.abc import Sequence
from typing import Any

import keras

from thinwire.adapters.horovod.context import CONTEXT
from thinwire.errors import UserError
from thinwire.horovod.gradients import Reduction, names_of
from thinwire.horovod.torch.functions import broadcast_object


def DistributedOptimizer(optimizer: Any, name: str | None = None, **options: Any) -> Any:
    """`optimizer`, which from now on reduces gradients over the ranks before it steps. options: of `Reduction`.

    Its class becomes one of the same name; a model is saved as without us. UserError for what is no optimizer of Keras 3 or is
    distributed already, for a LossScaleOptimizer, for backward_passes_per_step, and for a backend that is not there.
    """
    backend, kind = keras.config.backend(), type(optimizer)
    if options.pop("backward_passes_per_step", 1) != 1:
        raise UserError("backward_passes_per_step: give Keras's optimizer gradient_accumulation_steps instead")
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        raise UserError("DistributedOptimizer: ranks would scale losses differently; take mixed_bfloat16, which needs no scale")
    if not isinstance(optimizer, keras.optimizers.Optimizer) or isinstance(optimizer, _Distributed):
        raise UserError(f"DistributedOptimizer takes an optimizer of Keras 3 that is not distributed yet, not {kind.__name__}")
    if backend not in ("tensorflow", "jax", "torch"):
        raise UserError(f"DistributedOptimizer: the backend is {backend!r}; there are tensorflow, jax and torch")
    reduction = Reduction(name=name or f"optimizer {next(CONTEXT.engine.owners)}", **options)
    fields = {"__module__": "keras.optimizers", "thinwire_reduction": reduction}
    optimizer.__class__ = type(kind.__name__, (_Distributed, kind), fields)
    return optimizer


class _Distributed:
    """Before the user's class of optimizers."""

    thinwire_reduction: Reduction
    _trainable_variables: list[Any]

    def apply(self, grads: Any, trainable_variables: Any = None) -> Any:
        variables = self._trainable_variables if trainable_variables is None else list(trainable_variables)
        return super().apply(_reduced(self.thinwire_reduction, variables, grads), trainable_variables and variables)  # type: ignore


def _reduced(reduction: Reduction, variables: Sequence[Any], gradients: Sequence[Any]) -> list[Any]:
    if keras.config.backend() == "tensorflow":
        from thinwire.horovod.tensorflow.functions import reduced_gradients

        return reduced_gradients(reduction, variables, gradients)
    if keras.config.backend() == "jax":
        from thinwire.adapters.jax import on_host

        return reduction.of(names_of(variables), gradients, on_host)
    return reduction.of(names_of(variables), gradients, lambda call, tensors: call(tensors))


def broadcast_variables(variables: Sequence[Any], root_rank: int = 0) -> None:
    """Values of rank `root_rank` into the variables of all ranks. Collective."""
    values = broadcast_object([keras.ops.convert_to_numpy(variable) for variable in variables], root_rank)
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)
