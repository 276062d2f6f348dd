"""PowerSGD on real ranks: the power iteration of one process that knows the mean, two collectives a bucket, never a hang."""

import zlib
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from averager_runs import (
    ONE_BUCKET,
    SHAPES,
    THREE_BUCKETS,
    average,
    averaged,
    check_conserved,
    check_equal_on_all_ranks,
    check_resumed,
    check_trained,
    mean_gradient,
    train,
)
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import thinwire
from on_device import Given
from pool import Pool, Rank, RankFailure
from thinwire.collectives.ledger import difference
from thinwire.compress.averager import Piece
from thinwire.compress.memory import ErrorFeedback, NoMemory
from thinwire.compress.powersgd import PowerSGD, bases
from thinwire.workload import Parameter

pytestmark = pytest.mark.heavy

LONGER = [pytest.param(pool, marks=pytest.mark.long) for pool in ("ranks2", "ranks4")]
OPTIONS = {"kind": "powersgd", "rank": 2, "exclude": ()}


def upright(values: torch.Tensor) -> torch.Tensor:
    """As a matrix [n, m] with n >= m, float64."""
    matrix = values.double().view(len(values), -1)
    return matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T


def reference(name: str, steps: int, world_size: int, rank: int) -> list[torch.Tensor]:
    """One process, the mean gradient, float64; upright."""
    residual = torch.zeros_like(upright(mean_gradient(name, 0, world_size)))
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    right = torch.randn(rank, residual.shape[1], generator=generator).double()
    found = []
    for step in range(steps):
        wanted = upright(mean_gradient(name, step, world_size)) + residual
        basis = torch.linalg.qr(wanted @ right.T).Q
        right = basis.T @ wanted
        residual = wanted - basis @ right
        found.append(basis @ right)
    return found


@pytest.mark.parametrize("pool", ["ranks3", *LONGER])
def test_it_is_the_power_iteration_of_one_process_and_keeps_what_it_does_not_send(
    request: pytest.FixtureRequest, pool: str
) -> None:
    ranks: Pool = request.getfixturevalue(pool)
    reports = ranks.run(averaged, OPTIONS, 4, ONE_BUCKET, -1, True)
    check_equal_on_all_ranks(reports)
    check_conserved(reports)
    for name in SHAPES:
        for step, wanted in enumerate(reference(name, 4, len(reports), 2)):
            result = upright(reports[0]["results"][step][name])
            assert (result - wanted).norm() < 0.02 * wanted.norm()  # P is rounded
            left = torch.stack([upright(one["residuals"][step][name]) for one in reports]).mean(0)
            assert (result.T @ left).norm() < 1e-5 * wanted.norm() ** 2  # a projection, whatever P was rounded to
            assert torch.linalg.svdvals(result)[2] < 1e-5 * wanted.norm()
    assert reports[0]["sent"] == reports[0]["predicted"]
    assert len(reports[0]["sent"]) == 2 and min(reports[0]["work_s"]) > 0


@pytest.mark.parametrize("pool", [*LONGER[:1], "ranks4"])
def test_other_buckets_give_the_same_within_rounding(request: pytest.FixtureRequest, pool: str) -> None:
    """Not to the bit: which rank begins the sum of a value depends on where in the message it stands."""
    ranks: Pool = request.getfixturevalue(pool)
    one = ranks.run(averaged, OPTIONS, 3, ONE_BUCKET)[0]["results"]
    three = ranks.run(averaged, OPTIONS, 3, THREE_BUCKETS)[0]["results"]
    for ours, theirs in zip(one, three, strict=True):
        assert all((ours[name] - theirs[name]).norm() < 0.02 * ours[name].norm() for name in SHAPES)


def test_a_run_that_is_resumed_goes_on_bit_for_bit(ranks2: Pool) -> None:
    whole = ranks2.run(averaged, OPTIONS, 4, THREE_BUCKETS)
    check_resumed(whole, ranks2.run(averaged, OPTIONS, 4, THREE_BUCKETS, 2))


