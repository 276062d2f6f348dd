"""An exchange whose stages are launched on a stream, as on a device: here on CPU tensors, where each value can be compared.

What is computed must be what threads compute, to the bit; what a device must not do (read a value on the host, mix tensors of
two devices) is held on fake tensors, with `meta` in place of a device.
"""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from on_device import alone, two_ranks
from pool import Pool, Rank
from thinwire.collectives.ledger import Ledger
from thinwire.compress.exchange import Exchange, make_exchange
from thinwire.compress.stages import Launches, Stages, Threads
from thinwire.config.compress import Coded, NonFinite
from thinwire.errors import UserError
from thinwire.sync.buckets import Names
from thinwire.sync.hook import Use, _hook
from thinwire.tomlfile import validate

KINDS = (
    *("bf16", "fp16", "int8", "int4", "fp4", "sign", "ternary", "codebook2"),
    *("topk", "topk_global", "randomk", "dgc", "svd", "powersgd", "demo"),
)


def hooked(
    replica: DistributedDataParallel, kind: str, stages: Callable[[torch.device], Stages], nonfinite: NonFinite = "average"
) -> Exchange:
    """As `compress_gradients`, with stages of one's choice."""
    exchange = make_exchange(validate(Coded, {"kind": kind}, "test"), Ledger(), nonfinite, stages)
    names = Names(replica.module)
    use = Use(replica.module.parameters()) if replica.find_unused_parameters else None
    exchange.attach(replica.process_group, "data", names.shapes, names.device, tracks_use=use is not None)
    replica.register_comm_hook((exchange, names, use), _hook)
    return exchange


def threads(device: torch.device) -> Stages:
    return Threads()


class Net(nn.Module):
    """Matrices and vectors of three dtypes in several buckets; `extra` is used in every other step, by rank 1 alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(96, 130)
        self.second = nn.Linear(130, 96).to(torch.bfloat16)
        self.third = nn.Linear(96, 64).double()
        self.extra = nn.Linear(64, 64).double()

    def forward(self, x: torch.Tensor, extra: bool = False) -> torch.Tensor:
        hidden = self.third(self.second(self.first(x).relu().bfloat16()).relu().double())
        return self.extra(hidden) if extra else hidden


def gradients(context: Rank, kind: str, stages: Callable[[torch.device], Stages], unused: bool) -> list[dict[str, torch.Tensor]]:
    """Of each step, and the residuals after it; in the third one rank 1's are not finite."""
    torch.manual_seed(0)
    model = Net()
    replica = DistributedDataParallel(model, bucket_cap_mb=0.02, find_unused_parameters=unused)
    exchange = hooked(replica, kind, stages)
    found = []
    for step in range(5):
        inputs = torch.randn(6, 96, generator=torch.Generator().manual_seed(10 * step + context.rank))
        extra = not unused or (step % 2 == 0 and context.rank == 1)
        loss = replica(inputs, extra).square().mean()
        (loss * math.inf if step == 2 and context.rank == 1 else loss).backward()
        state = {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}
        residuals = {name: values.clone() for name, values in exchange.residuals().items() if values.any()}
        found.append(state | {f"residual {name}": values for name, values in residuals.items()})
        replica.zero_grad()
    exchange.detach()
    return found


def compared(context: Rank, kind: str, unused: bool) -> list[str]:
    """What differs, and where launches leave a gradient of a spoiled step finite everywhere or differ between ranks."""
    waited, launched = (gradients(context, kind, stages, unused) for stages in (threads, Launches))
    found = []
    for step, (one, other) in enumerate(zip(waited, launched, strict=True)):
        if set(one) != set(other):
            found.append(f"step {step}: {set(one) ^ set(other)}")
        for name in set(one) & set(other):
            if name.startswith("residual") or step != 2:
                if not torch.equal(one[name], other[name]):
                    found.append(f"step {step}: {name}")
            elif bool(one[name].isfinite().all()) and not name.startswith("extra"):
                found.append(f"step {step}: {name} is finite on threads")
            elif bool(other[name].isfinite().all()) and not name.startswith("extra"):
                found.append(f"step {step}: {name} is finite")
    for name, values in launched[2].items():
        if not name.startswith("residual"):
            own = values.isfinite().to(torch.uint8).flatten()
            everyone = [torch.empty_like(own) for _ in range(dist.get_world_size())]
            dist.all_gather(everyone, own)
            if not all(torch.equal(own, one) for one in everyone):
                found.append(f"{name} is not finite elsewhere on other ranks")
    return found


