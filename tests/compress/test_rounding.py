"""Stochastic rounding by a hash, and what is lost while encoding."""

from dataclasses import replace

import pytest
import torch
from error_bounds import error_bound
from hypothesis import given, settings
from vectors import ALL, SCALES, SHAPES, codec_of, vector, vectors

from thinwire.compress.base import finite
from thinwire.compress.codecs.blocked import PIECE
from thinwire.compress.codecs.blockwise import Float4, Int4, Int8, dither
from thinwire.compress.codecs.fused import fused_or_reason, round_bf16
from thinwire.errors import UserError

STOCHASTIC = [Int8(rounding="stochastic"), Int4(rounding="stochastic"), Int4(rounding="stochastic", hadamard=True)]
PLAIN = STOCHASTIC[:2]
LOSING = [Int8(), Int4()]
EVERY = [*STOCHASTIC, *LOSING, Int4(hadamard=True), Float4()]


def there_and_back(codec, values: torch.Tensor) -> torch.Tensor:
    return codec.decode(codec.encode(values), values.numel())


def encode_with_error(codec, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The payload, and values - decoded, as `encode_rows` leaves them; `values` stays as it is."""
    lost = values.clone()
    payload = torch.empty(codec.payload_bytes(values.numel()), dtype=torch.uint8)
    codec.encode_rows(lost.view(1, -1), payload.view(1, -1), subtract=True)
    return payload, lost


def composed_with_error(codec, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    payload = codec.encode(values)
    return payload, values - codec.decode(payload, values.numel())


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


@pytest.mark.parametrize("codec", STOCHASTIC, ids=repr)
@given(make=vectors)
def test_the_error_is_within_the_stated_bound_of_one_scale(codec, make) -> None:
    values = make(codec.block)
    payload = codec.encode(values)
    assert torch.equal(payload, codec.encode(values.clone()))
    error = (codec.decode(payload, values.numel()).double() - values.double()).abs()
    assert bool((error <= error_bound(codec, values).double()).all())
    if codec in PLAIN and values.numel():
        scales = payload[: 2 * values.numel() // codec.block].view(torch.bfloat16).double().repeat_interleave(codec.block)
        assert bool((error <= scales * (1 + 2**-15))[scales >= 2.0**-120].all())


@pytest.mark.parametrize("codec", PLAIN, ids=repr)
@given(make=vectors)
def test_it_is_odd_keeps_zeros_and_rounds_to_a_neighbour(codec, make) -> None:
    values = make(codec.block)
    decoded = there_and_back(codec, values)
    assert torch.equal(there_and_back(codec, -values), -decoded)
    assert not decoded[values == 0].any() and bool((decoded * values.sign() >= 0).all())
    blocks = values.numel() // codec.block
    payload = codec.encode(values)
    assert int(payload[2 * blocks :].view(torch.int8).abs().max() if blocks else 0) <= codec.levels * (
        17 if codec.levels == 7 else 1
    )


@pytest.mark.parametrize("codec", PLAIN, ids=repr)
def test_blocks_are_coded_by_themselves(codec) -> None:
    values = vector((2 * PIECE // codec.block + 3) * codec.block, 1)
    parts = [there_and_back(codec, part) for part in values.split(97 * codec.block)]
    assert torch.equal(there_and_back(codec, values), torch.cat(parts))


def jittered(codec, part: float, sign: float) -> torch.Tensor:
    """A step is 1 in each block, and all values but one lie near `part` of a step."""
    blocks = 1000
    jitter = torch.rand(blocks * codec.block, generator=torch.Generator().manual_seed(7))
    values = (sign * (part + 0.01 * (jitter - 0.5))).view(blocks, codec.block)
    values[:, 0] = codec.levels
    return values.view(-1)


@pytest.mark.parametrize("codec", PLAIN, ids=repr)
@pytest.mark.parametrize("part", [0.01, 0.3, 6.25])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_it_has_no_bias_where_rounding_to_nearest_has(codec, part, sign) -> None:
    values = jittered(codec, part, sign)
    error = (there_and_back(codec, values) - values).double().view(-1, codec.block)[:, 1:]
    fraction = part % 1
    spread = (fraction * (1 - fraction) / error.numel()) ** 0.5
    assert abs(float(error.mean())) < 5 * spread
    by_place = error.mean(0)  # and at no place of a block
    assert float(by_place.abs().max()) < 6 * spread * error.shape[1] ** 0.5
    biased = there_and_back(replace(codec, rounding="nearest"), values) - values
    assert float(biased.double().view(-1, codec.block)[:, 1:].mean()) == pytest.approx(-sign * fraction, abs=1e-3)


@pytest.mark.parametrize("codec", PLAIN, ids=repr)
@pytest.mark.parametrize("shape", ["normal", "shifted", "decades"])
def test_it_has_no_bias_over_random_vectors(codec, shape) -> None:
    """Of |x| towards or away from zero; the variance of the mean is taken from the errors themselves."""
    values = vector(codec.block * 1000, 11, 1e-3, shape)
    scales = codec.encode(values)[: 2 * 1000].view(torch.bfloat16).double().unsqueeze(1)
    error = ((there_and_back(codec, values) - values).double() * values.sign()).view(1000, -1) / scales
    assert abs(float(error.mean())) < 5 * float(error.std()) / error.numel() ** 0.5


def test_the_dither_is_even_and_each_of_its_bits_is_fair() -> None:
    drawn = dither(vector(1 << 18, 3).view(-1, 256))
    assert int(drawn.min()) >= 0 and int(drawn.max()) < 1 << 16
    count = drawn.numel()
    shares = [float(((drawn >> bit) & 1).double().mean()) for bit in range(16)]
    assert max(abs(share - 0.5) for share in shares) < 5 * 0.5 / count**0.5
    counts = torch.bincount((drawn >> 8).view(-1), minlength=256).double()
    assert abs(float((counts - count / 256).square().sum() / (count / 256)) - 255) < 5 * (2 * 255) ** 0.5  # chi squared
    places = dither(torch.full((1, 256), 0.3))  # one value at all places, and neighbours in the last bit
    assert places.unique().numel() > 250
    lattice = dither(
        (torch.full((256, 1), 0x3E99999A, dtype=torch.int32) + torch.arange(256).view(-1, 1).int()).view(torch.float32)
    )
    assert abs(float(lattice.double().mean()) / 2**16 - 0.5) < 5 * (1 / 12 / 256) ** 0.5


def test_scales_are_rounded_up() -> None:
    values = vector(10_000, 1, shape="decades").abs()
    raised = round_bf16(values, up=True)
    assert torch.equal(raised.bfloat16().float(), raised) and bool((raised >= values).all())
    assert bool((raised <= values * (1 + 2**-7)).all()) and torch.equal(round_bf16(raised, up=True), raised)
    assert round_bf16(torch.tensor([torch.inf, 0.0]), up=True).tolist() == [torch.inf, 0.0]
    assert bool(round_bf16(torch.tensor([torch.nan]), up=True).isnan())


def test_other_roundings_do_not_exist() -> None:
    with pytest.raises(UserError, match="nearest or stochastic"):
        Int8(rounding="up")  # type: ignore[arg-type]


@pytest.mark.parametrize("codec", STOCHASTIC, ids=repr)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_is_not_hidden(codec, bad) -> None:
    values = vector(3 * codec.block, 2)
    values[codec.block + 5] = bad
    decoded = there_and_back(codec, values).view(3, -1)
    assert decoded.isfinite().any(1).tolist() == [True, False, True]


@pytest.mark.parametrize("codec", [*EVERY, *(codec_of(kind) for kind in ALL)], ids=repr)
@settings(max_examples=15)
@given(make=vectors)
def test_what_is_lost_is_what_the_composition_gives(codec, make) -> None:
    values = make(codec.block)
    before = values.clone()
    payload, lost = encode_with_error(codec, values)
    assert torch.equal(payload, codec.encode(before)) and torch.equal(values, before)
    assert torch.equal(lost, before - codec.decode(payload, values.numel()))


@pytest.mark.parametrize("codec", LOSING, ids=repr)
def test_nothing_finite_is_said_to_be_lost_of_a_block_that_is_not(codec) -> None:
    for bad in (torch.nan, torch.inf):
        values = vector(2 * codec.block, 2)
        values[3] = bad
        payload, lost = encode_with_error(codec, values)
        assert not finite(codec.decode(payload, values.numel())) and not lost[: codec.block].isfinite().any()


@pytest.mark.long
@pytest.mark.timeout(300)
@pytest.mark.parametrize("codec", [Int8(), Int4(rounding="stochastic")], ids=repr)
def test_fused_and_plain_give_the_same_bits(codec) -> None:
    """What is lost by one, the dither by the other: compiling takes seconds."""
    if (reason := fused_or_reason()) is not None:
        pytest.skip(reason)
    fused = replace(codec, fused=True)
    for seed, scale in enumerate((*SCALES, 3e38 / 6)):
        for shape in SHAPES:
            values = vector((seed * 7 % 5) * codec.block, seed, scale, shape).clamp(-3.3e38, 3.3e38)
            payload, lost = composed_with_error(codec, values)
            if codec in PLAIN:
                assert torch.equal(fused.encode(values), payload)
                continue
            for other in (codec, fused):
                again, lost_again = encode_with_error(other, values)
                assert torch.equal(again, payload) and torch.equal(lost_again, lost)
                nonzero = values != 0  # -0.0 may lose 0.0 or -0.0
                assert same_bits(lost_again[nonzero], lost[nonzero])
