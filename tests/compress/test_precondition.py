"""Gradients in units of the optimizer's second moments: what the unit is, what it gains, and where there is none."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import thinwire
from pool import Pool, Rank
from thinwire.collectives.ledger import Ledger
from thinwire.compress.exchange import make_exchange
from thinwire.compress.precondition import BELOW, moments_of, scale_of
from thinwire.config.compress import Coded
from thinwire.errors import UserError

SMALL, STEPS = 1 / 32, 20
"""Of one half of each block, beside 1 of the other."""


def test_a_scale_is_a_power_of_two_below_the_root_unless_that_is_far_below_the_others() -> None:
    moments = torch.rand(100_000, generator=torch.Generator().manual_seed(0)).pow(8)
    scale, root = scale_of(moments), moments.sqrt()
    assert torch.equal(torch.frexp(scale)[0], torch.full_like(scale, 0.5))
    least = scale.min()
    usual = root.log2().mean() - 0.5  # of exponents, rounded down
    assert usual - BELOW - 1.2 < least.log2() < usual - BELOW + 0.2
    above = scale > least
    assert torch.all(scale[above] <= root[above]) and torch.all(root[above] < 2 * scale[above])
    assert torch.all(root[~above] < 2 * least) and 0 < int(above.sum()) < moments.numel()


def test_a_scale_is_one_where_nothing_is_known_and_finite_everywhere() -> None:
    assert torch.equal(scale_of(torch.zeros(3, 2)), torch.ones(6))
    odd = scale_of(torch.tensor([0.0, 1e-44, 4.0, torch.inf, torch.nan]))
    assert torch.isfinite(odd).all() and torch.all(odd > 0)
    assert torch.equal(scale_of(torch.tensor([4.0, 16.0], dtype=torch.bfloat16)), torch.tensor([2.0, 4.0]))
    assert torch.equal(scale_of(torch.tensor([4.0 + 16.0j])), torch.tensor([2.0, 4.0]))


def test_moments_are_those_beside_their_parameters() -> None:
    parameter, other = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([parameter, other])
    find = moments_of(optimizer, {"one": parameter})
    assert find("one") is None, "before the first step"
    parameter.grad = torch.full((2, 3), 2.0)
    optimizer.step()
    found = find("one")
    assert found is not None and found.shape == (2, 3) and torch.all(found > 0)
    assert find("another") is None
    optimizer.state[parameter]["exp_avg_sq"] = torch.ones(2, 3, dtype=torch.uint8)
    assert find("one") is None, "in 8 bits"
    parted = torch.optim.RMSprop([parameter])  # as one that says nothing of what other ranks have
    parted.state[parameter]["exp_avg_sq"] = torch.ones(2, 3)
    assert moments_of(parted, {"one": parameter})("one") is None


class Halves(nn.Module):
    """Gradients of 1 and of SMALL side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.zeros(64, 128))
        self.vector = nn.Parameter(torch.zeros(128))

    def forward(self, factor: torch.Tensor) -> torch.Tensor:
        return (self.matrix * factor).sum() + (self.vector * factor[0]).sum()


def errors(context: Rank, kind: str, optimizer: str, options: dict[str, Any]) -> dict[str, Any]:
    """Of the mean gradient, relative, in the last step: of the large half and the small one."""
    replica = DistributedDataParallel(Halves())
    settings = {"betas": (0.9, 0.95)} if optimizer == "AdamW" else {}
    made = getattr(torch.optim, optimizer)(replica.parameters(), lr=1e-3, **settings)
    exchange = thinwire.compress_gradients(replica, kind, optimizer=made, feedback=False, **options)
    for step in range(STEPS):
        factors = torch.randn(context.world_size, 64, 128, generator=torch.Generator().manual_seed(step))
        factors[:, :, 64:] *= SMALL
        replica.zero_grad()
        replica(factors[context.rank]).backward()
        made.step()
    mean, got = factors.mean(0), replica.module.matrix.grad
    exchange.detach()
    halves = [(got - mean)[:, half].norm() / mean[:, half].norm() for half in (slice(64), slice(64, None))]
    return {"large": float(halves[0]), "small": float(halves[1]), "vector": replica.module.vector.grad.clone()}


@pytest.mark.parametrize("kind", ["int4", "fp4"])
def test_small_gradients_arrive_as_well_as_large_ones(ranks2: Pool, kind: str) -> None:
    with_units = ranks2.run(errors, kind, "AdamW", {})[0]
    without = ranks2.run(errors, kind, "AdamW", {"precondition": False})[0]
    assert with_units["small"] < 1.2 * with_units["large"] < 0.3
    assert without["small"] > 1.5 * with_units["small"]
    assert torch.equal(with_units["vector"], without["vector"]), "what is exact stays so"


def test_without_second_moments_nothing_changes(ranks2: Pool) -> None:
    plain = ranks2.run(errors, "int4", "SGD", {"precondition": False})[0]
    assert ranks2.run(errors, "int4", "SGD", {})[0]["small"] == plain["small"]


def refusals(context: Rank) -> list[str]:
    replica, found = DistributedDataParallel(Halves()), []
    for kind, options in (("int4", {}), ("int8", {"optimizer": torch.optim.AdamW(replica.parameters())})):
        with pytest.raises(UserError) as refused:
            thinwire.compress_gradients(replica, kind, precondition=True, **options)  # type: ignore[arg-type]
        found.append(str(refused.value))
    return found


def test_what_has_no_units_is_refused(ranks2: Pool) -> None:
    unknown, fine = ranks2.run(refusals)[0]
    assert "compress.precondition = True: no optimizer's second moments are known here" in unknown
    assert "compress.precondition = True: int8 has no scale for each block" in fine


def test_a_unit_takes_time_that_is_predicted() -> None:
    parameters = [thinwire.workload.Parameter("matrix", (640, 1280))]
    work = {}
    for moments in (False, True):
        exchange = make_exchange(Coded(kind="int4"), Ledger(), moments=moments)
        transfers = exchange.transfers("bucket 0", parameters, "data", 4)
        work[moments] = sum(one.work_s for one in transfers)
        assert [one.message_bytes for one in transfers] == [4 * 105_600, 105_604]
    assert work[True] > work[False]
