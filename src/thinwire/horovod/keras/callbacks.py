"""Callbacks of `model.fit`, as Horovod has them.

    warm-up    lr = initial_lr / p (1 + e (p-1) / warmup_epochs)

with p ranks and e epochs so far, the part of this one that is over among them.
"""

from typing import Any

import keras
import torch

from thinwire.adapters.horovod.context import CONTEXT
from thinwire.horovod.keras.optimizer import broadcast_variables
from thinwire.horovod.torch.calls import ProcessSet, global_process_set
from thinwire.horovod.torch.mpi_ops import allreduce


class BroadcastGlobalVariablesCallback(keras.callbacks.Callback):
    """Before the first step all ranks get weights and optimizer of rank `root_rank`. device: has no effect. A step of the backend
    tensorflow is then not compiled by XLA, which could not wait for other ranks."""

    def __init__(self, root_rank: int, device: str = "") -> None:
        super().__init__()
        self.root_rank = root_rank

    def set_model(self, model: Any) -> None:
        super().set_model(model)
        if keras.config.backend() == "tensorflow" and CONTEXT.size() > 1:
            model.jit_compile = False

    def on_train_begin(self, logs: Any = None) -> None:
        broadcast_variables([*self.model.weights, *self.model.optimizer.variables], self.root_rank)


class MetricAverageCallback(keras.callbacks.Callback):
    """The metrics of an epoch become their means over the ranks, for the callbacks behind this one. device: has no effect."""

    def __init__(self, device: str = "", process_set: ProcessSet = global_process_set) -> None:
        super().__init__()
        self.process_set = process_set

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if names := sorted(logs or ()):
            values = torch.tensor([float(logs[name]) for name in names], dtype=torch.float64)
            means = allreduce(values, name=f"means of {', '.join(names)}", process_set=self.process_set)
            logs |= zip(names, means.tolist(), strict=True)


class LearningRateWarmupCallback(keras.callbacks.Callback):
    """The learning rate goes from initial_lr / ranks to initial_lr, batch by batch. verbose: says so at the end, on rank 0.
    steps_per_epoch: where `fit` does not know it. Momentum is not corrected: in a compiled step of Keras 3 it is a constant."""

    def __init__(self, initial_lr: float, warmup_epochs: int = 5, steps_per_epoch: int | None = None, verbose: int = 0) -> None:
        super().__init__()
        self.initial_lr, self.epochs, self.epoch = initial_lr, warmup_epochs, 0
        self.steps, self.verbose = steps_per_epoch, verbose

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.epoch = epoch

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        if self.epoch < self.epochs:
            p, done = CONTEXT.size(), self.epoch + (batch + 1) / (self.steps or self.params["steps"])
            if keras.config.backend() == "jax":
                (getattr(self.model, "state_sync", None) or self.model.jax_state_sync)()
            self.model.optimizer.learning_rate = self.initial_lr / p * (1 + done * (p - 1) / self.epochs)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if self.verbose and epoch == self.epochs - 1 and CONTEXT.rank() == 0:
            print(f"Epoch {epoch + 1}: finished gradual learning rate warmup to {self.initial_lr:g}.")
