"""A Keras 3 model that learns with its kernels rounded as int8 or int4 will hold them, on ranks that send gradients in codes.

    KERAS_BACKEND=jax torchrun --nproc-per-node 2 examples/keras_quantised.py --bits 4 --compression int8

After training Keras's own `quantize` rounds the model for good. The backend is tensorflow, jax or torch; the images are
Fashion-MNIST (Debian's dataset-fashion-mnist), else ten random patterns in noise.
"""

import argparse

import keras
from horovod_keras_mnist import images

import thinwire.horovod.keras as hvd


class Rounded(keras.layers.Dense):
    """A Dense that computes with what its kernel will be after `quantize`; gradients pass as if nothing were rounded."""

    bits = 8

    @property
    def kernel(self):
        exact, most = super().kernel, 2 ** (self.bits - 1) - 1
        codes, scale = keras.quantizers.abs_max_quantize(exact, axis=0, value_range=(-most, most))
        return exact + keras.ops.stop_gradient(keras.ops.cast(codes, exact.dtype) / scale - exact)


def net(dense: type[keras.layers.Dense], optimizer: keras.Optimizer | None = None) -> keras.Model:
    layers = [dense(256, activation="relu"), dense(64, activation="relu"), dense(10)]
    model = keras.Sequential([keras.Input((28, 28, 1)), keras.layers.Flatten(), *layers])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=optimizer, loss=loss, metrics=["accuracy"])
    return model


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bits", type=int, choices=(8, 4), default=8, help="of a kernel")
    parser.add_argument("--exact", action="store_true", help="learn without rounding, and be rounded afterwards")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--images", type=int, default=60000, help="of all ranks together")
    parser.add_argument("--compression", default="int8", help="of gradients: none, fp16, int8, int4, ...")
    args = parser.parse_args(arguments)

    hvd.init()
    keras.utils.set_random_seed(hvd.rank())
    (x_train, y_train), (x_test, y_test) = images("train"), images("t10k")
    mine = slice(hvd.rank(), args.images, hvd.size())

    Rounded.bits = args.bits
    compression = getattr(hvd.Compression, args.compression)
    optimizer = hvd.DistributedOptimizer(keras.optimizers.Adam(0.001 * hvd.size()), compression=compression)
    model = net(keras.layers.Dense if args.exact else Rounded, optimizer)
    begin = hvd.callbacks.BroadcastGlobalVariablesCallback(0)
    model.fit(x_train[mine], y_train[mine], batch_size=64, epochs=args.epochs, verbose=0, callbacks=[begin])

    found = {"as trained": model.evaluate(x_test, y_test, batch_size=500, verbose=0)[1]}
    last = net(keras.layers.Dense)  # `quantize` takes Keras's own layers, not ours
    last.set_weights(model.get_weights())
    by_column = keras.quantizers.Int4QuantizationConfig(block_size=None)
    last.quantize(f"int{args.bits}", config=by_column if args.bits == 4 else None)
    found["quantised"] = last.evaluate(x_test, y_test, batch_size=500, verbose=0)[1]
    if hvd.rank() == 0:
        told = ", ".join(f"{name} {100 * accuracy:.1f} %" for name, accuracy in found.items())
        kernels = sorted({str(one.dtype) for one in last.weights if "kernel" in one.name and "scale" not in one.name})
        print(f"{keras.config.backend()}: accuracy {told}; kernels are {', '.join(kernels)}")
        print(f"sent by a rank, trials too: {hvd.ledger().sent_bytes / 1e6:.1f} MB")
    return found


if __name__ == "__main__":
    main()
