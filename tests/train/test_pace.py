"""Paced compute on real ranks: half the rate takes twice the time, and gradients come when they would."""

import time

import pytest
import torch
from torch import nn

from pool import Pool, Rank
from thinwire.errors import UserError
from thinwire.train.pace import Pacer
from thinwire.workload import Workload


def workload_of(model: nn.Module) -> Workload:
    return Workload.of_parameters([(name, tuple(p.shape)) for name, p in model.named_parameters()], 4)


def paced_seconds(context: Rank, pass_s: list[float]) -> dict:
    """Rank r runs with forward pass_s[r] and backward twice that; 0: it idles."""
    mine = pass_s[context.rank]
    if not mine:
        return {}
    model = nn.Sequential(*[nn.Linear(8, 8, bias=False) for _ in range(4)])
    pacer = Pacer(forward_s=mine, backward_s=2 * mine)
    ready: list[float] = []
    for layer in model:
        layer.weight.register_post_accumulate_grad_hook(lambda _: ready.append(time.perf_counter()))
    with pacer.attached(model, workload_of(model)):
        for _ in range(2):
            ready.clear()
            started = time.perf_counter()
            loss = model(torch.randn(4, 8, requires_grad=True)).sum()
            middle = time.perf_counter()
            loss.backward()
            ended = time.perf_counter()
        with torch.no_grad():
            unpaced = time.perf_counter()
            model(torch.randn(4, 8))
            unpaced = time.perf_counter() - unpaced
    free = time.perf_counter()
    model(torch.randn(4, 8)).sum().backward()
    return {
        "forward_s": middle - started,
        "backward_s": ended - middle,
        "ready": [(moment - middle) / (ended - middle) for moment in ready[:4]],
        "evaluation_s": unpaced,
        "detached_s": time.perf_counter() - free,
        "declared_s": pacer.declared_s,
    }


def test_half_the_rate_takes_twice_as_long_while_others_idle(ranks4: Pool) -> None:
    full, half, *_ = ranks4.run(paced_seconds, [0.25, 0.5, 0, 0])
    for name in ("forward_s", "backward_s"):
        assert half[name] / full[name] == pytest.approx(2.0, rel=0.1)
    assert full["forward_s"] == pytest.approx(0.25, rel=0.1) and full["backward_s"] == pytest.approx(0.5, rel=0.1)
    assert full["detached_s"] < 0.05 and full["evaluation_s"] < 0.05
    assert full["declared_s"] == pytest.approx(1.5)


def test_gradients_become_ready_when_they_would(ranks2: Pool) -> None:
    for seconds in ranks2.run(paced_seconds, [0.3, 0.3]):
        assert seconds["ready"] == pytest.approx([0.25, 0.5, 0.75, 1.0], abs=0.06)


def test_a_model_without_linear_layers_is_refused() -> None:
    model = nn.Embedding(3, 4)
    with (
        pytest.raises(UserError, match="linear layers"),
        Pacer(0.1, 0.1).attached(model, Workload.of_parameters([("weight", (3, 4))], 1)),
    ):
        pass
