"""Laws of all codecs."""

from types import SimpleNamespace

import pytest
import torch
from error_bounds import error_bound
from hypothesis import given, settings
from hypothesis import strategies as st
from vectors import ALL, BLOCKED, STABLE, codec_of, vector, vectors

from thinwire.compress.base import finite, make_codec
from thinwire.compress.codecs.blocked import PIECE
from thinwire.errors import UserError

VARIANTS = [(kind, {}) for kind in ALL] + [
    ("topk", {"values": "int8"}),
    ("topk", {"k": 4}),
    ("topk", {"k": 4096}),
    ("int4", {"hadamard": True}),
]


def there_and_back(codec, values: torch.Tensor) -> torch.Tensor:
    return codec.decode(codec.encode(values), values.numel())


@pytest.mark.parametrize(("kind", "options"), VARIANTS)
@settings(max_examples=40)
@given(make=vectors)
def test_the_error_is_within_the_stated_bound(kind, options, make) -> None:
    codec = codec_of(kind, **options)
    values = make(codec.block)
    before = values.clone()
    error = (there_and_back(codec, values).double() - values.double()).abs()
    bound = error_bound(codec, values).double()
    assert bound.shape == values.shape
    assert bool((error <= bound).all())
    assert torch.equal(values, before)


@pytest.mark.parametrize(("kind", "options"), VARIANTS)
@settings(max_examples=15)
@given(blocks=st.integers(0, 7), seed=st.integers(0, 99))
def test_payloads_are_as_long_as_stated_and_even(kind, options, blocks, seed) -> None:
    codec = codec_of(kind, **options)
    values = vector(blocks * codec.block, seed)
    payload = codec.encode(values)
    assert payload.dtype == torch.uint8 and payload.shape == (codec.payload_bytes(values.numel()),)
    assert payload.is_contiguous() and payload.numel() % 2 == 0
    assert torch.equal(payload, codec.encode(values.clone()))
    decoded = codec.decode(payload, values.numel())
    assert decoded.dtype == torch.float32 and decoded.shape == values.shape


def test_bits_a_value() -> None:
    length = 4096 * 320 * 5
    bits = {kind: codec_of(kind).payload_bytes(length) * 8 / length for kind in ALL}
    wanted = {"bf16": 16, "fp16": 16, "int8": 8.0625, "int4": 4.125, "fp4": 4.125, "sign": 1.0625}
    wanted |= {"ternary": 1.65, "codebook2": 2.015625, "topk": 0.4375}
    assert bits == wanted
    assert codec_of("topk", values="int8").payload_bytes(4096) == 64 * 3 // 2 + 64 + 2


@pytest.mark.parametrize("kind", STABLE)
@settings(max_examples=25)
@given(make=vectors)
def test_what_was_decoded_codes_to_itself(kind, make) -> None:
    codec = codec_of(kind)
    once = there_and_back(codec, make(codec.block))
    if finite(once):
        assert torch.equal(there_and_back(codec, once), once)


@pytest.mark.parametrize(("kind", "options"), VARIANTS)
def test_zeros_stay_zeros(kind, options) -> None:
    codec = codec_of(kind, **options)
    for zeros in (torch.zeros(3 * codec.block), -torch.zeros(3 * codec.block)):
        assert not there_and_back(codec, zeros).any()


@pytest.mark.parametrize("kind", [kind for kind in ALL if kind not in ("sign", "codebook2")])
@settings(max_examples=20)
@given(make=vectors)
def test_single_zeros_stay_zeros_and_signs_stay(kind, make) -> None:
    codec = codec_of(kind)
    values = make(codec.block)
    decoded = there_and_back(codec, values)
    assert not decoded[values == 0].any()
    assert bool((decoded * values.sign() >= 0).all())
    if finite(decoded) and kind != "topk":  # among equal values, those sent need not be the same
        assert torch.equal(there_and_back(codec, -values), -decoded)


