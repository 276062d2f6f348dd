"""Horovod's API for TensorFlow on real ranks: collectives as those of PyTorch's, eager and compiled; tapes as one process."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from test_horovod_ops import _ended  # noqa: F401 - a fixture

from pool import Pool, Rank
from thinwire.collectives.ledger import Ledger
from thinwire.collectives.wire import sent_bytes
from thinwire.compress.exchange import make_exchange
from thinwire.config.compress import Coded
from thinwire.workload import Parameter

tf = pytest.importorskip("tensorflow")
import thinwire.horovod.tensorflow as hvd  # noqa: E402
import thinwire.horovod.torch as on_torch  # noqa: E402

pytestmark = [pytest.mark.long, pytest.mark.timeout(300)]  # to load TensorFlow takes each rank some seconds

STEPS = 4


def of(rank: int, *shape: int, dtype: Any = tf.float32) -> Any:
    """Small whole numbers, so that sums are exact."""
    return tf.cast(np.random.default_rng(rank).integers(1, 5, shape or (3, 5)), dtype)


def everybody(dtype: Any) -> Any:
    return tf.stack([of(rank, dtype=dtype) for rank in range(hvd.size())])


def compiled(function: Callable[..., Any], *tensors: Any) -> list[Any]:
    """What it gives at once, and in a tf.function."""
    return [function(*tensors), tf.function(function, autograph=True)(*tensors)]


def collectives(context: Rank) -> None:
    hvd.init()
    rank, size = hvd.rank(), hvd.size()
    assert (rank, size, hvd.local_rank()) == (context.rank, context.world_size, context.rank)
    for dtype in (tf.int32, tf.int64, tf.float16, tf.bfloat16, tf.float32, tf.float64):
        own, total = of(rank, dtype=dtype), tf.reduce_sum(everybody(dtype), 0)
        for found in compiled(lambda x: hvd.allreduce(x, op=hvd.Sum), own):
            assert found.dtype == dtype and np.array_equal(found, total)
        for found in compiled(lambda x: hvd.allreduce(x, op=hvd.Max), own):
            assert np.array_equal(found, tf.reduce_max(everybody(dtype), 0))
        for found in compiled(lambda x: hvd.allgather(x, name="rows"), of(rank, rank + 1, 3, dtype=dtype)):
            assert np.array_equal(found, tf.concat([of(one, one + 1, 3, dtype=dtype) for one in range(size)], 0))
        for found in compiled(lambda x: hvd.broadcast(x, size - 1), own):
            assert np.array_equal(found, of(size - 1, dtype=dtype))
    for mean, scaled in compiled(lambda x: hvd.grouped_allreduce([x, x + 1], op=hvd.Average, prescale_factor=2.0), of(rank)):
        assert np.allclose(mean, 2 * tf.reduce_mean(everybody(tf.float32), 0)) and np.allclose(scaled - mean, 2)
    for found in compiled(lambda x: hvd.reducescatter(x, op=hvd.Sum), of(rank, size + 1, 2)):
        parts = np.array_split(sum(of(one, size + 1, 2).numpy() for one in range(size)), size)
        assert np.array_equal(found, parts[rank])
    for rows, counts in compiled(lambda x: hvd.alltoall(x, splits=[1, *[2] * (size - 1)]), of(rank, 2 * size - 1, 2)):
        assert counts.numpy().tolist() == [1 if rank == 0 else 2] * size and len(rows) == sum(counts.numpy())
    assert np.array_equal(hvd.alltoall(tf.range(2 * size)), np.array([2 * rank, 2 * rank + 1] * size))
    slices = tf.IndexedSlices(tf.ones([2, 3]), tf.constant([rank, 5]), tf.constant([6, 3]))
    for found in compiled(lambda x: hvd.allreduce(tf.IndexedSlices(x, slices.indices, slices.dense_shape)), slices.values):
        dense = tf.convert_to_tensor(found).numpy()
        assert dense[5].tolist() == [1.0] * 3 and dense.sum() == 6
    with pytest.raises(NotImplementedError, match="IndexedSlices"):
        hvd.allreduce(slices, op=hvd.Max)
    assert hvd.broadcast_object({"rank": rank}, root_rank=1) == {"rank": 1} and hvd.allgather_object(rank) == list(range(size))
    variables = [tf.Variable(of(rank, 2, 2)), tf.Variable(rank, dtype=tf.int64), tf.Variable(of(rank))]
    before = variables[0].read_value()
    tf.function(lambda: hvd.broadcast_variables(variables, root_rank=1))()
    assert np.array_equal(variables[0], of(1, 2, 2)) and int(variables[1]) == 1 and np.array_equal(before, of(rank, 2, 2))
    hvd.barrier()
    assert hvd.join() in range(size)


CALLS: dict[str, Callable[[Any, Any], Any]] = {
    "sum": lambda door, x: door.allreduce(x, op=door.Sum),
    "mean": lambda door, x: door.grouped_allreduce([x])[0],
    "scaled": lambda door, x: door.allreduce(x, op=door.Sum, prescale_factor=0.5, postscale_factor=4.0),
    "gather": lambda door, x: door.allgather(x),
    "broadcast": lambda door, x: door.broadcast(x, 1),
    "exchange": lambda door, x: door.alltoall(x[:3], on_torch.rank() * 0 + np.array([2, 1], np.int32))[0],
    "scatter": lambda door, x: door.reducescatter(x, op=door.Sum),
    "scatter mean": lambda door, x: door.reducescatter(x),
}


def gradients(context: Rank) -> None:
    """As those of the door of PyTorch."""
    import torch

    hvd.init()
    for call in CALLS.values():
        x = torch.ones(4, requires_grad=True)
        call(on_torch, x).sum().mul(context.rank + 1).backward()

        def gradient(x: Any, call: Any = call) -> Any:
            with tf.GradientTape() as tape:
                tape.watch(x)
                loss = tf.reduce_sum(call(hvd, x)) * float(context.rank + 1)
            return tape.gradient(loss, x)

        for found in compiled(gradient, tf.ones(4)):
            assert np.array_equal(found, x.grad)


def net() -> list[Any]:
    draw = np.random.default_rng(0)
    return [tf.Variable(draw.normal(size=shape), name=name) for name, shape in (("rows", (7, 6)), ("w", (6, 8)), ("b", (8,)))]


def batch(rank: int, step: int) -> Any:
    return tf.constant(np.random.default_rng(100 * rank + step).integers(0, 7, 16))


def loss_of(model: list[Any], rows: Any) -> Any:
    return tf.reduce_mean((tf.tanh(tf.gather(model[0], rows) @ model[1] + model[2]) - 1) ** 2)


def trained(context: Rank, graph: bool, options: dict[str, Any]) -> list[Any]:
    hvd.init()
    model = net()
    if context.rank:
        model[1].assign_add(tf.ones_like(model[1]))
    hvd.broadcast_variables(model, root_rank=0)

    def step(rows: Any) -> None:
        with tf.GradientTape() as tape:
            loss = loss_of(model, rows)
        tape = hvd.DistributedGradientTape(tape, **options)
        assert isinstance(tape, tf.GradientTape)
        for variable, gradient in zip(model, tape.gradient(loss, model), strict=True):
            variable.assign_sub(0.3 * tf.convert_to_tensor(gradient))

    run = tf.function(step) if graph else step
    for number in range(STEPS):
        run(batch(context.rank, number))
    return [one.numpy() for one in model]


def reference(ranks: int, summed: bool) -> list[Any]:
    model = net()
    for number in range(STEPS):
        with tf.GradientTape() as tape:
            loss = sum(loss_of(model, batch(rank, number)) for rank in range(ranks)) / (1 if summed else ranks)
        for variable, gradient in zip(model, tape.gradient(loss, model), strict=True):
            variable.assign_sub(0.3 * tf.convert_to_tensor(gradient))
    return [one.numpy() for one in model]


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sum": {"op": hvd.Sum},
    "dense": {"sparse_as_dense": True},
    "predivided": {"gradient_predivide_factor": 4.0},
}


@pytest.mark.door("plain averaging", "horovod.tensorflow")
@pytest.mark.parametrize("graph", [False, True], ids=["eager", "function"])
@pytest.mark.parametrize("name", OPTIONS)
def test_a_tape_trains_as_one_process_with_all_batches(ranks2: Pool, name: str, graph: bool) -> None:
    wanted = reference(2, name == "sum")
    one, other = ranks2.run(trained, graph, OPTIONS[name], timeout_s=250)
    for found, same, right in zip(one, other, wanted, strict=True):
        assert found.tobytes() == same.tobytes()
        np.testing.assert_allclose(found, right, rtol=0, atol=1e-9)


def coded(context: Rank, kind: str) -> tuple[list[bytes], int]:
    """Bits of the weights, and what the gradients of STEPS steps took."""
    hvd.init()
    draw = np.random.default_rng(0)
    weights = [tf.Variable(draw.normal(size=shape).astype("float32"), name=name) for name, shape in SHAPES.items()]

    @tf.function
    def step(inputs: Any) -> None:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((tf.tanh(inputs @ weights[0] + weights[1]) @ weights[2]) ** 2)
        tape = hvd.DistributedGradientTape(tape, compression=getattr(hvd.Compression, kind))
        for variable, gradient in zip(weights, tape.gradient(loss, weights), strict=True):
            variable.assign_sub(0.1 * gradient)

    for number in range(STEPS):
        step(tf.constant(np.random.default_rng(100 * context.rank + number).normal(size=(16, 64)), tf.float32))
    sent = sum(total.wire_bytes for call, total in context.recorded().items() if call.label.startswith("allreduce"))
    return [one.numpy().tobytes() for one in weights], sent


SHAPES = {"w": (64, 128), "b": (128,), "v": (128, 16)}


@pytest.mark.door("codes in every step", "horovod.tensorflow")
@pytest.mark.door("bytes as predicted", "horovod.tensorflow")
@pytest.mark.parametrize("kind", ["int8", "int4", "topk", "none"])
def test_codes_send_what_is_predicted_and_ranks_agree_to_the_bit(ranks2: Pool, kind: str) -> None:
    parameters = [Parameter(f"{name}:0", shape) for name, shape in SHAPES.items()]
    plain = 4 * sum(one.numel for one in parameters)
    if kind != "none":
        transfers = make_exchange(Coded(kind=kind), Ledger()).transfers("allreduce", parameters, "data", 2)  # type: ignore
        expected = sum(one.calls * sent_bytes(one.op, one.message_bytes, 2, 0) for one in transfers)
    else:
        expected = sent_bytes("all_reduce", plain, 2, 0)
    (bits, sent), (others, _) = ranks2.run(coded, kind, timeout_s=250)
    assert bits == others and sent == STEPS * expected <= STEPS * plain * (1.0 if kind == "none" else 0.6)


def differences(context: Rank) -> list[str]:
    hvd.init()
    lines = []
    weight, loss = tf.Variable(tf.ones([3 + context.rank]), name="odd"), tf.ones([2 + context.rank])

    def gradient() -> Any:
        with tf.GradientTape() as tape:
            value = tf.reduce_sum(weight**2)
        return hvd.DistributedGradientTape(tape).gradient(value, [weight])

    for call in (gradient, tf.function(gradient), tf.function(lambda: hvd.allreduce(loss))):
        with pytest.raises(Exception) as error:
            call()
        lines.append(str(error.value))
    with pytest.raises(Exception, match="jit_compile=False"):
        tf.function(lambda: hvd.allreduce(loss), jit_compile=True)()
    assert float(hvd.allreduce(tf.constant(1.0))) == 1.0
    return lines


def test_a_difference_is_an_error_that_names_the_tensor_and_the_ranks(ranks2: Pool) -> None:
    for eager, graph, call in ranks2.run(differences, timeout_s=250):
        for line in (eager, graph):
            assert "shape of odd:0 differs: 3 on rank 0, 4 on rank 1" in line
        assert "allreduce" in call and "shape differs: 2 on rank 0, 3 on rank 1" in call


@pytest.mark.parametrize("function", [collectives, gradients], ids=lambda f: f.__name__)
def test_collectives(ranks2: Pool, function: Callable[[Rank], Any]) -> None:
    ranks2.run(function, timeout_s=250)
