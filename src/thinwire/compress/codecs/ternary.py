"""Three values: -s, 0, s.

    t = 0.7 mean |x|,  S = {i : |x_i| >= t},  s = bf16(mean of |x_i| over S),  decoded: s sign(x) in S, else 0

t is close to the threshold that loses least for values drawn from a normal or uniform law, and s is the best scale for any t,
so the loss is ||x||^2 - ||x_S||_1^2 / |S|: a contraction. Deterministic, unlike TernGrad, which draws; with error
feedback the draw is not needed. |error| <= max(t, max |x| - t), and a little for bf16. Zeros decode to zeros, and so does a
block whose largest value is below 2^-120; coding what was decoded gives the same payload again. A nan or an inf leaves
nothing of its block finite.

Five ternary digits make a byte, q0 + 3 q1 + 9 q2 + 27 q3 + 81 q4 in -121..121; the last digit is the byte / 81 rounded to
nearest, and so on down. Digit k of byte j is value j + 64 k of a block of 320: 1.65 bits a value. Li et al. 2016 (ternary
weight networks), Wen et al. 2017 (TernGrad).
"""

from typing import ClassVar

import torch
from torch import Tensor

from thinwire.compress.codecs.blocked import Blocked, digits_packed
from thinwire.compress.codecs.fused import SMALLEST, pairwise_sum, round_bf16

BLOCK, BYTES, DIGITS = 320, 64, 5


def _thresholds(rows: Tensor) -> Tensor:
    """[n, 1]; inf where the block counts as zeros."""
    sizes = rows.abs()
    threshold = pairwise_sum(sizes * (1 / BLOCK)) * 0.7
    return torch.where(sizes.amax(1) < SMALLEST, torch.inf, threshold).unsqueeze(1)


class Ternary(Blocked):
    """1.65 bits a value."""

    name: ClassVar[str] = "ternary"
    block: ClassVar[int] = BLOCK
    code_bytes: ClassVar[int] = BYTES

    @staticmethod
    def encode_kernel(rows: Tensor, header: Tensor, codes: Tensor) -> None:
        sizes = rows.abs()
        chosen = (sizes >= _thresholds(rows)).to(torch.float32)
        share = chosen.sum(1) * (1 / BLOCK)
        total = pairwise_sum(sizes * (1 / BLOCK) * chosen)
        header.copy_(round_bf16(torch.where(share > 0, total / share, total)).unsqueeze(1))
        codes.copy_(digits_packed((chosen * rows.sign()).view(-1, DIGITS, BYTES), 3))

    @staticmethod
    def decode_kernel(rows: Tensor, header: Tensor, codes: Tensor) -> None:
        scales = header.to(torch.float32).unsqueeze(2)
        rest = codes.to(torch.float32)
        digits = []
        for digit in reversed(range(DIGITS)):
            digits.append((rest * (1 / 3**digit)).round())
            rest = rest - digits[-1] * 3**digit
        rows.view(-1, DIGITS, BYTES).copy_(torch.stack(digits[::-1], 1) * scales)
