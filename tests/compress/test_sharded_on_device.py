"""Coded exchanges inside `fully_shard` as on a device: launched, on CPU tensors, and to the bit what the CPU's threads compute.

That nothing is read on the host is held on fake tensors, with `meta` in place of a device.
"""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from sharded_net import batch, sharded, whole
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule

import thinwire
from on_device import alone
from pool import Pool, Rank
from thinwire.compress.sharded.api import GRADIENT_KINDS, WEIGHT_KINDS
from thinwire.errors import UserError

pytestmark = pytest.mark.heavy

STEPS, SPOILED = 5, 2


@contextmanager
def launches(launched: bool) -> Iterator[None]:
    """Whatever device tensors are on."""
    with ExitStack() as stack:
        for module in ("stages", "sharded.api", "sharded.backward"):
            stack.enter_context(mock.patch(f"thinwire.compress.{module}.launched", return_value=launched))
        yield


def trained(context: Rank, launched: bool, reshard: bool | int, dtype: str, options: dict[str, Any]) -> list[dict[str, Any]]:
    """Gradients, residuals and losses of each step, and weights after it; rank 1 spoils the third one, which is left out."""
    ranks = dist.get_world_size()
    hybrid = "replicas" in options
    mesh = init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("replicate", "shard")) if hybrid else None
    asynchronous = options.get("asynchronous", False)
    options = {key: value for key, value in options.items() if key != "asynchronous"}
    model = sharded(reshard, getattr(torch, dtype), mesh)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module._set_unshard_async_op(asynchronous)
    optimizer, found = torch.optim.SGD(model.parameters(), lr=0.3), []
    with launches(launched):
        compression = thinwire.compress_sharded(model, **options)
        assert all((lane.executor is None) == launched for lane in compression._lanes)
        for step in range(STEPS):
            for micro in range(2):
                if hybrid and step > 2:
                    model.set_requires_all_reduce(micro == 1)
                loss = model(batch(context.rank, 2 * step + micro))
                (loss * math.inf if step == SPOILED and micro == 0 and context.rank == 1 else loss).backward()
            state: dict[str, Any] = {"loss": loss.detach()}
            if step != SPOILED:
                state |= {f"gradient {name}": one.grad.to_local().clone() for name, one in model.named_parameters()}
                optimizer.step()
            else:
                spoiled = [float(not one.grad.to_local().isfinite().all()) for one in model.parameters()]
                dist.all_reduce(any_spoiled := torch.tensor([max(spoiled)]))
                state["spoiled"] = any_spoiled
            optimizer.zero_grad()
            kept, _ = torch.utils._pytree.tree_flatten_with_path(compression.state_dict())
            state |= {f"kept {path}": one.clone() for path, one in kept if isinstance(one, torch.Tensor)}
            found.append(state | {name: one.clone() for name, one in whole(model).items()})
        with torch.inference_mode():
            found.append({"seen": model(batch(context.rank, 0)).clone()})
        compression.detach()
    return found


def compared(context: Rank, reshard: bool | int, dtype: str, options: dict[str, Any]) -> list[str]:
    """What differs."""
    waited, launched = (trained(context, how, reshard, dtype, options) for how in (False, True))
    found = []
    for step, (one, other) in enumerate(zip(waited, launched, strict=True)):
        if set(one) != set(other):
            found.append(f"step {step}: {set(one) ^ set(other)}")
        found += [f"step {step}: {name}" for name in set(one) & set(other) if not torch.equal(one[name], other[name])]
    return found if float(launched[SPOILED]["spoiled"]) else ["nothing arrived as not finite"]


CASES: dict[str, tuple[bool | int, str, dict[str, Any]]] = {
    "usual": (True, "float32", {}),
    "exact": (False, "float32", {"gradients": "float32", "weights": "float32"}),
    "fp4": (True, "float32", {"gradients": "fp4", "weights": "int4", "feedback": "float32"}),
    "sign": (True, "bfloat16", {"gradients": "sign", "weights": "bf16"}),
    "int8": (True, "float64", {"gradients": "int8", "weights": "fp16", "feedback": "none"}),
    "asynchronous": (True, "float32", {"gradients": "bf16", "weights": "int8", "asynchronous": True}),
    "weights": (True, "float32", {"gradients": None, "weights": "int8"}),
}
HYBRID: dict[str, dict[str, Any]] = {
    "int4": {"replicas": "int4"},
    "none": {"replicas": "none"},
    "topk": {"replicas": {"kind": "topk", "k": 64}, "gradients": "int8", "weights": "int8"},
    "powersgd": {"replicas": "powersgd", "asynchronous": True},
}


@pytest.mark.long
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("pool", ["ranks2", "ranks4"])
def test_launches_compute_what_threads_compute(request: pytest.FixtureRequest, pool: str, case: str) -> None:
    """To the bit: gradients, residuals, weights and losses, before and after a step in which a gradient is not finite."""
    ranks: Pool = request.getfixturevalue(pool)
    assert not any(ranks.run(compared, *CASES[case]))


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", HYBRID)
def test_launches_compute_what_threads_compute_over_replicas(ranks4: Pool, kind: str, dtype: str) -> None:
    assert not any(ranks4.run(compared, True, dtype, HYBRID[kind]))


@pytest.mark.long
def test_launches_gather_again_from_fewer_ranks(ranks4: Pool) -> None:
    assert not any(ranks4.run(compared, 2, "float32", {}))


def raised(context: Rank, save: bool) -> str:
    with launches(True):
        model = sharded()
        compression = thinwire.compress_sharded(model, nonfinite="raise")
        try:
            for step in range(STEPS):
                loss = model(batch(context.rank, step))
                (loss * math.nan if step == SPOILED and context.rank == 1 else loss).backward()
                model.zero_grad()
                if save:
                    compression.state_dict()
        except UserError as error:
            return f"{step} {error}"
        finally:
            compression.detach()
    return "nothing was raised"


@pytest.mark.parametrize("save", [False, True])
def test_a_gradient_that_is_not_finite_is_named_one_step_later_or_before_a_state_is_saved(ranks2: Pool, save: bool) -> None:
    for line in ranks2.run(raised, save):
        assert line.startswith(f"{2 if save else 3} the gradient of ")
        assert "is not finite on rank 1, in step 3" in line


FAKE = Path(__file__).parent / "fake_device_sharded.py"


@pytest.mark.long
@pytest.mark.timeout(300)
def test_nothing_is_read_on_the_host_and_no_device_is_mixed() -> None:
    """On `meta`, with fake tensors: what copies to the host is refused."""
    assert alone(FAKE).count("all on the device") == len(GRADIENT_KINDS) + len(WEIGHT_KINDS)
