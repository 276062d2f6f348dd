"""What single codecs promise: layouts, and how much they may lose."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vectors import codec_of, vector, vectors

from thinwire.compress.codecs.blockwise import rotate
from thinwire.compress.codecs.topk import pack_places, unpack_places


def lost(kind: str, values: torch.Tensor, **options) -> float:
    """||x - D C(x)||^2 / ||x||^2"""
    codec = codec_of(kind, **options)
    error = codec.decode(codec.encode(values), values.numel()).double() - values.double()
    return float(error.square().sum() / values.double().square().sum())


@given(st.lists(st.integers(0, 4095), min_size=2, max_size=64).filter(lambda places: len(places) % 2 == 0))
def test_two_places_take_three_bytes(places) -> None:
    packed = pack_places(torch.tensor([places, places]))
    assert packed.shape == (2, len(places) * 3 // 2)
    assert unpack_places(packed).tolist() == [places, places]


def test_the_layout_of_two_places() -> None:
    assert pack_places(torch.tensor([[0xABC, 0x123]])).tolist() == [[0xBC, 0x3A, 0x12]]


def test_the_layout_of_int4() -> None:
    values = torch.zeros(128)
    values[0], values[64], values[1], values[65] = 7.0, -7.0, -3.0, 2.0
    payload = codec_of("int4").encode(values)
    assert payload[:2].view(torch.bfloat16).tolist() == [1.0]
    assert payload[2:].view(torch.int8)[:3].tolist() == [7 - 7 * 16, -3 + 2 * 16, 0]


def test_the_layout_of_signs_and_digits() -> None:
    signs = torch.ones(256)
    signs[[0, 32 + 1, 224 + 2]] = -1.0
    payload = codec_of("sign").encode(signs)
    assert payload[:2].view(torch.bfloat16).tolist() == [1.0] and payload[2:6].tolist() == [1, 2, 128, 0]
    digits = torch.zeros(320)
    digits[[0, 64, 4 * 64 + 1]] = torch.tensor([2.0, -2.0, 2.0])
    payload = codec_of("ternary").encode(digits)
    assert payload[:2].view(torch.bfloat16).tolist() == [2.0] and payload[2:].view(torch.int8)[:3].tolist() == [-2, 81, 0]


def test_every_byte_of_a_payload_decodes() -> None:
    """All 4-bit pairs and all five digits come back as they went."""
    pairs = torch.cartesian_prod(torch.arange(-7.0, 8), torch.arange(-7.0, 8))
    blocks = torch.zeros(4, 2, 64)
    for index, chunk in enumerate(pairs.split(64)):
        blocks[index, :, : len(chunk)] = chunk.T
    blocks[:, 0, 63] = 7
    codec = codec_of("int4")
    values = blocks.view(-1).contiguous()
    assert torch.equal(codec.decode(codec.encode(values), values.numel()), values)
    digits = torch.cartesian_prod(*[torch.tensor([-1.0, 0.0, 1.0])] * 5)  # 243 bytes
    fifths = torch.zeros(4, 5, 64)
    for index, chunk in enumerate(digits.split(64)):
        fifths[index, :, : len(chunk)] = chunk.T
    codec, values = codec_of("ternary"), fifths.view(-1).contiguous()
    assert torch.equal(codec.decode(codec.encode(values), values.numel()), values)


def test_fp4_decodes_to_the_nearest_power_of_two() -> None:
    powers = torch.tensor([0.0, *[2.0**-exponent for exponent in range(7)]])
    levels = torch.cat([-powers.flip(0)[:-1], powers])
    values = torch.cat([torch.linspace(-1, 1, 127), torch.ones(1)])
    codec = codec_of("fp4")
    nearest = (values.unsqueeze(1) - levels).abs().amin(1)
    error = (codec.decode(codec.encode(values), 128) - values).abs()
    assert torch.allclose(error, nearest, atol=1e-6)


@settings(max_examples=40)
@given(make=vectors, k=st.sampled_from([4, 64, 1024]))
def test_codecs_for_error_feedback_contract(make, k) -> None:
    """What they lose is less than what was there, by the amount their files state; bf16 scales cost at most 2^-16 of ||x||^2."""
    for kind, options in (("sign", {}), ("ternary", {}), ("codebook2", {}), ("topk", {"k": k})):
        values = make(codec_of(kind, **options).block)
        if not values.numel() or values.abs().max() < 1e-30:
            continue
        fraction = lost(kind, values, **options)
        if kind == "sign":
            rows = values.double().view(-1, 256)
            kept = float(rows.abs().sum(1).square().sum() / 256 / rows.square().sum())
            assert fraction <= 1 - kept + 2**-15
        elif kind == "topk":
            assert fraction <= 1 - k / 4096 + 2**-15
        else:
            assert fraction < 1


@pytest.mark.parametrize(
    ("kind", "limit"),
    [("bf16", 3e-6), ("int8", 6e-5), ("int4", 0.014), ("fp4", 0.04), ("codebook2", 0.12), ("ternary", 0.2), ("sign", 0.37)],
)
def test_what_a_normal_vector_loses(kind, limit) -> None:
    """Beside the best that theory allows for independent normal values: 4 levels 0.1175, 3 levels 0.190, 2 levels 0.3634."""
    assert limit / 3 < lost(kind, vector(4096 * 20, 5)) < limit


def test_a_rotation_is_its_own_inverse_and_keeps_the_norm() -> None:
    rows = vector(128 * 5, 6).view(5, 128)
    rotated = rotate(rows)
    assert torch.allclose(rotate(rotated) / 128, rows, atol=1e-5)
    assert torch.allclose(rotated.norm(dim=1) / 128**0.5, rows.norm(dim=1))
    signs = rotate(torch.eye(128))
    assert torch.equal(signs.abs(), torch.ones(128, 128)) and torch.equal(signs, signs.T)


def test_a_rotation_helps_where_there_are_spikes() -> None:
    """Of the small values, not of the norm, which is that of the spikes."""
    values = vector(128 * 64, 7)
    values[::128] *= 30
    small = torch.arange(values.numel()) % 128 != 0
    errors = []
    for hadamard in (False, True):
        codec = codec_of("int4", hadamard=hadamard)
        errors.append(float((codec.decode(codec.encode(values), values.numel()) - values)[small].norm()))
    assert errors[1] < 0.6 * errors[0]
    normal = vector(128 * 64, 8)
    assert lost("int4", normal, hadamard=True) < 1.1 * lost("int4", normal)
