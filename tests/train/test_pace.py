"""Paced compute on real ranks: half the rate takes twice the time, and gradients come when they would."""

import time

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from pool import Pool, Rank
from thinwire.collectives.clock import HostClock
from thinwire.config.model import ModelConfig
from thinwire.errors import UserError
from thinwire.models.transformer import Transformer
from thinwire.parallel import recompute, tensor
from thinwire.parallel.tensor_parts import local_workload
from thinwire.parallel.waits import Waits
from thinwire.tasks import costs
from thinwire.tasks.lm_lstm import LSTMModel
from thinwire.tasks.recommendation import Factors
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


def paced_tensor_ranks(context: Rank, pass_s: list[float]) -> dict:
    """As `paced_seconds`, of a model whose matrices both ranks share; with the seconds that a rank waited for the other."""
    config = ModelConfig.model_validate({"layers": 2, "width": 16, "heads": 2, "vocabulary": 32, "context": 16})
    model, waits = Transformer(config), Waits(HostClock())
    tensor.apply(model, init_device_mesh("cpu", (2,), mesh_dim_names=("tensor",)).get_group(), context.ledger, waits=waits)
    workload = local_workload(Workload.of_transformer(config, 2, 16), config, 2, context.rank)
    mine, tokens = pass_s[context.rank], torch.zeros(2, 16, dtype=torch.int64)
    pacer = Pacer(forward_s=mine, backward_s=2 * mine, waits=waits)
    whole_s, waited_s = [], []
    with pacer.attached(model, workload):
        for _ in range(TRIES):
            dist.barrier()
            waits.clear()
            started = time.perf_counter()
            model(tokens, tokens).backward()
            whole_s.append(time.perf_counter() - started)
            waited_s.append(waits.seconds())
    computed_s = min(whole - waited for whole, waited in zip(whole_s, waited_s, strict=True))
    return {"whole_s": min(whole_s), "waited_s": min(waited_s), "computed_s": computed_s, "late": pacer.missed_fraction}


@pytest.mark.timed
def test_a_tensor_rank_computes_at_its_own_rate_and_waits_for_a_slower_one(ranks2: Pool) -> None:
    """Its pass takes as long as the slower one's, and what is not computing is waiting: nothing hides in what is paced."""
    fast, slow = ranks2.run(paced_tensor_ranks, [0.03, 0.09])
    for rank, forward_s in ((fast, 0.03), (slow, 0.09)):
        assert 0.999 * 3 * forward_s < rank["computed_s"] < 1.5 * 3 * forward_s
    assert fast["whole_s"] > 0.8 * 3 * 0.09 and slow["whole_s"] < 1.5 * 3 * 0.09
    assert fast["waited_s"] > 0.7 * 3 * (0.09 - 0.03) and slow["waited_s"] < 0.5 * 3 * 0.09


@pytest.mark.timed
def test_what_is_computed_again_takes_its_time_going_backward() -> None:
    """At the declared rate, and going forward as long as without it."""
    config = ModelConfig.model_validate({"layers": 3, "width": 16, "heads": 2, "vocabulary": 32, "context": 16})
    model, tokens = Transformer(config), torch.zeros(2, 16, dtype=torch.int64)
    kinds = {f"blocks.{index}": "full" for index in range(3)}
    recompute.apply(model, kinds)
    workload = Workload.of_transformer(config, 2, 16).recomputing(kinds)
    pacer = Pacer.of(workload, workload.flops_per_microbatch / 0.3)
    assert pacer.backward_s > 2.3 * pacer.forward_s
    seconds = []
    with pacer.attached(model, workload):
        for _ in range(TRIES):
            begun = time.perf_counter()
            loss = model(tokens, tokens)
            between = time.perf_counter()
            loss.backward()
            seconds.append((between - begun, time.perf_counter() - between))
    forward_s, backward_s = (min(times) for times in zip(*seconds, strict=True))
    assert 0.999 * pacer.forward_s < forward_s < 1.5 * pacer.forward_s
    assert 0.999 * pacer.backward_s < backward_s < 1.3 * pacer.backward_s


@pytest.mark.long
@pytest.mark.timed
@pytest.mark.parametrize("model", [LSTMModel(32, 8, 1), Factors(32, 9, 4)], ids=["recurrent", "embeddings"])
def test_layers_of_tasks_take_their_time(model: nn.Module) -> None:
    """Both ways, though no linear layer is the first, or there is none."""
    model, tokens = model.double(), torch.zeros(2, 8, dtype=torch.int64)
    given = tokens if isinstance(model, LSTMModel) else tokens[:, 0]
    workload = costs.workload_of(model, lambda: model(given).sum(), 2, "float64")
    pacer, seconds = Pacer.of(workload, workload.flops_per_microbatch / 0.09), []
    with pacer.attached(model, workload):
        for _ in range(TRIES):
            begun = time.perf_counter()
            loss = model(given).sum()
            between = time.perf_counter()
            loss.backward()
            seconds.append((between - begun, time.perf_counter() - between))
    forward_s, backward_s = (min(times) for times in zip(*seconds, strict=True))
    assert 0.03 < forward_s < 0.045 and 0.06 < backward_s < 0.08
    assert pacer.declared_s == pytest.approx(TRIES * 0.09)


def test_a_model_without_linear_layers_is_refused() -> None:
    model = nn.LayerNorm((3, 4))
    with (
        pytest.raises(UserError, match="linear layers"),
        Pacer(0.1, 0.1).attached(model, Workload.of_parameters([("weight", (3, 4))], 1)),
    ):
        pass
