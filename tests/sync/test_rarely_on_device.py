"""Replicas that exchange rarely, as on a device: here on CPU tensors, where each value can be compared with the CPU's path.

That nothing is read on the host is held on fake tensors, with `meta` in place of a device.
"""

import math
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from cases import long
from rarely_kinds import KINDS, net
from torch import nn

import thinwire
from on_device import alone, two_ranks
from pool import Pool, Rank
from thinwire.errors import UserError

STEPS = 9


def loss_of(model: nn.Module, step: int, rank: int) -> torch.Tensor:
    x = torch.randn(6, 24, generator=torch.Generator().manual_seed(100 * step + rank))
    for layer in model:  # type: ignore[attr-defined]
        x = layer(x.to(layer.weight.dtype)).tanh()
    return (x - 1).square().mean()


def train(outer: Any, model: nn.Module, optimizer: torch.optim.Optimizer, rank: int, steps: range) -> list[torch.Tensor]:
    """What the model holds after each step, and what counts."""
    found = []
    for step in steps:
        loss_of(model, step, rank).backward()
        optimizer.step()
        optimizer.zero_grad()
        found += [one.detach().clone() for one in model.parameters()]
        if step % 4 == 1:
            with outer.averaged():
                found += [one.detach().clone() for one in model.parameters()]
    return found


def lived(context: Rank, options: dict[str, Any], launched: bool) -> list[torch.Tensor]:
    """All values of a run in two lives, the second one resumed in the middle of a period."""
    found, cut = [], 5
    with (
        mock.patch("thinwire.compress.stages.launched", return_value=launched),
        mock.patch("thinwire.sync.nested.launched", return_value=launched),
    ):
        model = net()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
        with thinwire.DiLoCo(model, optimizer, **options) as outer:
            found += train(outer, model, optimizer, context.rank, range(cut))
            state = outer.state_dict()
            again = net()
            again.load_state_dict(model.state_dict())
            resumed = torch.optim.AdamW(again.parameters(), lr=0.02)
            resumed.load_state_dict(optimizer.state_dict())
        found += [one.detach().clone() for one in model.parameters()]
        outer = thinwire.DiLoCo(again, resumed, **options)
        outer.load_state_dict(state)
        with outer:
            found += train(outer, again, resumed, context.rank, range(cut, STEPS))
            found += leaves(outer.state_dict())
        return [*found, *(one.detach().clone() for one in again.parameters())]


def leaves(state: Any) -> list[torch.Tensor]:
    return [one.clone() for one in torch.utils._pytree.tree_leaves(state) if isinstance(one, torch.Tensor)]


def compared(context: Rank, options: dict[str, Any]) -> list[int]:
    """Places of values that differ."""
    cpu = {key: value for key, value in options.items() if key != "outer_device"}
    waited, launched = lived(context, cpu, False), lived(context, options, True)
    assert len(waited) == len(launched) > 50
    return [index for index, (one, other) in enumerate(zip(waited, launched, strict=True)) if not torch.equal(one, other)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pool", ["ranks2", long("ranks4")])
def test_launches_compute_what_threads_compute(request: pytest.FixtureRequest, pool: str, kind: str) -> None:
    """To the bit, models, anchors, momenta and residuals, wherever anchors lie, also of a run that was resumed."""
    ranks: Pool = request.getfixturevalue(pool)
    assert not any(ranks.run(compared, KINDS[kind]))


def raised(context: Rank, launched: bool, options: dict[str, Any], save: bool) -> str:
    """In the fourth step rank 1's model is no number any more."""
    with mock.patch("thinwire.compress.stages.launched", return_value=launched):
        model = net()
        optimizer, step = torch.optim.SGD(model.parameters(), lr=0.1), -1
        try:
            with thinwire.DiLoCo(model, optimizer, compress="int8", **options) as outer:
                for step in range(7):
                    (loss_of(model, step, context.rank) * (math.nan if step == 3 and context.rank == 1 else 1)).backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    if save:
                        outer.state_dict()
                step = 7
        except UserError as error:
            return f"{step} {error}"
    return "nothing was raised"


@pytest.mark.parametrize(
    ("options", "save", "expected"),
    [
        ({"every": 2}, False, (3, 5)),
        ({"every": 2}, True, (3, 3)),
        ({"every": 5}, False, (4, 7)),
        ({"every": 10}, False, (7, 7)),
        ({"kind": "streaming", "every": 4, "layers_per_fragment": 1, "overlap": 1}, True, (3, 3)),
    ],
    ids=["a period later", "before a state is saved", "a period later, at the end", "at the end", "in the middle of a period"],
)
def test_what_is_not_finite_is_named_a_period_later_or_before_a_state_is_saved(
    ranks2: Pool, options: dict[str, Any], save: bool, expected: tuple[int, int]
) -> None:
    for launched, step in zip((False, True), expected, strict=True):
        for line in ranks2.run(raised, launched, options, save):
            assert line.startswith(f"{step} the gradient of ") and "is not finite on rank 1" in line


FAKE = Path(__file__).parent / "fake_device_rarely.py"


@pytest.mark.long
@pytest.mark.timeout(300)
def test_nothing_is_read_on_the_host_and_no_device_is_mixed() -> None:
    """On `meta`, with fake tensors; copies to the host are refused unless they go on by themselves."""
    assert alone(FAKE, *KINDS).count("all on the device") == len(KINDS)


RANKS = Path(__file__).parent / "device_replicas.py"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.timeout(300)
def test_a_gpu_computes_what_a_cpu_computes() -> None:
    """DiLoCo with all its kinds, and FSDP2: two ranks that share it, over NCCL, against gloo and threads."""
    two_ranks(RANKS, "cuda")


@pytest.mark.long
def test_the_test_for_gpus_runs_without_one() -> None:
    two_ranks(RANKS, "cpu")
