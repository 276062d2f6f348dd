"""What takes PyTorch's tensors, called with arrays of JAX, also in what `jax.jit` compiles.

There it is an ordered callback of the host: once each, in the order in which they were written. Arrays pass by DLPack.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import torch
from jax.experimental import io_callback


def on_host(call: Callable[[list[torch.Tensor]], Sequence[torch.Tensor]], arrays: Sequence[Any]) -> list[Any]:
    """`call` of `arrays`; its results have their shapes and dtypes."""

    def work(*given: Any) -> list[Any]:
        return [jax.dlpack.from_dlpack(one) for one in call([torch.from_dlpack(one) for one in given])]

    shapes = [jax.ShapeDtypeStruct(one.shape, one.dtype) for one in arrays]
    return list(io_callback(work, shapes, *arrays, ordered=True))