@pytest.mark.parametrize(("kind", "options"), [(kind, options) for kind, options in VARIANTS if kind not in ("bf16", "fp16")])
def test_blocks_are_coded_by_themselves(kind, options) -> None:
    """Also where a long vector is walked in pieces."""
    codec = codec_of(kind, **options)
    values = vector((2 * PIECE // codec.block + 3) * codec.block, 1)
    whole = there_and_back(codec, values)
    parts = [there_and_back(codec, part) for part in values.split(97 * codec.block)]
    assert torch.equal(whole, torch.cat(parts))


@pytest.mark.parametrize("kind", BLOCKED)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@settings(max_examples=10)
@given(place=st.integers(0, 10**6), seed=st.integers(0, 99))
def test_what_is_not_finite_spoils_its_block_and_no_other(kind, bad, place, seed) -> None:
    codec = codec_of(kind)
    values = vector(3 * codec.block, seed)
    expected = there_and_back(codec, values)
    place %= values.numel()
    values[place] = bad
    assert not finite(values)
    hit = torch.arange(values.numel()) // codec.block == place // codec.block
    decoded = there_and_back(codec, values)
    assert not decoded[hit].isfinite().any()
    assert torch.equal(decoded[~hit], expected[~hit])


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, -1, 0x7F800001])
def test_every_nan_counts(bits) -> None:
    for kind in BLOCKED:
        codec = codec_of(kind)
        values = vector(codec.block, 3)
        values.view(torch.int32)[5] = bits
        assert not finite(values) and not finite(there_and_back(codec, values))


@pytest.mark.parametrize(("kind", "options"), [(k, o) for k, o in VARIANTS if k not in BLOCKED])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_arrives(kind, options, bad) -> None:
    codec = codec_of(kind, **options)
    values = vector(2 * codec.block, 4)
    values[0] = bad
    decoded = there_and_back(codec, values)
    assert not decoded[0].isfinite()
    assert torch.equal(decoded[codec.block :], there_and_back(codec, values[codec.block :]))


@given(numel=st.integers(0, 300), place=st.integers(0, 10**6), bad=st.sampled_from([torch.nan, torch.inf, -torch.inf]))
def test_finite_sees_every_place(numel, place, bad) -> None:
    values = vector(numel, 0, 1e38)
    assert finite(values.clamp(-3e38, 3e38))
    if numel:
        values[place % numel] = bad
        assert not finite(values)


@pytest.mark.parametrize("kind", ALL)
def test_other_inputs_are_the_callers_mistake(kind) -> None:
    codec = codec_of(kind)
    right = vector(2 * codec.block, 0)
    wrong = [right.bfloat16(), right.double(), right.view(1, -1), right.repeat_interleave(2)[::2]]
    if codec.block > 1:
        wrong.append(right[1:])
    for values in wrong:
        with pytest.raises(AssertionError):
            codec.encode(values)
    payload = codec.encode(right)
    for code in (
        payload[:-1],
        torch.cat([payload, payload])[::2],
        payload.view(torch.int8),
        torch.cat([payload[:1], payload])[1:],
    ):
        with pytest.raises(AssertionError):
            codec.decode(code, right.numel())


def test_codecs_are_made_by_kind_with_the_options_they_know() -> None:
    assert make_codec(SimpleNamespace(kind="none")) is None
    for kind in ALL:
        assert codec_of(kind, feedback=True).name == kind
    assert codec_of("topk", k=8).payload_bytes(4096) == 12 + 16
    for kind, options, word in (
        ("int3", {}, "int3"),
        ("topk", {"k": 6}, "4, 8"),
        ("topk", {"k": 0}, "4, 8"),
        ("topk", {"values": "fp8"}, "bf16 or int8"),
        ("topk", {"fused": True}, "fused: topk has no such option"),
    ):
        with pytest.raises(UserError, match=word) as raised:
            codec_of(kind, **options)
        assert "\n" not in str(raised.value)


def test_only_floats_may_be_summed_on_the_way() -> None:
    dtypes = {kind: codec_of(kind).wire_dtype for kind in ALL}
    assert dtypes == {kind: torch.uint8 for kind in ALL} | {"bf16": torch.bfloat16, "fp16": torch.float16}
