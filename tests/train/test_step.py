"""The learning rate is a function of the step; the update is the one that was asked for."""

from math import cos, pi

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from thinwire.config.run import SGD, AdamW, TrainSection
from thinwire.train.optimizers import make_optimizer
from thinwire.train.step import learning_rate


@given(steps=st.integers(1, 500), warmup=st.integers(0, 100), peak=st.floats(1e-6, 1.0), final=st.floats(0.0, 1.0))
def test_learning_rate_rises_then_falls_to_its_end(steps: int, warmup: int, peak: float, final: float) -> None:
    train = TrainSection(steps=steps, warmup_steps=warmup, learning_rate=peak, final_learning_rate=final)
    rates = [learning_rate(train, step) for step in range(steps)]
    assert all(0 <= rate <= peak * (1 + 1e-9) for rate in rates)
    up, down = rates[:warmup], rates[warmup:]
    assert up == sorted(up) and down == sorted(down, reverse=True)
    assert learning_rate(train, max(steps, warmup + 1)) == pytest.approx(peak * final, abs=1e-12) or steps <= warmup
    if warmup < steps:
        assert learning_rate(train, warmup) == pytest.approx(peak)


def test_learning_rates_of_a_short_run_are_these() -> None:
    """Warm-up in equal parts that reach the peak in the step after it, and half a cosine from there on."""
    train = TrainSection(steps=8, warmup_steps=3, learning_rate=0.4, final_learning_rate=0.5)
    rates = [learning_rate(train, step) for step in range(10)]
    fall = [0.2 + 0.2 * (0.5 + 0.5 * cos(pi * step / 5)) for step in range(6)]
    assert rates == pytest.approx([0.1, 0.2, 0.3, *fall, 0.2])


@pytest.mark.parametrize("chosen", [AdamW(weight_decay=0.1), SGD(momentum=0.8, weight_decay=0.01)])
def test_optimizer_equals_the_plain_one_of_pytorch(chosen: AdamW | SGD) -> None:
    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 7, bias=False), nn.LayerNorm(7, bias=False), nn.Linear(7, 1, bias=False))

    ours, theirs = model(), model()
    matrices = [p for p in theirs.parameters() if p.dim() == 2]
    vectors = [p for p in theirs.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": chosen.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    plain: torch.optim.Optimizer = torch.optim.SGD(groups, lr=0.01, momentum=0.8)
    if isinstance(chosen, AdamW):
        plain = torch.optim.AdamW(groups, lr=0.01, betas=(chosen.beta1, chosen.beta2), eps=chosen.epsilon)
    optimizer = make_optimizer(ours, TrainSection(learning_rate=0.01, optimizer=chosen))
    for _ in range(5):
        for each, step in ((ours, optimizer), (theirs, plain)):
            step.zero_grad()
            each(torch.ones(2, 5)).square().sum().backward()
            step.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b)
