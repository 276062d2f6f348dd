"""Replicas that are equal already are not sent; if one value of one rank differs, all have the first one's afterwards."""

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import thinwire
from pool import Pool, Rank
from thinwire.config.run import EveryStep
from thinwire.sync.every_step import EveryStepSync

WIDTH = 64


def model_of(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, 1))


def start(context: Rank, how: str, odd: str | None) -> tuple[list[torch.Tensor], int]:
    """Attach; on the last rank the tensor `odd` has one other value. Values after it, bytes that were sent for it."""
    model = model_of(5)
    if odd is not None and context.rank == context.world_size - 1:
        with torch.no_grad():
            value = dict(model.state_dict(keep_vars=True))[odd].reshape(-1)[-1:]
            value.copy_(-value if value.any() else value + 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if how == "every step":
        ledger = context.ledger
        sync = EveryStepSync(EveryStep(bucket_bytes=4096), "data", ledger)
        attached = sync.attached(model, optimizer, init_device_mesh("cpu", (context.world_size,), mesh_dim_names=("data",)))
    else:
        attached = thinwire.DiLoCo(model, optimizer, every=4)
        ledger = attached.ledger
    before = ledger.sent_bytes
    with attached:
        sent = ledger.sent_bytes - before
        return [value.detach().clone() for value in model.state_dict().values()], sent


@pytest.mark.parametrize("how", ["every step", "DiLoCo"])
def test_equal_replicas_send_digests_only(ranks4: Pool, how: str) -> None:
    expected = list(model_of(5).state_dict().values())
    for values, sent in ranks4.run(start, how, None):
        assert all(torch.equal(mine, wanted) for mine, wanted in zip(values, expected, strict=True))
        assert sent == 3 * 32


@pytest.mark.parametrize("odd", ["0.weight", "2.bias", "1.running_mean", "1.num_batches_tracked"])
@pytest.mark.parametrize("how", ["every step", "DiLoCo"])
def test_one_value_that_differs_is_found_and_all_get_the_first_ranks(ranks4: Pool, how: str, odd: str) -> None:
    expected = list(model_of(5).state_dict().values())
    found = ranks4.run(start, how, odd)
    for values, _ in found:
        assert all(torch.equal(mine, wanted) for mine, wanted in zip(values, expected, strict=True))
    assert found[0][1] > WIDTH * WIDTH * 4