@pytest.mark.parametrize("pool", ["ranks3", *LONGER])
def test_training_sends_what_was_predicted(request: pytest.FixtureRequest, pool: str) -> None:
    ranks: Pool = request.getfixturevalue(pool)
    reports = ranks.run(train, OPTIONS, 15)
    check_trained(reports)
    # not the last one: two factors are no smaller than a row
    assert reports[0]["residuals"] == ["0.weight", "2.weight", "4.weight"]


def low_rank(context: Rank, steps: int) -> list[float]:
    """Relative errors, step by step, where only the mean over ranks is of rank 2."""
    left, right = torch.randn(2, 60, 2, generator=torch.Generator().manual_seed(7)).unbind()
    noise = torch.randn(60, 60, generator=torch.Generator().manual_seed(context.rank // 2))
    mine = left @ right.T + (noise if context.rank % 2 else -noise)
    averager = PowerSGD(NoMemory(), context.ledger, rank=2)
    averager.attach(dist.group.WORLD, dist.group.WORLD)
    found = []
    for _ in range(steps):
        buffer = mine.reshape(-1).clone()
        average(averager, buffer, [Piece("weight", 0, (60, 60))], "bucket 0")
        found.append(float((buffer.view(60, 60) - left @ right.T).norm() / (left @ right.T).norm()))
    return found


def test_a_mean_of_low_rank_arrives_whole(ranks4: Pool) -> None:
    """P spans the columns of the mean at once, as far as it is not rounded, and goes on doing so."""
    assert max(ranks4.run(low_rank, 4)[0]) < 2**-7


def constant(context: Rank, steps: int) -> list[float]:
    """How far the result is from the best approximation of rank 2, over steps with the same gradient."""
    matrix = (
        torch.randn(60, 40, generator=torch.Generator().manual_seed(7)) + 9 * torch.ones(60, 1) @ torch.linspace(1, 2, 40)[None]
    )
    best = float(torch.linalg.svdvals(matrix)[2:].norm())
    averager = PowerSGD(NoMemory(), context.ledger, rank=2)
    averager.attach(dist.group.WORLD, dist.group.WORLD)
    found = []
    for _ in range(steps):
        buffer = matrix.reshape(-1).clone()
        average(averager, buffer, [Piece("weight", 0, (60, 40))], "bucket 0")
        found.append(float((buffer.view(60, 40) - matrix).norm()) / best)
    return found


def test_warm_start_turns_to_the_largest_singular_vectors(ranks2: Pool) -> None:
    errors = ranks2.run(constant, 40)[0]
    assert all(after < before + 1e-5 for before, after in pairwise(errors))
    assert 1 - 1e-5 < errors[-1] < 1.005 < errors[0]


@pytest.mark.parametrize("height", [4, 129, 1000])
def test_bases_are_orthonormal_whatever_the_rank(height: int) -> None:
    generator = torch.Generator().manual_seed(height)
    full = torch.randn(height, 4, generator=generator)
    single = full[:, :1] @ torch.randn(1, 4, generator=generator)
    spread = full * torch.tensor([1e8, 1.0, 1e-8, 1e-20])
    given = [full, single, torch.zeros(height, 4), spread, torch.ones(height, 4)]
    for base in bases(torch.cat([matrix.reshape(-1) for matrix in given]), [height] * len(given), 4):
        torch.testing.assert_close(base.T @ base, torch.eye(4), rtol=0, atol=1e-5)


def zero_for_a_while(context: Rank) -> list[torch.Tensor]:
    averager = PowerSGD(ErrorFeedback(), context.ledger, rank=2)
    averager.attach(dist.group.WORLD, dist.group.WORLD)
    found = []
    for step in range(6):
        buffer = torch.zeros(400) if step < 3 else torch.ones(400)
        average(averager, buffer, [Piece("weight", 0, (20, 20))], "bucket 0")
        found.append(buffer)
    return found


def test_a_matrix_that_was_zero_is_found_again(ranks2: Pool) -> None:
    """Three steps of ones: all of it has arrived at the end."""
    results = torch.stack(ranks2.run(zero_for_a_while)[0])
    assert not results[:3].any()
    torch.testing.assert_close(results.sum(0), torch.full((400,), 3.0))


def of_another_rank(context: Rank) -> None:
    averager = PowerSGD(ErrorFeedback(), context.ledger, rank=3)
    averager.load_state_dict({"rights": {"weight": torch.zeros(2, 20)}})


def test_a_checkpoint_of_another_rank_is_refused(ranks2: Pool) -> None:
    with pytest.raises(RankFailure, match=r"compress\.rank = 2 \(weight\), not 3"):
        ranks2.run(of_another_rank)


EMBEDDED = {"embed": (256, 64), "wide": (64, 160), "bias": (64,)}


def with_embedding(context: Rank) -> dict[str, Any]:
    """The third step: what arrived, what is owed, what should be sent, and bytes."""
    model = Given(EMBEDDED, torch.device("cpu"))
    replica = DistributedDataParallel(model)
    exchange = thinwire.compress_gradients(replica, "powersgd")
    given: dict[str, torch.Tensor] = {}
    owed: dict[str, torch.Tensor] = {}
    for step in range(3):  # DistributedDataParallel forms its buckets in the second
        draws = torch.Generator().manual_seed(10 * step + context.rank)
        owed = exchange.residuals() if step else {}
        given = {name: torch.randn(shape, generator=draws) for name, shape in EMBEDDED.items()}
        replica.zero_grad()
        before = context.ledger.snapshot()
        replica(given).backward()
    bucket = [Parameter(name, shape) for name, shape in reversed(EMBEDDED.items())]
    predicted = exchange.transfers("bucket 0", bucket, "data", context.world_size)
    sent = difference(context.ledger.snapshot(), before)
    for name, values in owed.items():
        given[name] += values.view(EMBEDDED[name])
    found = {
        "got": {name: one.grad for name, one in model.named_parameters()},
        "wanted": given,
        "residuals": {name: values.view(EMBEDDED[name]) for name, values in exchange.residuals().items()},
        "sent": {(call.op, call.message_bytes): total.calls for call, total in sent.items()},
        "predicted": {(transfer.op, transfer.message_bytes): 1 for transfer in predicted},
    }
    exchange.detach()
    return found


def test_embeddings_arrive_nearly_whole(ranks3: Pool) -> None:
    """In int8, 1 byte a value, with what that loses owed; matrices in 2 bytes a value of P and 4 of Q; vectors exactly."""
    first, *others = reports = ranks3.run(with_embedding)
    for name, result in first["got"].items():
        assert all(torch.equal(result, other["got"][name]) for other in others)
        wanted = torch.stack([one["wanted"][name] for one in reports]).mean(0)
        left = torch.stack([one["residuals"].get(name, torch.zeros_like(result)) for one in reports]).mean(0)
        torch.testing.assert_close(result + left, wanted, rtol=0, atol=1e-5)
        least, most = {"embed": (1e-3, 0.02), "wide": (0.5, 1.0), "bias": (0.0, 1e-6)}[name]
        assert least <= (result - wanted).norm() / wanted.norm() <= most
    assert first["sent"] == first["predicted"]
    assert first["sent"].keys() >= {("all_reduce", 2 * 4 * 160), ("all_reduce", 4 * (4 * 64 + 64))}


class Net(nn.Module):
    """Seven layers, of which the last is not used, in six buckets or more."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(7))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers[:-1]:
            x = torch.tanh(layer(x))
        return x


def loop(context: Rank, steps: int) -> dict[str, Any]:
    """The user's own loop with DistributedDataParallel."""
    torch.manual_seed(0)
    model = Net()
    replica = DistributedDataParallel(model, bucket_cap_mb=0.004, find_unused_parameters=True)
    compression = thinwire.compress_gradients(replica, "powersgd", rank=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    inputs = torch.randn(16, 32, generator=torch.Generator().manual_seed(context.rank))
    losses = []
    for _ in range(steps):
        loss = (replica(inputs) - 0.3).square().mean()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    compression.detach()
    return {"weights": [parameter.detach() for parameter in model.parameters()], "losses": losses}


@pytest.mark.long
def test_many_buckets_and_unused_parameters_do_not_hang(ranks4: Pool) -> None:
    first, *others = ranks4.run(loop, 20)
    assert first["losses"][-1] < 0.75 * first["losses"][0]
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first["weights"], other["weights"], strict=True))
