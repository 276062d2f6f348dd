"""Paced compute on real ranks: half the rate takes twice the time, and gradients come when they would."""

import time

import pytest
import torch
from torch import nn

from pool import Pool, Rank
from thinwire.errors import UserError
from thinwire.train.pace import Pacer


def paced_seconds(context: Rank, pass_s: list[float]) -> dict[str, float]:
    """Rank r runs with forward pass_s[r] and backward twice that; 0: it idles."""
    mine = pass_s[context.rank]
    if not mine:
        return {}
    model = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4)])
    pacer = Pacer(forward_s=mine, backward_s=2 * mine)
    ready: list[float] = []
    for block in model:
        block[0].weight.register_post_accumulate_grad_hook(lambda _: ready.append(time.perf_counter()))
    with pacer.attached(list(model)):
        for _ in range(2):
            ready.clear()
            started = time.perf_counter()
            loss = model(torch.randn(4, 8, requires_grad=True)).sum()
            middle = time.perf_counter()
            loss.backward()
            ended = time.perf_counter()
    free = time.perf_counter()
    model(torch.randn(4, 8)).sum().backward()
    return {
        "forward_s": middle - started,
        "backward_s": ended - middle,
        "first_gradient": (ready[0] - middle) / (ended - middle),
        "unpaced_s": time.perf_counter() - free,
    }


def test_half_the_rate_takes_twice_as_long_while_others_idle(ranks4: Pool) -> None:
    full, half, *_ = ranks4.run(paced_seconds, [0.1, 0.2, 0, 0])
    for name in ("forward_s", "backward_s"):
        assert half[name] / full[name] == pytest.approx(2.0, rel=0.1)
    assert full["forward_s"] == pytest.approx(0.1, rel=0.1) and full["backward_s"] == pytest.approx(0.2, rel=0.1)
    assert full["unpaced_s"] < 0.05, "hooks off at the end"


def test_gradients_become_ready_at_the_end_of_their_block(ranks2: Pool) -> None:
    for seconds in ranks2.run(paced_seconds, [0.2, 0.2]):
        assert seconds["first_gradient"] == pytest.approx(0.25, abs=0.06)


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(UserError, match="repeated blocks"), Pacer(0.1, 0.1).attached([]):
        pass
