"""Loops of optax on real ranks: as one process, and in codes; in what JAX compiles."""

import os
from typing import Any

import numpy as np
import pytest

from pool import Pool, Rank
from thinwire.collectives.ledger import Ledger
from thinwire.collectives.wire import sent_bytes
from thinwire.compress.exchange import make_exchange
from thinwire.config.compress import Coded
from thinwire.workload import Parameter

os.environ.setdefault("JAX_PLATFORMS", "cpu")
jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")
import thinwire.jax  # noqa: E402

pytestmark = [pytest.mark.long, pytest.mark.timeout(300)]
STEPS = 5
SHAPES = {"first": (64, 128), "bias": (128,), "second": (128, 16)}


def begin(rank: int, dtype: str) -> Any:
    draw = np.random.default_rng(rank)
    return {"net": {name: jax.numpy.asarray(draw.normal(size=shape), dtype) for name, shape in SHAPES.items()}}


def batch(rank: int, step: int) -> Any:
    return np.random.default_rng(100 * rank + step).normal(size=(16, 64))


def loss_of(params: Any, inputs: Any) -> Any:
    net = params["net"]
    return ((jax.numpy.tanh(inputs @ net["first"] + net["bias"]) @ net["second"] - 1) ** 2).mean()


def trained(context: Rank, compress: Any, dtype: str, compiled: bool) -> tuple[Any, int, str]:
    """Weights, what a rank has sent, and what a difference says."""
    jax.config.update("jax_enable_x64", True)
    thinwire.jax.init()
    params = thinwire.jax.broadcast(begin(context.rank, dtype))
    optimizer = optax.chain(thinwire.jax.average_gradients(compress), optax.adam(1e-2))
    state = optimizer.init(params)

    def step(params: Any, state: Any, inputs: Any) -> Any:
        updates, state = optimizer.update(jax.grad(loss_of)(params, inputs), state, params)
        return optax.apply_updates(params, updates), state

    run = jax.jit(step) if compiled else step
    for number in range(STEPS):
        params, state = run(params, state, batch(context.rank, number).astype(dtype))
    params = jax.device_get(params)
    sent = sum(total.wire_bytes for call, total in context.recorded().items() if call.label.startswith("allreduce"))
    odd = {"w": jax.numpy.ones(3 + context.rank)}
    with pytest.raises(Exception) as error:
        jax.block_until_ready(thinwire.jax.average_gradients().update(odd, None))
    with pytest.raises(ValueError, match="kind"):
        thinwire.jax.average_gradients("int5")
    thinwire.jax.shutdown()
    return params, sent, str(error.value)


def reference(ranks: int) -> Any:
    with jax.enable_x64(True):
        params, optimizer = begin(0, "float64"), optax.adam(1e-2)
        state = optimizer.init(params)
        for number in range(STEPS):
            inputs = np.concatenate([batch(rank, number) for rank in range(ranks)])
            updates, state = optimizer.update(jax.grad(loss_of)(params, inputs), state, params)
            params = optax.apply_updates(params, updates)
        return jax.device_get(params)


@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "jit"])
def test_a_loop_trains_as_one_process_with_all_batches(ranks2: Pool, compiled: bool) -> None:
    (one, _, error), (other, _, _) = ranks2.run(trained, "none", "float64", compiled, timeout_s=250)
    for name, right in reference(2)["net"].items():
        assert one["net"][name].tobytes() == other["net"][name].tobytes()
        np.testing.assert_allclose(one["net"][name], right, rtol=0, atol=1e-9)
    assert "shape of w differs: 3 on rank 0, 4 on rank 1" in error


@pytest.mark.parametrize(
    "compress", [{"kind": "int8"}, {"kind": "int4"}, {"kind": "topk", "k": 256}], ids=lambda one: one["kind"]
)
def test_codes_send_what_is_predicted_and_ranks_agree_to_the_bit(ranks2: Pool, compress: dict[str, Any]) -> None:
    parameters = [Parameter(f"net/{name}", SHAPES[name]) for name in sorted(SHAPES)]
    transfers = make_exchange(Coded(**compress), Ledger()).transfers("allreduce", parameters, "data", 2)
    expected = sum(one.calls * sent_bytes(one.op, one.message_bytes, 2, 0) for one in transfers)
    (one, sent, _), (other, _, _) = ranks2.run(trained, compress, "float32", True, timeout_s=250)
    assert all(one["net"][name].tobytes() == other["net"][name].tobytes() for name in SHAPES)
    assert sent == STEPS * expected < STEPS * 0.5 * 4 * sum(np.prod(shape) for shape in SHAPES.values())
