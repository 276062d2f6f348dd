"""Gradients as people have them: of every dtype, mixed and sparse, scaled losses, and values that are not finite."""

import copy
import math
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import thinwire
from pool import Pool, Rank
from thinwire.collectives.wire import sent_bytes
from thinwire.config.compress import SUMMABLE
from thinwire.errors import UserError
from thinwire.workload import Parameter

KINDS = (
    *("bf16", "fp16", "int8", "int4", "fp4", "sign", "ternary", "codebook2"),
    *("topk", "topk_global", "randomk", "dgc", "svd", "powersgd", "demo"),
)
QUICK = ("bf16", "int8", "int4", "topk", "dgc", "powersgd", "randomk", "demo")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "float64": torch.float64}


class Mixed(nn.Module):
    """A layer of `dtype` between others, a complex parameter, and an embedding whose gradients are sparse."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 64, sparse=True)
        self.first = nn.Linear(64, 48).to(dtype)
        self.middle = nn.Linear(48, 40)
        self.pairs = nn.Parameter(torch.randn(30, 40, dtype=torch.complex64))
        self.last = nn.Linear(30, 20).double()

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        hidden = self.middle(self.first(self.words(words).to(self.first.weight.dtype)).float())
        return self.last((hidden.to(torch.complex64) @ self.pairs.t()).abs().double())


def words(step: int, rank: int) -> torch.Tensor:
    return torch.randint(0, 50, (8,), generator=torch.Generator().manual_seed(100 * step + rank))


def real(gradient: torch.Tensor) -> torch.Tensor:
    gradient = gradient.to_dense() if gradient.is_sparse else gradient
    return torch.view_as_real(gradient) if gradient.is_complex() else gradient


def equal_on_all_ranks(tensor: torch.Tensor) -> bool:
    """To the bit, nans too."""
    own = tensor.detach().contiguous().view(torch.uint8).flatten()
    everyone = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, own)
    return all(torch.equal(one, own) for one in everyone)


def every_dtype(context: Rank, kind: str, dtype: str) -> dict[str, object]:
    torch.manual_seed(0)
    model = Mixed(DTYPES[dtype])
    stock = copy.deepcopy(model)
    replica, plain = DistributedDataParallel(model), DistributedDataParallel(stock)
    exchange = thinwire.compress_gradients(replica, kind)
    found: dict[str, object] = {"equal": True}
    for step in range(4):
        loss = replica(words(step, context.rank)).square().mean()
        residuals = {name: values.clone() for name, values in exchange.residuals().items()}
        (loss * math.inf if step == 2 and context.rank == 1 else loss).backward()
        found["equal"] &= all(equal_on_all_ranks(real(one.grad)) for one in model.parameters())
        if step == 0:
            plain(words(step, context.rank)).square().mean().backward()
            found["sparse"] = torch.allclose(model.words.weight.grad.to_dense(), stock.words.weight.grad.to_dense())
        if step == 2:
            after = exchange.residuals()
            found["finite"] = [name for name, one in model.named_parameters() if bool(real(one.grad).isfinite().all())]
            found["kept"] = set(after) == set(residuals) and all(torch.equal(after[name], residuals[name]) for name in after)
        replica.zero_grad()
    found["residuals"] = {name: str(values.dtype) for name, values in exchange.residuals().items()}
    exchange.detach()
    return found


def check(reports: list[dict[str, object]], kind: str, dtype: str) -> None:
    for report in reports:
        assert report["equal"] and report["sparse"] and report["kept"] and report["finite"] == []
        if kind not in SUMMABLE:
            residuals = report["residuals"]
            assert {residuals[name] for name in residuals if name.startswith("last.")} <= {"torch.float64"}
            assert {residuals[name] for name in residuals if name in ("middle.weight", "pairs")} == {"torch.float32"}
            assert residuals["first.weight"] == ("torch.float64" if dtype == "float64" else "torch.float32")


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
@pytest.mark.parametrize("kind", QUICK)
def test_replicas_are_equal_to_the_bit_for_every_kind_of_parameter(ranks3: Pool, kind: str, dtype: str) -> None:
    """And a gradient that is not finite on one rank is so on all, after which residuals are what they were."""
    check(ranks3.run(every_dtype, kind, dtype), kind, dtype)


@pytest.mark.long
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pool", ["ranks2", "ranks4"])
def test_replicas_are_equal_to_the_bit_for_every_kind_and_dtype(
    request: pytest.FixtureRequest, pool: str, kind: str, dtype: str
) -> None:
    ranks: Pool = request.getfixturevalue(pool)
    check(ranks.run(every_dtype, kind, dtype), kind, dtype)


def conserved(context: Rank, kind: str, dtype: str) -> float:
    """The largest part of 1/p sum_i g_i, over three steps, that neither arrived nor is in the residuals."""
    torch.manual_seed(0)
    model = nn.Linear(40, 60, bias=False).to(DTYPES[dtype])
    replica = DistributedDataParallel(model)
    exchange = thinwire.compress_gradients(replica, kind)
    given, arrived = torch.zeros(2400, dtype=torch.float64), torch.zeros(2400, dtype=torch.float64)
    for step in range(3):
        inputs = torch.randn(5, 40, generator=torch.Generator().manual_seed(10 * step + context.rank)).to(DTYPES[dtype])
        own = torch.autograd.grad(model(inputs).square().sum(), model.weight)[0].double().flatten()
        dist.all_reduce(own)
        given += own / context.world_size
        replica(inputs).square().sum().backward()
        arrived += model.weight.grad.double().flatten()
        replica.zero_grad()
    owed = exchange.residuals()["weight"].double()
    dist.all_reduce(owed)
    exchange.detach()
    return float((given - arrived - owed / context.world_size).abs().max() / given.abs().max())


@pytest.mark.parametrize(("dtype", "most"), [("float64", 1e-7), ("float32", 1e-6), ("bfloat16", 2**-7)])
@pytest.mark.parametrize("kind", ["int4", "topk", "powersgd"])
def test_what_has_not_arrived_is_in_the_residuals(ranks3: Pool, kind: str, dtype: str, most: float) -> None:
    """Results in bfloat16 are rounded once, which nobody keeps."""
    assert max(ranks3.run(conserved, kind, dtype)) < most


def sent_as_predicted(context: Rank, kind: str, dtype: str) -> tuple[int, int]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 64), nn.Linear(64, 30)).to(DTYPES[dtype])
    replica = DistributedDataParallel(model)
    exchange = thinwire.compress_gradients(replica, kind)
    inputs = torch.ones(2, 40, dtype=DTYPES[dtype])
    for _ in range(2):  # with the second pass DistributedDataParallel sends how it has formed its buckets
        replica(inputs).sum().backward()
    before = sum(total.wire_bytes for total in context.recorded().values())
    replica(inputs).sum().backward()
    sent = sum(total.wire_bytes for total in context.recorded().values()) - before
    world_size = context.world_size
    transfers = exchange.transfers(
        "bucket",
        [Parameter(name, tuple(one.shape), dtype=dtype) for name, one in reversed(list(model.named_parameters()))],
        "data",
        world_size,
    )
    expected = sum(sent_bytes(one.op, one.message_bytes, world_size, context.rank) for one in transfers)
    exchange.detach()
    return sent, expected


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["bf16", "int4", "topk", "powersgd", "randomk"])
def test_what_is_sent_is_what_was_predicted(ranks3: Pool, kind: str, dtype: str) -> None:
    for sent, expected in ranks3.run(sent_as_predicted, kind, dtype):
        assert sent == expected


def scaled(context: Rank, kind: str) -> list[tuple[float, bool, bool]]:
    """After each step: the scale, whether weights are equal on all ranks, whether the step has changed them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 48), nn.Linear(48, 32))
    replica = DistributedDataParallel(model)
    exchange = thinwire.compress_gradients(replica, kind)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    found = []
    for step in range(5):
        before, residuals = model[0].weight.detach().clone(), exchange.residuals()
        inputs = torch.randn(4, 32, generator=torch.Generator().manual_seed(10 * step + context.rank))
        if step == 2 and context.rank == 1:
            inputs[0, 0] = math.inf
        optimizer.zero_grad()
        scaler.scale(replica(inputs).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        if step == 2:
            assert all(torch.equal(exchange.residuals()[name], values) for name, values in residuals.items())
        found.append(
            (
                scaler.get_scale(),
                all(equal_on_all_ranks(one) for one in model.parameters()),
                not torch.equal(before, model[0].weight),
            )
        )
    exchange.detach()
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_scaler_leaves_a_step_out_on_all_ranks(ranks2: Pool, kind: str) -> None:
    for report in ranks2.run(scaled, kind):
        assert [scale for scale, _, _ in report] == [1024.0, 1024.0, 512.0, 512.0, 512.0]
        assert all(equal for _, equal, _ in report)
        assert [changed for _, _, changed in report] == [True, True, False, True, True]


def raised(context: Rank, kind: str) -> str:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 48), nn.Linear(48, 32))
    replica = DistributedDataParallel(model)
    exchange = thinwire.compress_gradients(replica, kind, nonfinite="raise")
    inputs = torch.ones(4, 32)
    replica(inputs).sum().backward()
    if context.rank == 1:
        inputs[0, 0] = math.nan
    try:
        replica(inputs).sum().backward()
    except UserError as error:
        return str(error)
    finally:
        exchange.detach()
    return "nothing"


