"""`thinwire.compress_gradients` on a DistributedDataParallel of the user's own."""

from collections.abc import Callable
from functools import cache

import pytest
import torch
import torch.distributed as dist
from cases import long
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import thinwire
from pool import Pool, Rank
from thinwire.compress.coded import CodedExchange
from thinwire.errors import UserError


class Net(nn.Module):
    """Six layers, of which the last is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers[:-1]:
            x = torch.tanh(layer(x))
        return x


def loop(context: Rank, kind: str, steps: int, group_size: int) -> dict:
    """The user's own loop: accumulation by no_sync, several buckets, unused parameters, perhaps sub-groups."""
    groups = [dist.new_group(range(first, first + group_size)) for first in range(0, context.world_size, group_size)]
    group = groups[context.rank // group_size]
    torch.manual_seed(0)
    model = Net()
    replica = DistributedDataParallel(model, process_group=group, bucket_cap_mb=0.004, find_unused_parameters=True)
    compression = thinwire.compress_gradients(replica, kind) if kind != "none" else None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    inputs = torch.randn(16, 32, generator=torch.Generator().manual_seed(context.rank))
    losses = []
    for _ in range(steps):
        with replica.no_sync():
            replica(inputs).square().mean().backward()
        loss = (replica(inputs) - 0.3).square().mean()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    residuals = compression.residuals() if isinstance(compression, CodedExchange) else {}
    if compression:
        compression.detach()
    return {"weights": [p.detach() for p in model.parameters()], "losses": losses, "residuals": sorted(residuals)}


@pytest.fixture(scope="module")
def plain_ddp() -> Callable[[Pool, int], list[dict]]:
    """(pool, group size) -> what the loop returns without compression. Each is made once."""
    return cache(lambda ranks, group_size: ranks.run(loop, "none", 25, group_size))


@pytest.mark.parametrize(
    ("pool", "group_size", "kind"),
    [
        ("ranks2", 2, "int4"),
        long("ranks2", 2, "bf16"),
        ("ranks4", 2, "int8"),
        *(long("ranks4", size, kind) for size, kind in [(4, "int4"), (4, "int8"), (4, "bf16"), (2, "int4"), (2, "bf16")]),
    ],
)
def test_it_learns_like_plain_ddp_and_replicas_stay_equal(
    request: pytest.FixtureRequest, plain_ddp: Callable[[Pool, int], list[dict]], pool: str, group_size: int, kind: str
) -> None:
    ranks: Pool = request.getfixturevalue(pool)
    coded = ranks.run(loop, kind, 25, group_size)
    plain = plain_ddp(ranks, group_size)
    for rank, result in enumerate(coded):
        first = coded[rank // group_size * group_size]
        assert all(torch.equal(a, b) for a, b in zip(result["weights"], first["weights"], strict=True))
        assert result["losses"][-1] == pytest.approx(plain[rank]["losses"][-1], rel=0.05)
        assert result["losses"][-1] < 0.6 * result["losses"][0]
    assert coded[0]["residuals"] == ([] if kind == "bf16" else [f"layers.{index}.weight" for index in range(5)])


def refused(context: Rank, kind: str, options: dict) -> str:
    replica = DistributedDataParallel(nn.Linear(2, 2))
    try:
        thinwire.compress_gradients(replica, kind, **options)
    except UserError as error:
        return str(error)
    return ""


def test_unknown_kinds_and_options_are_refused(ranks2: Pool) -> None:
    assert "compress_gradients: kind = 'int3'" in ranks2.run(refused, "int3", {})[0]
    assert "unknown key feedbak; allowed: kind, exclude" in ranks2.run(refused, "int4", {"feedbak": True})[0]
