"""The learning rate is a function of the step; the update is the one that was asked for, of a clipped mean gradient."""

from contextlib import nullcontext
from math import cos, pi
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from thinwire.config.optimizer import SGD, AdamW, Muon, SignSGD
from thinwire.config.run import TrainSection
from thinwire.train.optimizers import make_optimizer
from thinwire.train.step import Stepper, learning_rate


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


def stepped(chosen: Muon | SignSGD, model: nn.Module, gradients: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Parameters after a step with each of these gradients, by name, and a learning rate of 0.1."""
    optimizer = make_optimizer(model, TrainSection(learning_rate=0.1, optimizer=chosen))
    for gradient in gradients:
        for name, parameter in model.named_parameters():
            parameter.grad = gradient[name].clone()
        optimizer.step()
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def embedded() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(9, 6), nn.LayerNorm(6, bias=False), nn.Linear(6, 12, bias=False))


def drawn(model: nn.Module, steps: int) -> list[dict[str, torch.Tensor]]:
    return [{name: torch.randn_like(parameter) for name, parameter in model.named_parameters()} for _ in range(steps)]


def test_muon_equals_the_one_of_pytorch_on_matrices_and_adamw_on_the_rest() -> None:
    """PyTorch's rounds its Newton-Schulz steps to bfloat16: the moves agree to some per cent, and the direction of each does."""
    chosen, model, plain = Muon(weight_decay=0.3), embedded(), embedded()
    gradients, start = drawn(model, 4), [parameter.detach().clone() for parameter in plain.parameters()]
    table, gain, matrix = plain.parameters()
    rest = [{"params": [table], "weight_decay": 0.3}, {"params": [gain], "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(rest, lr=0.1, betas=(chosen.beta1, chosen.beta2), eps=chosen.epsilon)
    muon = torch.optim.Muon([matrix], lr=0.1, weight_decay=0.3, momentum=chosen.momentum, adjust_lr_fn="match_rms_adamw")
    ours = list(stepped(chosen, model, gradients).values())
    for gradient in gradients:
        for name, parameter in plain.named_parameters():
            parameter.grad = gradient[name].clone()
        adamw.step()
        muon.step()
    torch.testing.assert_close(ours[:2], [table.detach(), gain.detach()])
    moved, expected = ours[2] - start[2], matrix.detach() - start[2]
    assert float((moved - expected).norm()) < 0.03 * float(expected.norm())


def test_descent_by_signs_is_its_formula() -> None:
    model = embedded()
    (gradient,), before = drawn(model, 1), {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for name, after in stepped(SignSGD(weight_decay=0.3), model, [gradient]).items():
        decay = 0.3 if after.dim() == 2 else 0.0
        torch.testing.assert_close(after, before[name] - 0.1 * (gradient[name].sign() + decay * before[name]))


class Alone:
    """A synchroniser of one rank, as far as a step calls it."""

    ready_at = None

    def microbatch(self, *, last: bool) -> Any:
        return nullcontext()

    def after_step(self, step: int) -> None: ...


@pytest.mark.parametrize(("clip", "length"), [(0.0, 20.0), (30.0, 20.0), (0.5, 0.5)])
def test_the_mean_gradient_is_clipped_to_its_largest_norm(clip: float, length: float) -> None:
    """Two micro-batches whose gradients are (12, 16) on average, of length 20; half of it with a mean of four a rank."""
    for mean_micro, part in ((None, 1.0), (4.0, 0.5)):
        model = nn.Linear(2, 1, bias=False)
        start = model.weight.detach().clone()
        train = TrainSection(optimizer=SGD(momentum=0.0), learning_rate=1.0, warmup_steps=0, clip=clip)
        stepper = Stepper(
            model=model,
            optimizer=make_optimizer(model, train),
            sync=Alone(),  # type: ignore[arg-type]
            loss=lambda model, batch: model(batch).sum(),
            precision=nullcontext,
            train=train,
        )
        batches = [torch.tensor([[24.0, 0.0]]), torch.tensor([[0.0, 32.0]])]
        stepper.run(0, batches, 2, mean_micro)
        moved = start - model.weight.detach()
        expected = min(length, 20 * part) if clip else 20 * part
        torch.testing.assert_close(moved, torch.tensor([[0.6, 0.8]]) * expected)
