"""Gradients averaged in each step: equal to one process, and exactly the bytes that were predicted."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from pool import Pool, Rank
from thinwire.collectives.ledger import Call, difference
from thinwire.collectives.wire import sent_bytes
from thinwire.config.run import EveryStep
from thinwire.layout import Layout
from thinwire.sync.buckets import assign_buckets
from thinwire.sync.every_step import EveryStepSync
from thinwire.traffic import Transfer
from thinwire.workload import Parameter, Workload

MICRO, WIDTH = 6, 24


def small_model(layers: int = 5) -> nn.Module:
    torch.manual_seed(3)
    stack = [module for _ in range(layers) for module in (nn.Linear(WIDTH, WIDTH, bias=False), nn.Tanh())]
    return nn.Sequential(*stack, nn.Linear(WIDTH, 1, bias=False))


def batch(step: int, micro: int, rank: int) -> torch.Tensor:
    return torch.randn(MICRO, WIDTH, generator=torch.Generator().manual_seed(1000 * step + 10 * micro + rank))


def workload_of(model: nn.Module) -> Workload:
    return Workload.of_parameters([(name, tuple(p.shape)) for name, p in model.named_parameters()], MICRO)


def one_process(steps: int, accumulate: int, world_size: int) -> list[torch.Tensor]:
    """The reference: plain PyTorch on the whole batch, nothing of ours."""
    torch.manual_seed(3)
    stack = [module for _ in range(5) for module in (nn.Linear(WIDTH, WIDTH, bias=False), nn.Tanh())]
    model = nn.Sequential(*stack, nn.Linear(WIDTH, 1, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(steps):
        whole = torch.cat([batch(step, micro, rank) for micro in range(accumulate) for rank in range(world_size)])
        optimizer.zero_grad()
        model(whole).square().mean().backward()
        optimizer.step()
    return [parameter.detach() for parameter in model.parameters()]


def train_on_ranks(context: Rank, steps: int, accumulate: int, bucket_bytes: int) -> dict:
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sync = EveryStepSync(EveryStep(accumulate=accumulate, bucket_bytes=bucket_bytes), "data", context.ledger)
    mesh = init_device_mesh("cpu", (context.world_size,), mesh_dim_names=("data",))
    after_first = None
    with sync.attached(model, optimizer, mesh) as replica:
        for step in range(steps):
            if step == 1:
                after_first = context.ledger.snapshot()
            for micro in range(accumulate):
                with sync.microbatch(last=micro == accumulate - 1):
                    (replica(batch(step, micro, context.rank)).square().mean() / accumulate).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
            sync.after_step(step)
    steady = {
        call: total for call, total in difference(context.ledger.snapshot(), after_first).items() if call.label[:6] == "bucket"
    }
    return {
        "weights": [parameter.detach() for parameter in model.parameters()],
        "steady": steady,
        "predicted": sync.traffic(workload_of(model), Layout(data=context.world_size)),
    }


def unexplained(predicted: list[Transfer], steady: dict, steps: int, world_size: int, rank: int) -> list[str]:
    """What the ledger holds over `steps` steps and the prediction does not, and the other way round; to the byte."""
    wanted = {}
    for transfer in predicted:
        wire = sent_bytes(transfer.op, transfer.message_bytes, world_size, rank) * transfer.calls * steps
        call = Call(
            label=transfer.label, axis=transfer.axis, op=transfer.op, world_size=world_size, message_bytes=transfer.message_bytes
        )
        wanted[call] = (transfer.calls * steps, wire)
    found = {call: (total.calls, total.wire_bytes) for call, total in steady.items()}
    return [f"{call}" for call in wanted.keys() | found.keys() if wanted.get(call) != found.get(call)]


@pytest.mark.parametrize("accumulate", [1, 3])
def test_ranks_equal_one_process(ranks4: Pool, accumulate: int) -> None:
    reference = one_process(4, accumulate, 4)
    for result in ranks4.run(train_on_ranks, 4, accumulate, 2048):
        for ours, theirs in zip(result["weights"], reference, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_replicas_are_bit_equal(ranks4: Pool) -> None:
    first, *others = ranks4.run(train_on_ranks, 3, 1, 2048)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first["weights"], other["weights"], strict=True))


@pytest.mark.parametrize(("pool", "accumulate", "bucket_bytes"), [("ranks2", 1, 1), ("ranks4", 2, 5000), ("ranks4", 1, 0)])
def test_predicted_equals_ledger(request: pytest.FixtureRequest, pool: str, accumulate: int, bucket_bytes: int) -> None:
    ranks: Pool = request.getfixturevalue(pool)
    steps = 4
    for rank, result in enumerate(ranks.run(train_on_ranks, steps, accumulate, bucket_bytes)):
        predicted, steady = result["predicted"], result["steady"]
        assert unexplained(predicted, steady, steps - 1, ranks.world_size, rank) == []
        assert unexplained(predicted[1:], steady, steps - 1, ranks.world_size, rank), "a dropped bucket must be noticed"


@given(
    sizes=st.lists(st.integers(1, 5000), min_size=1, max_size=40),
    bucket_bytes=st.integers(1, 30_000),
)
def test_buckets_hold_every_parameter_once_in_reverse(sizes: list[int], bucket_bytes: int) -> None:
    parameters = [Parameter(f"p{index}", (size,)) for index, size in enumerate(sizes)]
    buckets = assign_buckets(parameters, bucket_bytes)
    assert [parameter for bucket in buckets for parameter in bucket] == parameters[::-1]
    for bucket in buckets[:-1]:
        assert sum(parameter.numel for parameter in bucket) * 4 >= bucket_bytes
        assert sum(parameter.numel for parameter in bucket[:-1]) * 4 < bucket_bytes


@given(accumulate=st.integers(1, 8))
def test_traffic_does_not_grow_with_accumulation(accumulate: int) -> None:
    workload = workload_of(copy.deepcopy(small_model()))
    once = EveryStepSync(EveryStep(), "data", None).traffic(workload, Layout(data=4))  # type: ignore[arg-type]
    more = EveryStepSync(EveryStep(accumulate=accumulate), "data", None).traffic(workload, Layout(data=4))  # type: ignore[arg-type]
    assert once == more
