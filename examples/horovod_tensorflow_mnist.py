"""A loop of TensorFlow 2 with Horovod's API, as its documentation shows it; only the import is another one.

    torchrun --nproc-per-node 2 examples/horovod_tensorflow_mnist.py
    thinwire horovodrun -np 4 python examples/horovod_tensorflow_mnist.py --compression int4

The images are Fashion-MNIST where Debian's dataset-fashion-mnist is installed, else ten random patterns in noise.
"""

import argparse
import gzip
from pathlib import Path

import numpy as np
import tensorflow as tf

import thinwire.horovod.tensorflow as hvd  # import horovod.tensorflow as hvd

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
    parser.add_argument("--steps", type=int, default=800, help="of all ranks together")
    parser.add_argument("--compression", default="none", help="none, fp16, int8, int4, ...")
    args = parser.parse_args(arguments)

    # Horovod: initialize Horovod.
    hvd.init()
    tf.keras.utils.set_random_seed(hvd.rank())
    x, y = images("train")
    dataset = tf.data.Dataset.from_tensor_slices((x, y)).shard(hvd.size(), hvd.rank()).repeat().shuffle(10000).batch(64)

    model = tf.keras.Sequential(
        [
            tf.keras.layers.Conv2D(16, 3, activation="relu"),
            tf.keras.layers.MaxPooling2D(),
            tf.keras.layers.Conv2D(32, 3, activation="relu"),
            tf.keras.layers.MaxPooling2D(),
            tf.keras.layers.Flatten(),
            tf.keras.layers.Dense(64, activation="relu"),
            tf.keras.layers.Dense(10),
        ]
    )
    loss = tf.losses.SparseCategoricalCrossentropy(from_logits=True)

    # Horovod: adjust learning rate based on number of GPUs.
    opt = tf.optimizers.Adam(0.001 * hvd.size())

    @tf.function
    def training_step(images: tf.Tensor, labels: tf.Tensor, first_batch: bool) -> tf.Tensor:
        with tf.GradientTape() as tape:
            loss_value = loss(labels, model(images, training=True))
        # Horovod: add Horovod Distributed GradientTape.
        tape = hvd.DistributedGradientTape(tape, compression=getattr(hvd.Compression, args.compression))
        grads = tape.gradient(loss_value, model.trainable_variables)
        opt.apply_gradients(zip(grads, model.trainable_variables, strict=True))
        # Horovod: broadcast initial variable states from rank 0 to all other processes, after the first step, which makes them.
        if first_batch:
            hvd.broadcast_variables(model.variables, root_rank=0)
            hvd.broadcast_variables(opt.variables, root_rank=0)
        return loss_value

    # Horovod: adjust number of steps based on number of GPUs.
    for batch, (images_, labels) in enumerate(dataset.take(args.steps // hvd.size())):
        loss_value = training_step(images_, labels, batch == 0)
        if batch % 100 == 0 and hvd.rank() == 0:
            print(f"Step #{batch}\tLoss: {loss_value:.6f}", flush=True)

    x, y = images("t10k")
    mine = slice(hvd.rank(), None, hvd.size())
    right = np.argmax(model.predict(x[mine], batch_size=500, verbose=0), 1) == y[mine]
    accuracy = float(hvd.allreduce(tf.reduce_mean(tf.cast(right, tf.float32)), name="accuracy"))
    if hvd.rank() == 0:
        print(f"accuracy {100 * accuracy:.1f} %, sent by a rank, trials too: {hvd.ledger().sent_bytes / 1e6:.1f} MB")
    return accuracy


if __name__ == "__main__":
    main()
