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


TRIES = 5


def paced_seconds(context: Rank, pass_s: list[float]) -> dict:
    """Rank r runs with forward pass_s[r] and backward twice that. Of some tries the least of each: a busy machine wakes a sleeper
    late, but never early."""
    mine = pass_s[context.rank]
    model = nn.Sequential(*[nn.Linear(8, 8, bias=False) for _ in range(4)])
    pacer = Pacer(forward_s=mine, backward_s=2 * mine)
    ready: list[float] = []
    for layer in model:
        layer.weight.register_post_accumulate_grad_hook(lambda _: ready.append(time.perf_counter()))
    forward_s, backward_s, evaluation_s, detached_s = [], [], [], []
    moments: list[list[float]] = []
    with pacer.attached(model, workload_of(model)):
        for _ in range(TRIES):
            ready.clear()
            started = time.perf_counter()
            loss = model(torch.randn(4, 8, requires_grad=True)).sum()
            middle = time.perf_counter()
            loss.backward()
            forward_s.append(middle - started)
            backward_s.append(time.perf_counter() - middle)
            moments.append([moment - middle for moment in ready])
        for _ in range(TRIES):
            started = time.perf_counter()
            with torch.no_grad():
                model(torch.randn(4, 8))
            evaluation_s.append(time.perf_counter() - started)
    for _ in range(TRIES):
        started = time.perf_counter()
        model(torch.randn(4, 8)).sum().backward()
        detached_s.append(time.perf_counter() - started)
    return {
        "forward_s": min(forward_s),
        "backward_s": min(backward_s),
        "ready_s": [min(tries) for tries in zip(*moments, strict=True)],
        "evaluation_s": min(evaluation_s),
        "detached_s": min(detached_s),
        "declared_s": pacer.declared_s,
    }


@pytest.mark.timed
def test_half_the_rate_takes_twice_as_long_and_gradients_become_ready_when_they_would(ranks2: Pool) -> None:
    """Passes never end earlier, and later by less than half of what half the rate would add."""
    found = ranks2.run(paced_seconds, [0.06, 0.12])
    for rank, forward_s in zip(found, (0.06, 0.12), strict=True):
        assert 0.999 * forward_s < rank["forward_s"] < 1.5 * forward_s
        assert rank["ready_s"] == pytest.approx([forward_s / 2 * matrix for matrix in (1, 2, 3, 4)], abs=forward_s / 4)
        assert 1.999 * forward_s < rank["backward_s"] < 3 * forward_s
        assert rank["detached_s"] < forward_s / 2 and rank["evaluation_s"] < forward_s / 2
        assert rank["declared_s"] == pytest.approx(TRIES * 3 * forward_s)


def test_a_model_without_linear_layers_is_refused() -> None:
    model = nn.Embedding(3, 4)
    with (
        pytest.raises(UserError, match="linear layers"),
        Pacer(0.1, 0.1).attached(model, Workload.of_parameters([("weight", (3, 4))], 1)),
    ):
        pass
