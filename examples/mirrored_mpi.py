"""Two levels: TensorFlow's MirroredStrategy among the devices of a host, thinwire over MPI between hosts; mpi4py beside both.

    mpiexec -n 2 python examples/mirrored_mpi.py --compression int8

A rank is a host. Its devices are its GPUs, whose gradients NCCL adds up, else two that TensorFlow makes of the CPU. The images
are Fashion-MNIST (Debian's dataset-fashion-mnist), else ten random patterns in noise.
"""

import argparse

import numpy as np
import tensorflow as tf
from horovod_tensorflow_mnist import images
from mpi4py import MPI

import thinwire
import thinwire.horovod.tensorflow as hvd


def mirrored() -> tf.distribute.MirroredStrategy:
    """On the devices of this host."""
    if gpus := tf.config.list_physical_devices("GPU"):
        return tf.distribute.MirroredStrategy([f"GPU:{number}" for number in range(len(gpus))], tf.distribute.NcclAllReduce())
    (cpu,) = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"], tf.distribute.ReductionToOneDevice())


def main(arguments: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400, help="of all hosts together")
    parser.add_argument("--batch", type=int, default=64, help="of a host")
    parser.add_argument("--compression", default="none", help="between hosts: none, fp16, int8, int4, ...")
    args = parser.parse_args(arguments)

    strategy = mirrored()
    thinwire.init(inner="mpi", collectives="native")  # of the ranks of MPI.COMM_WORLD, on a duplicate of it
    hvd.init()
    compression = getattr(hvd.Compression, args.compression)
    tf.keras.utils.set_random_seed(0)  # alike on all hosts
    with strategy.scope():
        layers = [tf.keras.layers.Flatten(), tf.keras.layers.Dense(128, activation="relu"), tf.keras.layers.Dense(10)]
        model = tf.keras.Sequential([tf.keras.Input((28, 28, 1)), *layers])
        optimizer = tf.keras.optimizers.Adam(0.001 * hvd.size())
        optimizer.build(model.trainable_variables)
    cross_entropy = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="sum")
    devices = strategy.num_replicas_in_sync

    def gradients(x: tf.Tensor, y: tf.Tensor) -> tuple[tf.Tensor, list[tf.Tensor]]:
        with tf.GradientTape() as tape:
            loss = cross_entropy(y, model(x, training=True)) / args.batch
        return loss, tape.gradient(loss, model.trainable_variables)

    def apply(average: list[tf.Tensor]) -> None:
        shares = [one / devices for one in average]  # Keras adds up what each device brings
        optimizer.apply_gradients(zip(shares, model.trainable_variables, strict=True))

    @tf.function
    def step(x: tf.distribute.DistributedValues, y: tf.distribute.DistributedValues) -> tf.Tensor:
        losses, grads = strategy.run(gradients, args=(x, y))
        of_host = [strategy.reduce("SUM", one, axis=None) for one in grads]  # the devices of a host: NCCL
        average = hvd.grouped_allreduce(of_host, name="gradients", compression=compression)  # hosts: MPI, in codes
        strategy.run(apply, args=(average,))
        return strategy.reduce("SUM", losses, axis=None)

    comm = MPI.COMM_WORLD
    (x, y), before = images("train"), hvd.ledger().sent_bytes
    data = tf.data.Dataset.from_tensor_slices((x, y)).shard(comm.size, comm.rank).repeat().shuffle(10000, seed=comm.rank)
    data = strategy.experimental_distribute_dataset(data.batch(args.batch, drop_remainder=True).take(args.steps // comm.size))
    loss = 0.0
    for batch in data:
        loss = float(step(*batch))

    x, y = images("t10k")
    mine = slice(comm.rank, None, comm.size)
    right = int(np.sum(np.argmax(model(x[mine]), 1) == y[mine]))
    accuracy = comm.allreduce(right) / len(y)  # mpi4py's own communicator
    weights = comm.gather([one.numpy().tobytes() for one in model.weights])
    if comm.rank == 0:
        assert all(one == weights[0] for one in weights), "hosts differ"
        told = f"{comm.size} hosts of {devices} devices ({type(strategy.extended._cross_device_ops).__name__})"
        sent = (hvd.ledger().sent_bytes - before) / 1e6
        print(f"{told}: loss {loss:.3f}, accuracy {100 * accuracy:.1f} %, sent by a host: {sent:.1f} MB")
    return accuracy


if __name__ == "__main__":
    main()