@pytest.mark.parametrize("unused", [False, True], ids=["all used", "unused"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pool", ["ranks2", "ranks4"])
def test_launches_compute_what_threads_compute(request: pytest.FixtureRequest, pool: str, kind: str, unused: bool) -> None:
    """To the bit, gradients and residuals, before and after a step in which a gradient is not finite on one rank."""
    ranks: Pool = request.getfixturevalue(pool)
    assert not any(ranks.run(compared, kind, unused))


def raised(context: Rank, kind: str, save: bool) -> str:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 64))
    replica = DistributedDataParallel(model, bucket_cap_mb=0.02)
    exchange = hooked(replica, kind, Launches, "raise")
    try:
        for step in range(5):
            loss = replica(torch.ones(2, 64)).square().mean()
            (loss * math.nan if step == 2 and context.rank == 1 else loss).backward()
            replica.zero_grad()
            if save:
                exchange.state_dict()
    except UserError as error:
        return f"{step} {error}"
    finally:
        exchange.detach()
    return "nothing was raised"


@pytest.mark.parametrize("save", [False, True])
@pytest.mark.parametrize("kind", ["int4", "topk", "bf16", "powersgd"])
def test_a_gradient_that_is_not_finite_is_named_one_step_later_or_before_a_state_is_saved(
    ranks2: Pool, kind: str, save: bool
) -> None:
    for line in ranks2.run(raised, kind, save):
        assert line.startswith(f"{2 if save else 3} the gradient of ")
        assert "is not finite on rank 1, in step 3" in line


@given(st.lists(st.integers(1, 6), min_size=1, max_size=4))
def test_stages_are_launched_skewed_and_complete(passes: list[int]) -> None:
    """In each pass of so many buckets, and nothing of one is left for the next."""
    order: list[tuple[str, int]] = []
    launches, futures = Launches(torch.device("cpu")), []

    def note(stage: str, bucket: int) -> torch.Tensor:
        order.append((stage, bucket))
        return torch.tensor(bucket)

    def run(bucket: int, last: bool) -> None:
        steps = [lambda stage=stage: note(stage, bucket) for stage in ("first", "second", "third")]
        futures.append(launches.run(*steps, torch.zeros(()), lambda error: pytest.fail(str(error)), last=last))

    for buckets in passes:
        order.clear()
        futures.clear()
        for bucket in range(buckets):
            run(bucket, bucket == buckets - 1)
        assert [int(future.wait()) for future in futures] == list(range(buckets))
        for stage in ("first", "second", "third"):
            assert [bucket for its, bucket in order if its == stage] == list(range(buckets))
        for bucket in range(buckets):
            places = [order.index((stage, bucket)) for stage in ("first", "second", "third")]
            assert places == sorted(places)
            if bucket + 1 < buckets:
                assert order.index(("first", bucket + 1)) < places[1], "the next codes are on the wire before one waits"
                assert order.index(("second", bucket + 1)) < places[2]


def test_a_stage_that_fails_is_told_and_every_future_is_there() -> None:
    launches, errors = Launches(torch.device("cpu")), []

    def fail() -> None:
        raise ValueError("no")

    futures = [
        launches.run(stage, lambda: None, lambda: torch.ones(()), torch.zeros(()), errors.append, last=last)
        for stage, last in ((lambda: None, False), (fail, False), (lambda: None, True))
    ]
    assert [float(future.wait()) for future in futures] == [1.0, 0.0, 1.0]
    assert [str(error) for error in errors] == ["no"]


FAKE = Path(__file__).parent / "fake_device.py"


@pytest.mark.long
@pytest.mark.timeout(300)
def test_nothing_is_read_on_the_host_and_no_device_is_mixed() -> None:
    """On `meta`, with fake tensors: `.item()` and tensors of two devices are refused there, copies to the CPU by the test."""
    assert alone(FAKE, *KINDS).strip().endswith("all on the device")


@pytest.mark.long
@pytest.mark.timeout(300)
def test_an_exchange_holds_two_residuals_and_some_buckets_at_most() -> None:
    """However many buckets there are, and no more in the next pass; beside gradients, where a spoiled step leaves no trace."""
    script = Path(__file__).parent / "fake_device_memory.py"
    for line in alone(script, "int4", "int8", "topk", "powersgd", "bf16").splitlines():
        kind, kept, buckets = line.split()
        assert float(kept) == (0.0 if kind == "bf16" else pytest.approx(1.0, abs=0.01)), line
        assert float(buckets) <= 3.2, line


RANKS = Path(__file__).parent / "device_ranks.py"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.timeout(300)
def test_a_gpu_delivers_what_a_cpu_delivers() -> None:
    """Two ranks that share it, over NCCL, against gloo and threads: to the bit where the arithmetic is exact."""
    two_ranks(RANKS, "cuda", *KINDS)


@pytest.mark.long
def test_the_test_for_gpus_runs_without_one() -> None:
    two_ranks(RANKS, "cpu", "int4", "bf16")
