"""Laws of the codecs that take a whole parameter: DCT of tiles, the largest of all, low rank."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.fft import dctn
from vectors import SHAPES, vector

from thinwire.compress.codecs.dct import Demo, basis, pack_bits, unpack_bits
from thinwire.compress.codecs.largest import GlobalTopK
from thinwire.compress.codecs.svd import TruncatedSVD, truncated_svd
from thinwire.compress.codecs.topk import pack_places
from thinwire.errors import UserError

CODECS = [Demo(), Demo(k=1), Demo(k=5, tile=16), GlobalTopK(), GlobalTopK(0.3), TruncatedSVD(), TruncatedSVD(1)]
SIZES = [(), (1,), (0,), (0, 7), (7, 0), (5,), (131,), (1000,), (37, 53), (64, 64), (67, 131), (128, 192), (4, 6, 10), (3, 1, 71)]
TINY = 1e-75
"""What bf16 may lose of subnormal values, squared and added up."""
tensors = st.builds(
    lambda shape, seed, scale, law: vector(math.prod(shape), seed, scale, law).view(shape),
    st.sampled_from(SIZES),
    st.integers(0, 2**20),
    st.sampled_from([1e-30, 1e-9, 1.0, 1e4]),
    st.sampled_from(SHAPES),
)


def there_and_back(codec, values: torch.Tensor) -> torch.Tensor:
    return codec.decode(codec.encode(values), values.shape)


def energy(values: torch.Tensor) -> float:
    return float(values.double().square().sum())


def called(codec) -> str:
    return repr(codec)


@pytest.mark.parametrize("codec", CODECS, ids=called)
@settings(max_examples=15)
@given(values=tensors)
def test_payloads_are_as_long_as_stated_even_and_the_same_again(codec, values) -> None:
    before = values.clone()
    payload = codec.encode(values)
    assert payload.dtype == torch.uint8 and payload.shape == (codec.payload_bytes(values.shape),)
    assert payload.is_contiguous() and payload.numel() % 2 == 0
    assert torch.equal(values, before) and torch.equal(payload, codec.encode(values.clone()))
    decoded = codec.decode(payload, values.shape)
    assert decoded.dtype == torch.float32 and decoded.shape == values.shape and decoded.is_contiguous()
    behind = torch.cat([payload.new_zeros(2), payload])[2:]  # at an even place that is no multiple of 4
    assert torch.equal(codec.decode(behind, values.shape), decoded)


@pytest.mark.parametrize("codec", CODECS, ids=called)
@settings(max_examples=15)
@given(values=tensors)
def test_they_contract(codec, values) -> None:
    """What is lost is no more than what was there, but for bf16 and float32."""
    assert energy(there_and_back(codec, values) - values) <= energy(values) * (1 + 2**-14) + TINY


@pytest.mark.parametrize("codec", CODECS, ids=called)
@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_zeros_stay_zeros(codec, shape) -> None:
    assert not there_and_back(codec, torch.zeros(shape)).any()


@pytest.mark.parametrize("codec", CODECS, ids=called)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("shape", [(1,), (131,), (37, 53), (67, 131)], ids=str)
def test_what_is_not_finite_is_not_hidden(codec, bad, shape) -> None:
    values = vector(math.prod(shape), 3).view(shape)
    values.view(-1)[values.numel() // 2] = bad
    assert not there_and_back(codec, values).view(-1)[values.numel() // 2].isfinite()


@pytest.mark.parametrize("codec", CODECS, ids=called)
def test_other_inputs_are_the_callers_mistake(codec) -> None:
    right = vector(12 * 8, 0).view(12, 8)
    for values in (right.bfloat16(), right.double(), right.T):
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
            codec.decode(code, right.shape)


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: Demo(k=0), "compress.k = 0"),
        (lambda: Demo(tile=8), "16 to 1024"),
        (lambda: GlobalTopK(0.0), "at most 1"),
        (lambda: GlobalTopK(1.1), "at most 1"),
        (lambda: TruncatedSVD(0), "at least 1"),
    ],
)
def test_impossible_options(make, word) -> None:
    with pytest.raises(UserError, match=word) as raised:
        make()
    assert "\n" not in str(raised.value)


# The transform of tiles


@pytest.mark.parametrize(
    ("shape", "tile"),
    [
        ((), (1, 1)),
        ((1000,), (1, 50)),
        ((131,), (1, 64)),
        ((64, 64), (64, 64)),
        ((768, 50257), (64, 29)),
        ((37, 53), (37, 53)),
        ((67, 34), (64, 34)),
        ((96, 100), (48, 50)),
        ((4, 6, 10), (4, 60)),
    ],
)
def test_tiles(shape, tile) -> None:
    assert Demo().tile_shape(shape) == tile


def test_payload_bytes_of_the_paper() -> None:
    """8 of each 64 x 64: 12 + 16 bits each."""
    assert Demo().payload_bytes((128, 192)) == 6 * 8 * 28 // 8
    assert Demo(k=3).payload_bytes((37, 53)) == 3 * 2 + 6  # 33 bits of places


@given(bits=st.integers(0, 20), count=st.integers(0, 40), seed=st.integers(0, 99))
def test_bits_come_back(bits, count, seed) -> None:
    numbers = torch.randint(0, 1 << bits, (count,), generator=torch.Generator().manual_seed(seed))
    packed = pack_bits(numbers, bits)
    assert packed.dtype == torch.uint8 and packed.numel() == math.ceil(count * bits / 8)
    assert torch.equal(unpack_bits(packed, bits, count), numbers)
    if bits == 12:
        even = numbers[: count // 2 * 2]
        assert torch.equal(pack_bits(even, 12), pack_places(even.view(1, -1)).view(-1))


@pytest.mark.parametrize("length", [1, 2, 5, 37, 64])
def test_the_basis_is_orthonormal_and_that_of_scipy(length) -> None:
    made = basis(length, torch.device("cpu"))
    assert torch.allclose(made @ made.T, torch.eye(length), atol=1e-6)
    values = vector(length * length, 1).view(length, length)
    assert torch.allclose(made @ values @ made.T, torch.from_numpy(dctn(values.numpy(), norm="ortho")), atol=1e-4)


@settings(max_examples=25)
@given(values=tensors)
def test_all_coefficients_give_the_values_back(values) -> None:
    """Within bf16, 2^-8 of each coefficient, and what float32 rounds off."""
    error = there_and_back(Demo(k=64 * 64), values) - values
    assert energy(error) <= energy(values) * (2**-8 + 2**-16) ** 2 + TINY


@pytest.mark.parametrize(
    ("shape", "h", "w"), [((64, 64), 64, 64), ((37, 53), 37, 53), ((96, 128), 48, 64), ((60, 2, 30), 60, 60)]
)
@pytest.mark.parametrize("k", [1, 8, 50])
def test_what_is_lost_is_the_energy_of_the_coefficients_left_out(shape, h, w, k) -> None:
    """Parseval; the reference transforms each tile by itself."""
    values = vector(math.prod(shape), k).view(shape)
    matrix = values.view(shape[0], -1).double().numpy()
    left_out = 0.0
    for top in range(0, matrix.shape[0], h):
        for side in range(0, matrix.shape[1], w):
            squares = torch.from_numpy(dctn(matrix[top : top + h, side : side + w], norm="ortho")).square().view(-1)
            left_out += float(squares.sort().values[:-k].sum())
    lost = energy(there_and_back(Demo(k=k), values) - values)
    kept = energy(there_and_back(Demo(k=k), values))
    assert lost == pytest.approx(left_out, rel=1e-4)
    assert kept == pytest.approx(energy(values) - left_out, rel=2**-7)


def test_a_wave_takes_one_coefficient_and_padding_none() -> None:
    wave = torch.outer(basis(64, torch.device("cpu"))[3], basis(48, torch.device("cpu"))[7]) * 5
    assert torch.allclose(there_and_back(Demo(k=1), wave.contiguous()), wave, atol=2e-2 * float(wave.abs().max()))
    values = vector(67 * 131, 1).view(67, 131)
    padded = torch.zeros(128, 192)
    padded[:67, :131] = values
    assert torch.equal(there_and_back(Demo(), values), there_and_back(Demo(), padded)[:67, :131])


# The largest of all


@given(numel=st.integers(1, 3000), fraction=st.sampled_from([0.001, 0.01, 0.07, 0.5, 1.0]), seed=st.integers(0, 99))
def test_the_largest_are_kept_in_bf16_and_nothing_else(numel, fraction, seed) -> None:
    codec, values = GlobalTopK(fraction), vector(numel, seed, shape="decades")
    kept = codec.kept((numel,))
    assert 0 <= kept - fraction * numel < 1 or kept == round(fraction * numel)
    order = values.abs().argsort(descending=True)
    wanted = torch.zeros(numel)
    wanted[order[:kept]] = values[order[:kept]].bfloat16().float()
    once = there_and_back(codec, values)
    assert torch.equal(once, wanted)
    assert torch.equal(codec.encode(once), codec.encode(values))


def test_a_fraction_is_the_number_as_written() -> None:
    assert [GlobalTopK(0.07).kept((100,)), GlobalTopK(0.01).kept((10, 10)), GlobalTopK(0.01).kept((101,))] == [7, 1, 2]
    assert GlobalTopK(0.01).payload_bytes((1000, 10)) == 600


def test_the_layout_of_the_largest() -> None:
    values = torch.zeros(5, 100)
    values[3, 1], values[0, 2] = -2.0, 1.0
    payload = GlobalTopK(0.004).encode(values)
    assert payload[:8].view(torch.int32).tolist() == [2, 301] and payload[8:].view(torch.bfloat16).tolist() == [1.0, -2.0]


# Low rank


@settings(max_examples=25)
@given(rows=st.integers(1, 40), columns=st.integers(1, 40), rank=st.integers(1, 45), seed=st.integers(0, 99))
def test_the_error_is_the_tail_of_the_singular_values(rows, columns, rank, seed) -> None:
    values = vector(rows * columns, seed).view(rows, columns)
    tail = torch.linalg.svdvals(values.double())[rank:].square().sum()
    lost = energy(there_and_back(TruncatedSVD(rank), values) - values)
    assert lost == pytest.approx(float(tail), rel=1e-4, abs=1e-9 * energy(values))
    assert TruncatedSVD(rank).payload_bytes((rows, columns)) == 4 * (rows + columns) * min(rank, rows, columns)


def test_factors_have_one_sign_and_keep_the_dtype() -> None:
    values = vector(30 * 20, 5).view(30, 20)
    left, right = truncated_svd(values, 6)
    assert left.shape == (30, 6) and right.shape == (20, 6) and left.dtype == right.dtype == torch.float32
    assert bool((right.gather(0, right.abs().argmax(0, keepdim=True)) > 0).all())
    minus_left, minus_right = truncated_svd(-values, 6)
    assert torch.allclose(minus_left, -left, atol=1e-5) and torch.allclose(minus_right, right, atol=1e-5)
    assert torch.allclose(right.T @ right, torch.eye(6), atol=1e-5)
    assert truncated_svd(values.double(), 2)[0].dtype == torch.float64


def test_what_has_low_rank_comes_back() -> None:
    values = (vector(50 * 3, 1).view(50, 3) @ vector(3 * 24, 2).view(3, 24)).view(50, 4, 6)
    once = there_and_back(TruncatedSVD(3), values)
    assert torch.allclose(once, values, atol=1e-5)
    assert torch.allclose(there_and_back(TruncatedSVD(3), once), once, atol=1e-5)
