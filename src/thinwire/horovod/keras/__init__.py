"""Horovod's API for Keras 3, with its backends tensorflow, jax and torch: `import thinwire.horovod.keras as hvd`."""

from typing import Any

import keras
import numpy as np
import torch

import thinwire.horovod.torch as on_torch
from thinwire.horovod.common import *  # noqa: F403 - all of it
from thinwire.horovod.keras import callbacks as callbacks
from thinwire.horovod.keras.optimizer import DistributedOptimizer as DistributedOptimizer
from thinwire.horovod.keras.optimizer import broadcast_variables as broadcast_variables


def allreduce(value: Any, name: str | None = None, average: bool | None = None, **options: Any) -> Any:
    """A number or an array, reduced over the ranks; of NumPy, as all here. options: as in `thinwire.horovod.torch`."""
    return on_torch.allreduce(torch.tensor(np.asarray(value)), average, name, **options).numpy()


def allgather(value: Any, name: str | None = None) -> Any:
    """The arrays of all ranks one behind another along the first dim, which may differ."""
    return on_torch.allgather(torch.tensor(np.asarray(value)), name).numpy()


def broadcast(value: Any, root_rank: int, name: str | None = None) -> Any:
    """The array of rank `root_rank`."""
    return on_torch.broadcast(torch.tensor(np.asarray(value)), root_rank, name).numpy()


def load_model(filepath: Any, custom_objects: Any = None, **options: Any) -> Any:
    """A model that `model.save` has written, with its optimizer as `DistributedOptimizer`, which gets the options."""
    model = keras.models.load_model(filepath, custom_objects)
    DistributedOptimizer(model.optimizer, **options)
    return model
