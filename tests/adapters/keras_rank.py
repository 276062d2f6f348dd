"""One rank of `test_keras`: what it does with Keras in a process of its own, since a process has one backend for good."""

import pickle
import sys
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

import thinwire
import thinwire.horovod.keras as hvd
from thinwire.collectives.ledger import difference


def data(rank: int, ranks: int, number: int = 256) -> tuple[Any, Any]:
    """Ten patterns in noise; rank r of p has every p-th, so that a batch of all ranks is a batch of one."""
    draw = np.random.default_rng(0)
    patterns, labels = draw.normal(size=(10, 64)), draw.integers(0, 10, number)
    images = patterns[labels] + 1.5 * draw.normal(size=(number, 64))
    return images[rank::ranks], labels[rank::ranks]


def net(rank: int, dtype: str = "float64") -> Any:
    keras.backend.clear_session()
    keras.config.set_floatx(dtype)
    layers = [keras.layers.Dense(32, activation="tanh", name="first"), keras.layers.Dense(10, name="second")]
    model = keras.Sequential([keras.Input((64,)), *layers], name="net")
    draw = np.random.default_rng(rank)
    model.set_weights([0.1 * draw.normal(size=one.shape) for one in model.weights])
    return model


def trained(kind: str = "none", dtype: str = "float64", epochs: int = 3, alone: bool = False) -> Any:
    """Weights, history, and what a rank has sent in allreduces. alone: one process with all data."""
    model, before = net(0 if alone else hvd.rank(), dtype), hvd.ledger().snapshot()
    optimizer: Any = keras.optimizers.SGD(0.1, momentum=0.9)
    callbacks: list[Any] = []
    if not alone:
        optimizer = hvd.DistributedOptimizer(optimizer, compression=getattr(hvd.Compression, kind))
        callbacks = [hvd.callbacks.BroadcastGlobalVariablesCallback(0), hvd.callbacks.MetricAverageCallback()]
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, metrics=["accuracy"])
    images, labels = data(*((0, 1) if alone else (hvd.rank(), hvd.size())))
    history = model.fit(
        images, labels, batch_size=32 if alone else 16, epochs=epochs, shuffle=False, verbose=0, callbacks=callbacks
    )
    recorded = difference(hvd.ledger().snapshot(), before)
    sent = sum(total.wire_bytes for call, total in recorded.items() if call.label.startswith("allreduce"))
    return [one.astype("float64") for one in model.get_weights()], history.history, sent


def callbacks(folder: Path) -> Any:
    """Learning rates that a fit has seen, and a sum; wrong use is refused."""
    model = net(hvd.rank(), "float32")
    optimizer = hvd.DistributedOptimizer(keras.optimizers.Adam(0.4), compression=hvd.Compression.fp16)
    assert isinstance(optimizer, keras.optimizers.Adam)
    for wrong in (optimizer, 7):
        with pytest.raises(ValueError, match="not distributed yet"):
            hvd.DistributedOptimizer(wrong)
    with pytest.raises(ValueError, match="gradient_accumulation_steps"):
        hvd.DistributedOptimizer(keras.optimizers.Adam(), backward_passes_per_step=2)
    with pytest.raises(ValueError, match="mixed_bfloat16"):
        hvd.DistributedOptimizer(keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam()))
    rates: list[float] = []

    class Seen(keras.callbacks.Callback):
        """Within the warm-up: later JAX's own state is not in the variables while a step goes on."""

        def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
            if warm.epoch < warm.epochs:
                rates.append(float(optimizer.learning_rate))

    model.compile(optimizer, "mse")
    images, _ = data(hvd.rank(), 2, 64)
    warm = hvd.callbacks.LearningRateWarmupCallback(initial_lr=0.4, warmup_epochs=2, verbose=1)
    begin = hvd.callbacks.BroadcastGlobalVariablesCallback(0)
    model.fit(images, images[:, :10], batch_size=16, epochs=3, verbose=0, callbacks=[begin, warm, Seen()])
    rates.append(float(optimizer.learning_rate))
    path = folder / f"{hvd.rank()}.keras"
    model.save(path)
    again = hvd.load_model(path)
    assert again.optimizer.thinwire_reduction and len(again.optimizer.variables) == len(optimizer.variables)
    assert type(keras.models.load_model(path).optimizer) is keras.optimizers.Adam or keras.config.backend() == "torch"
    total = hvd.allreduce(np.ones(2), op=hvd.Sum).tolist()
    with pytest.raises(Exception, match=r"shape of .* differs"):
        odd = keras.Sequential([keras.Input((3 + hvd.rank(),)), keras.layers.Dense(1, name="odd")])
        odd.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.1)), "mse", jit_compile=False)
        odd.fit(np.ones((4, 3 + hvd.rank())), np.ones((4, 1)), verbose=0)
    return rates, total


if __name__ == "__main__":
    out = Path(sys.argv[1])
    thinwire.init(collectives="native")
    hvd.init()
    found = {
        "backend": keras.config.backend(),
        "plain": trained(),
        "alone": trained(alone=True),
        "int8": trained("int8", "float32"),
        "int4": trained("int4", "float32"),
        "int8 to the end": trained("int8", "float32", 8),
        "alone to the end": trained("none", "float32", 8, True),
        "callbacks": callbacks(out),
    }
    (out / f"{hvd.rank()}.pickle").write_bytes(pickle.dumps(found))
