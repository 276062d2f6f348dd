"""Fused kernels give the same bits as the plain ones. Compiling takes seconds, on a busy machine a minute."""

import pytest
import torch
from vectors import SCALES, SHAPES, codec_of, vector

from thinwire.compress.codecs.fused import fused_or_reason, pairwise_sum, round_bf16


@pytest.mark.long
@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_fused_and_plain_give_the_same_bits(kind) -> None:
    if (reason := fused_or_reason()) is not None:
        pytest.skip(reason)
    plain, fused = codec_of(kind), codec_of(kind, fused=True)
    for seed, scale in enumerate((*SCALES, 3e38 / 6)):
        for shape in ("normal", *SHAPES):
            values = vector((seed * 7 % 5) * plain.block, seed, scale, shape).clamp(-3.3e38, 3.3e38)
            payload = plain.encode(values)
            assert torch.equal(fused.encode(values), payload)
            assert torch.equal(fused.decode(payload, values.numel()), plain.decode(payload, values.numel()))


def test_no_compiler_no_fused_kernel_same_result(monkeypatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}):
        reason = fused_or_reason()
        assert reason is not None and "compiler" in reason and "\n" not in reason
        values = vector(128 * 9, 0)
        assert torch.equal(codec_of("int4", fused=True).encode(values), codec_of("int4").encode(values))


def test_bf16_is_rounded_to_nearest() -> None:
    values = vector(10_000, 1, shape="decades")
    assert torch.equal(round_bf16(values), values.bfloat16().float())  # no ties among them
    assert round_bf16(torch.tensor([1 + 2**-8, -(1 + 2**-8)])).tolist() == [1 + 2**-7, -(1 + 2**-7)]


def test_pairwise_sum_is_a_sum() -> None:
    for width in (1, 2, 5, 320, 4096):
        rows = vector(6 * width, width).view(6, width)
        assert torch.allclose(pairwise_sum(rows).double(), rows.double().sum(1), atol=1e-3)
