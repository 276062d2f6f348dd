"""Keras 3 trains on real ranks by `model.fit`, with each backend: as one process, in codes, and as well with all three."""

import importlib.util
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pool import LOOPBACK
from thinwire.collectives.ledger import Ledger
from thinwire.collectives.wire import sent_bytes
from thinwire.compress.exchange import make_exchange
from thinwire.config.compress import Coded
from thinwire.workload import Parameter

ROOT = Path(__file__).parents[2]
BACKENDS = ("tensorflow", "jax", "torch")
MISSING = [name for name in ("keras", "tensorflow", "jax") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.long,  # to load the backends takes each rank some ten seconds
    pytest.mark.timeout(500),
    pytest.mark.skipif(bool(MISSING), reason=f"{', '.join(MISSING)}: not installed"),
]


@pytest.fixture(scope="module", params=BACKENDS)
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks has found."""
    folder = tmp_path_factory.mktemp(request.param)
    environment = os.environ | {
        "KERAS_BACKEND": request.param,
        "JAX_ENABLE_X64": "1",
        "JAX_PLATFORMS": "cpu",
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": LOOPBACK,
        "PYTHONPATH": str(ROOT / "src"),
    }
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, str(ROOT / "tests" / "adapters" / "keras_rank.py"), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=480)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(2)]


def test_fit_on_two_ranks_is_fit_on_one(ranks: list[dict[str, Any]]) -> None:
    """The same batches in float64 (but for some sums of Keras on torch); replicas equal to the bit; metrics of all data."""
    backend = ranks[0]["backend"]
    (one, history, _), (other, same, _) = (rank["plain"] for rank in ranks)
    wanted, alone, _ = ranks[0]["alone"]
    assert [w.tobytes() for w in one] == [w.tobytes() for w in other] and history == same
    for found, right in zip(one, wanted, strict=True):
        np.testing.assert_allclose(found, right, rtol=0, atol=1e-6 if backend == "torch" else 1e-9)
    np.testing.assert_allclose(history["accuracy"], alone["accuracy"], atol=1e-6)


def test_codes_send_what_is_predicted(ranks: list[dict[str, Any]]) -> None:
    parameters = [
        Parameter(f"{layer}/{name}", shape)
        for layer, rows, columns in (("first", 64, 32), ("second", 32, 10))
        for name, shape in (("kernel", (rows, columns)), ("bias", (columns,)))
    ]
    steps = 3 * 256 // 32
    for kind in ("int8", "int4"):
        transfers = make_exchange(Coded(kind=kind), Ledger()).transfers("allreduce", parameters, "data", 2)  # type: ignore
        expected = sum(one.calls * sent_bytes(one.op, one.message_bytes, 2, 0) for one in transfers)
        (one, _, sent), (other, _, _) = (rank[kind] for rank in ranks)
        assert [w.tobytes() for w in one] == [w.tobytes() for w in other]
        metrics = 3 * sent_bytes("all_reduce", 2 * 8, 2, 0)
        assert sent - metrics == steps * expected < steps * 0.5 * 4 * sum(w.size for w in one)


def test_int8_gradients_reach_the_same_accuracy_with_each_backend(ranks: list[dict[str, Any]]) -> None:
    """Of one process without codes, and so of each other; within 1 %."""
    coded, plain = (ranks[0][name][1]["accuracy"][-1] for name in ("int8 to the end", "alone to the end"))
    assert coded > 0.9 and abs(coded - plain) <= 0.01


def test_callbacks(ranks: list[dict[str, Any]]) -> None:
    """The learning rate rises to initial_lr within two epochs of two batches, and stays."""
    for rates, total in (rank["callbacks"] for rank in ranks):
        np.testing.assert_allclose(rates, [0.25, 0.3, 0.35, 0.4, 0.4], rtol=1e-5)
        assert total == [2, 2]