@pytest.mark.parametrize("kind", ["bf16", "int8", "powersgd", "topk_global"])
def test_on_request_every_rank_names_what_is_not_finite(ranks3: Pool, kind: str) -> None:
    said = ranks3.run(raised, kind)
    assert len(set(said)) == 1 and "is not finite on rank 1, in step 2" in said[0] and "the gradient of " in said[0], said


def fails_on_one(context: Rank) -> str:
    group = dist.new_group(timeout=timedelta(seconds=4))
    replica = DistributedDataParallel(nn.Linear(32, 48), process_group=group)
    exchange = thinwire.compress_gradients(replica, "int4")
    if context.rank == 1:

        def broken(*_: object) -> None:
            raise MemoryError("no room for codes")

        exchange._memory.corrected = exchange._memory.corrected_rows = broken
    with pytest.raises(UserError) as caught:
        replica(torch.ones(4, 32)).sum().backward()
    return str(caught.value)


@pytest.mark.long
def test_what_goes_wrong_on_one_rank_is_the_same_line_on_all(ranks2: Pool) -> None:
    said = ranks2.run(fails_on_one)
    assert said == ["compress.kind = 'int4': rank 1: no room for codes"] * 2
    ranks2.close()  # whose collectives have timed out


def adopted(context: Rank) -> bool:
    """Whether a hook that may give up steps takes over the mean of other ranks' residuals at once."""
    states = []
    for scale in (1.0, 3.0):
        replica = DistributedDataParallel(nn.Linear(32, 48))
        exchange = thinwire.compress_gradients(replica, "int4")
        replica(scale * torch.arange(32.0).view(1, 32)).square().sum().backward()
        states.append(exchange.state_dict())
        exchange.detach()
    exchange = thinwire.compress_gradients(DistributedDataParallel(nn.Linear(32, 48)), "int4")
    exchange.adopt(states)
    first, second = (state["memory"]["owed"]["kept"]["weight"] for state in states)
    found = exchange.residuals()["weight"]
    exchange.detach()
    return bool(first.any()) and torch.equal(found, (first + second) / 2)


def test_residuals_of_other_ranks_count_at_once(ranks2: Pool) -> None:
    assert ranks2.run(adopted) == [True, True]
