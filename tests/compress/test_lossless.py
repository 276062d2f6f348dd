"""Every bit comes back."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vectors import vector

from thinwire.compress.codecs.lossless import Lossless, pays_below_bps

HEADER = 40


def bits(values: torch.Tensor) -> torch.Tensor:
    return values.view(torch.int32 if values.dtype == torch.float32 else torch.int16)


def there_and_back(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    payload = Lossless().encode(values)
    assert payload.dtype == torch.uint8 and payload.dim() == 1 and payload.is_contiguous() and payload.numel() % 2 == 0
    decoded = Lossless().decode(payload)
    assert decoded.dtype == values.dtype and torch.equal(bits(decoded), bits(values))
    return payload, decoded


@given(words=st.lists(st.integers(-(2**31), 2**31 - 1), max_size=40))
def test_all_patterns_of_32_bits_come_back(words) -> None:
    there_and_back(torch.tensor(words, dtype=torch.int32).view(torch.float32))


def test_all_values_of_bf16_come_back() -> None:
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    there_and_back(every)
    there_and_back(every.flip(0)[1:])


SPECIAL = [0x7FC00001, -1, 0x7F800001, 0x7F800000, -0x800000, -0x80000000, 0, 1, 0x807FFFFF - 2**32, 0x7F7FFFFF]


@pytest.mark.parametrize("repeats", [1, 1000, 70_001])
def test_nans_with_their_payloads_infinities_zeros_and_subnormals_come_back(repeats) -> None:
    there_and_back(torch.tensor(SPECIAL, dtype=torch.int32).repeat(repeats).view(torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=25)
@given(
    numel=st.sampled_from([0, 1, 2, 3, 255, 2047, 2049, 40_001, 65_536, 131_075]),
    seed=st.integers(0, 99),
    shape=st.sampled_from(["normal", "decades", "spikes", "sparse", "equal", "shifted"]),
    scale=st.sampled_from([0.0, 1e-40, 1e-9, 1.0, 1e38]),
)
def test_what_was_coded_comes_back_and_again_with_the_same_bytes(dtype, numel, seed, shape, scale) -> None:
    values = vector(numel, seed, scale, shape).to(dtype)
    before = values.clone()
    payload, decoded = there_and_back(values)
    assert torch.equal(bits(values), bits(before))
    assert torch.equal(Lossless().encode(decoded), payload)
    assert payload.numel() <= HEADER + numel * values.element_size() + 1
    behind = torch.cat([payload.new_zeros(2), payload])[2:]
    assert torch.equal(bits(Lossless().decode(behind)), bits(values))


def test_random_bits_stay_as_they_are() -> None:
    words = torch.randint(-(2**31), 2**31, (100_000,), generator=torch.Generator().manual_seed(1)).to(torch.int32)
    payload, _ = there_and_back(words.view(torch.float32))
    assert payload.numel() == HEADER + 400_000


def normal_exponent_bits() -> float:
    """The entropy of the exponent of a normal value."""
    phi = torch.distributions.Normal(0.0, 1.0).cdf
    edges = phi(torch.tensor([2.0**power for power in range(-40, 6)], dtype=torch.float64))
    shares = 2 * edges.diff()
    return float(-(shares[shares > 0] * shares[shares > 0].log2()).sum())


def test_normal_values_come_near_the_entropy_of_their_exponents() -> None:
    """A Huffman code spends at most a few hundredths of a bit more here."""
    entropy = normal_exponent_bits()
    for dtype, width in ((torch.float32, 32), (torch.bfloat16, 16)):
        values = vector(1 << 18, 2).to(dtype)
        spent = there_and_back(values)[0].numel() * 8 / values.numel()
        assert width - 8 + entropy < spent < width - 8 + entropy + 0.1


def test_rows_of_zeros_cost_little() -> None:
    values = torch.zeros(1 << 18)
    values[:4096] = vector(4096, 1)
    assert there_and_back(values)[0].numel() < 4096 * 4 + 10_000


def test_where_it_pays() -> None:
    """At the rate given, sending plain takes as long as coding, sending less, decoding."""
    ratio, encoder, decoder = 0.83, 400e6, 600e6
    link = pays_below_bps(ratio, encoder, decoder)
    plain = 8e6 / link
    assert math.isclose(plain, ratio * plain + 1e6 / encoder + 1e6 / decoder)
    assert pays_below_bps(1.01, encoder, decoder) == 0.0


def test_other_inputs_are_the_callers_mistake() -> None:
    right = vector(100, 0)
    for values in (right.double(), right.half(), right.view(2, 50), right[::2]):
        with pytest.raises(AssertionError):
            Lossless().encode(values)
    payload = Lossless().encode(right)
    for code in (payload[:-2], torch.cat([payload, payload]), torch.cat([payload, payload])[::2], payload.view(torch.int8)):
        with pytest.raises(AssertionError):
            Lossless().decode(code)
