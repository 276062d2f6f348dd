"""Coded activations as on a device: on CPU tensors to the bit as the CPU has it; on fake tensors without a read on the host."""

import math
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from vectors import ALL, codec_of, vector

from on_device import alone
from pool import Pool, Rank
from thinwire.compress.activations.boundary import BoundaryCodec
from thinwire.compress.activations.differences import Differences
from thinwire.compress.activations.partial_sums import coded_sum

LAUNCHED = "thinwire.compress.activations.boundary.launched"
BAD = (math.nan, math.inf, -math.inf)


@pytest.mark.parametrize("kind", ALL)
def test_what_is_not_finite_arrives_so(kind: str) -> None:
    """In its own block, wherever it stands and whatever else is there."""
    boundary = BoundaryCodec(codec_of(kind), "boundary 0-1")
    for place, bad in ((0, BAD[0]), (299, BAD[1]), (4095, BAD[2]), (4999, BAD[0])):
        x = vector(5000, place)
        x[place] = bad
        with mock.patch(LAUNCHED, return_value=True):
            arrived = boundary.unpack(boundary.pack(x), x.shape)
        first = place - place % boundary.codec.block
        assert not arrived[first : first + boundary.codec.block].isfinite().all()
        assert arrived[:first].isfinite().all()


def summed(context: Rank, kind: str) -> tuple[bool, torch.Tensor, int]:
    """Whether the sums are those of the CPU; one of something that is not finite, and the bytes of both."""
    codec, group = codec_of(kind), dist.group.WORLD
    x = vector(900, context.rank)
    waited = coded_sum(x, group, codec, context.ledger, "sum")
    with mock.patch(LAUNCHED, return_value=True):
        launched = coded_sum(x, group, codec, context.ledger, "sum")
        x[7] = math.nan if context.rank == 1 else x[7]
        return torch.equal(waited, launched), coded_sum(x, group, codec, context.ledger, "sum"), context.rank


@pytest.mark.parametrize("kind", ["int8", "int4", "bf16", "topk"])
@pytest.mark.parametrize("pool", ["ranks2", "ranks4"])
def test_sums_are_those_of_the_cpu_and_not_finite_on_all_ranks_alike(
    request: pytest.FixtureRequest, pool: str, kind: str
) -> None:
    ranks: Pool = request.getfixturevalue(pool)
    reports = ranks.run(summed, kind)
    for same, spoiled, _ in reports:
        assert same and not spoiled.isfinite().all()
        assert torch.equal(spoiled.isfinite(), reports[0][1].isfinite())
        assert torch.equal(spoiled.nan_to_num(), reports[0][1].nan_to_num())


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_both_sides_stay_equal_and_finite_over_what_is_not(kind: str) -> None:
    """And a sample that was not finite at a visit is as near as ever some visits later."""
    one, other = (Differences(codec_of(kind), "boundary 0-1") for _ in range(2))
    for visit in range(6):
        x = torch.stack([vector(300, sample) for sample in range(4)])
        if visit in (0, 2):
            x[visit, 5] = BAD[visit % 3]
        ids = [3, 0, 2, 1]
        with mock.patch(LAUNCHED, return_value=True):
            payload = one.pack(ids, x)
        arrived = other.unpack(payload, ids, x.shape)
        assert bool(arrived.isfinite().all()) == (visit not in (0, 2))
        for sample in ids:
            assert torch.equal(one.copies[sample], other.copies[sample]) and other.copies[sample].isfinite().all()
    assert float((arrived - x).abs().max()) < 0.02 * float(x.abs().max())


FAKE = Path(__file__).parent / "fake_device_activations.py"


@pytest.mark.long
@pytest.mark.timeout(300)
def test_nothing_is_read_on_the_host_and_no_device_is_mixed() -> None:
    assert alone(FAKE).count("all on the device") == len(ALL)
