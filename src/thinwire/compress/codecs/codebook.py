"""Two bits a value, with a codebook made from each block.

    r = sqrt(mean x^2),  bins: x < -r,  -r <= x < 0,  0 <= x < r,  r <= x,  decoded: bf16(mean of the bin)

These are four equal bins over -2 r .. 2 r with open ends. The best borders for a normal law are 0 and +-0.98 r (Lloyd and
Max), so nothing is searched for; the means are the best codebook for any bins, which is what makes 2 bits enough for pseudo-
gradients where evenly spaced levels are not. |error| <= max(r, max |x| - r), and a little for bf16. A block of zeros decodes
to zeros, and so does one whose largest value is below 2^-120; a zero among others decodes to the mean of its bin, and coding
what was decoded may give other bins. A block with a nan or an inf decodes to nothing finite.

Block 4096: 1024 bytes, each with the bins of x[j], x[j + 1024], x[j + 2048], x[j + 3072], lowest bits first, and four bf16
means: 2.0156 bits a value. Jaghouar et al. 2024 (INTELLECT-1: bins over sigmas, codebook of means), Sarfi et al. 2025
(SparseLoCo: 2 bits).
"""

from typing import ClassVar

import torch
from torch import Tensor

from thinwire.compress.codecs.blocked import Blocked, bits_of, digits_packed
from thinwire.compress.codecs.fused import inverse, pairwise_sum, round_bf16

BLOCK, BYTES, BINS = 4096, 1024, 4


def _normalised(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """rows / scale in -1.01 .. 1.01 so that squares stay in range, the scale [n, 1], and r / scale [n, 1]."""
    scales = round_bf16(rows.abs().amax(1)).unsqueeze(1)
    parts = rows * inverse(scales)
    return parts, scales, pairwise_sum(parts * parts * (1 / BLOCK)).sqrt().unsqueeze(1)


class Codebook2(Blocked):
    """2.0156 bits a value."""

    name: ClassVar[str] = "codebook2"
    block: ClassVar[int] = BLOCK
    header_values: ClassVar[int] = BINS
    code_bytes: ClassVar[int] = BYTES

    @staticmethod
    def encode_kernel(rows: Tensor, header: Tensor, codes: Tensor) -> None:
        parts, scales, root = _normalised(rows)
        bins = (parts >= -root).to(torch.uint8) + (parts >= 0).to(torch.uint8) + (parts >= root).to(torch.uint8)
        means = []
        for index in range(BINS):
            inside = (bins == index).to(torch.float32)
            count = inside.sum(1)
            means.append(pairwise_sum(parts * inside) / torch.where(count > 0, count, 1.0))
        header.copy_(round_bf16((torch.stack(means, 1) * scales).contiguous()))
        codes.view(torch.uint8).copy_(digits_packed(bins.view(-1, BINS, BYTES), BINS))

    @staticmethod
    def decode_kernel(rows: Tensor, header: Tensor, codes: Tensor) -> None:
        bins = bits_of(codes.view(torch.uint8), 2).view(-1, BLOCK)
        rows.copy_(header.to(torch.float32).gather(1, bins.to(torch.int64)))
