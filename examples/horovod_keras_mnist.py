"""`model.fit` of Keras 3 with Horovod's API, as its documentation shows it; only the import is another one.

    KERAS_BACKEND=jax torchrun --nproc-per-node 2 examples/horovod_keras_mnist.py
    KERAS_BACKEND=torch thinwire horovodrun -np 4 python examples/horovod_keras_mnist.py --compression int8

The backend is tensorflow, jax or torch. The images are Fashion-MNIST where Debian's dataset-fashion-mnist is installed, else ten
random patterns in noise.
"""

import argparse
import gzip
from pathlib import Path

import keras
import numpy as np

import thinwire.horovod.keras as hvd  # import horovod.keras as hvd

FOLDER = Path("/usr/share/datasets/fashion-mnist")


def images(part: str) -> tuple[np.ndarray, np.ndarray]:
    """[n, 28, 28, 1], from 0 to 1, and their labels. part: train or t10k."""
    if FOLDER.exists():
        x = np.frombuffer(gzip.decompress((FOLDER / f"{part}-images-idx3-ubyte.gz").read_bytes()), np.uint8, offset=16)
        y = np.frombuffer(gzip.decompress((FOLDER / f"{part}-labels-idx1-ubyte.gz").read_bytes()), np.uint8, offset=8)
        return x.reshape(-1, 28, 28, 1).astype("float32") / 255, y.astype("int64")
    draw = np.random.default_rng(0)
    patterns, draw = draw.random((10, 28, 28, 1)), np.random.default_rng(len(part))
    y = draw.integers(0, 10, 6000)
    return np.clip(patterns[y] + 0.5 * draw.normal(size=(6000, 28, 28, 1)), 0, 1).astype("float32"), y


def main(arguments: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--images", type=int, default=60000, help="of all ranks together")
    parser.add_argument("--compression", default="none", help="none, fp16, int8, int4, ...")
    args = parser.parse_args(arguments)

    # Horovod: initialize Horovod.
    hvd.init()
    keras.utils.set_random_seed(hvd.rank())
    (x_train, y_train), (x_test, y_test) = images("train"), images("t10k")
    mine = slice(hvd.rank(), args.images, hvd.size())
    x_train, y_train = x_train[mine], y_train[mine]

    model = keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            keras.layers.Conv2D(16, 3, activation="relu"),
            keras.layers.MaxPooling2D(),
            keras.layers.Conv2D(32, 3, activation="relu"),
            keras.layers.MaxPooling2D(),
            keras.layers.Flatten(),
            keras.layers.Dense(64, activation="relu"),
            keras.layers.Dense(10, activation="softmax"),
        ]
    )

    # Horovod: adjust learning rate based on number of GPUs.
    scaled_lr = 0.001 * hvd.size()

    # Horovod: add Horovod DistributedOptimizer.
    opt = hvd.DistributedOptimizer(keras.optimizers.Adam(scaled_lr), compression=getattr(hvd.Compression, args.compression))
    model.compile(loss="sparse_categorical_crossentropy", optimizer=opt, metrics=["accuracy"])

    callbacks = [
        # Horovod: broadcast initial variable states from rank 0 to all other processes.
        hvd.callbacks.BroadcastGlobalVariablesCallback(0),
        # Horovod: average metrics among workers at the end of every epoch.
        hvd.callbacks.MetricAverageCallback(),
        # Horovod: the learning rate rises to its full height within the first epoch.
        hvd.callbacks.LearningRateWarmupCallback(initial_lr=scaled_lr, warmup_epochs=1, verbose=1),
    ]
    model.fit(x_train, y_train, batch_size=64, epochs=args.epochs, callbacks=callbacks, verbose=2 if hvd.rank() == 0 else 0)

    _, accuracy = model.evaluate(x_test, y_test, batch_size=500, verbose=0)
    if hvd.rank() == 0:
        sent = hvd.ledger().sent_bytes / 1e6
        print(f"{keras.config.backend()}: accuracy {100 * accuracy:.1f} %, sent by a rank, trials too: {sent:.1f} MB")
    return float(accuracy)


if __name__ == "__main__":
    main()
