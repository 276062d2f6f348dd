"""What takes PyTorch's tensors, called with TensorFlow's: at once, or from within a `tf.function`.

Tensors pass by DLPack: on a CPU without a copy, both ways. In a `tf.function` the call is one stateful operation, so that several
of them run in the order in which they were written; XLA compiles no such operation.
"""

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf
import torch
from tensorflow.python.ops.control_flow_util import GraphOrParentsInXlaContext
from torch.utils import dlpack

from thinwire.errors import UserError

Call = Callable[[list[torch.Tensor]], Sequence[torch.Tensor]]


@tf.autograph.experimental.do_not_convert
def on_host(call: Call, tensors: Sequence[Any], results: Sequence[Any] | None = None) -> list[Any]:
    """`call` of `tensors`, as tensors of TensorFlow. results: what they are like in dtype and shape; None: `tensors`.

    UserError in a function that XLA is to compile.
    """
    given = [tf.convert_to_tensor(tensor) for tensor in tensors]

    def work(*eager: Any) -> list[Any]:
        found = call([dlpack.from_dlpack(tf.experimental.dlpack.to_dlpack(one)) for one in eager])
        return [tf.experimental.dlpack.from_dlpack(dlpack.to_dlpack(one.contiguous())) for one in found]

    if tf.executing_eagerly():
        return work(*given)
    if GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph()):
        raise UserError("XLA compiles no step in which ranks wait for each other; say jit_compile=False")
    like = given if results is None else results
    found = tf.py_function(work, given, [one.dtype for one in like])
    for one, other in zip(found, like, strict=True):
        one.set_shape(other.shape)
    return list(found)
