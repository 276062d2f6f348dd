"""One bit a value: its sign, and one scale a block.

    s = bf16(mean |x|),  decoded: s where x >= 0, -s where x < 0          block 256, 1.0625 bits a value

The mean is the scale that loses least: ||x - D(C(x))||^2 = ||x||^2 - ||x||_1^2 / block, a contraction, which is what error
feedback needs to converge (without it sign descent may diverge). One bit cannot say zero: a zero in a block that is not all
zeros decodes to +s, a block of zeros to zeros. |error| = | |x| - s |, s within 2^-8 of the mean. Coding what was decoded
gives the same payload again. A block with a nan or an inf decodes to nothing finite.

Byte j of a block holds the signs of x[j], x[j + 32], ... x[j + 224], bit 0 first; 1 is negative.
Seide et al. 2014 (1-bit SGD), Karimireddy et al. 2019 (error feedback fixes signSGD), Tang et al. 2021 (1-bit Adam).
"""

from typing import ClassVar

import torch
from torch import Tensor

from thinwire.compress.codecs.blocked import Blocked, bits_of, digits_packed
from thinwire.compress.codecs.fused import pairwise_sum, round_bf16

BLOCK, BYTES, BITS = 256, 32, 8


def _means(rows: Tensor) -> Tensor:
    return pairwise_sum(rows.abs() * (1 / BLOCK)).unsqueeze(1)


class Sign(Blocked):
    """1.0625 bits a value."""

    name: ClassVar[str] = "sign"
    block: ClassVar[int] = BLOCK
    code_bytes: ClassVar[int] = BYTES

    @staticmethod
    def encode_kernel(rows: Tensor, header: Tensor, codes: Tensor) -> None:
        header.copy_(round_bf16(_means(rows)))
        negative = (rows < 0).to(torch.uint8).view(-1, BITS, BYTES)
        codes.view(torch.uint8).copy_(digits_packed(negative, 2))

    @staticmethod
    def decode_kernel(rows: Tensor, header: Tensor, codes: Tensor) -> None:
        scales = header.to(torch.float32).unsqueeze(2)
        rows.view(-1, BITS, BYTES).copy_((1.0 - 2.0 * bits_of(codes.view(torch.uint8), 1)) * scales)
