"""int4 of a rotated block: a spike is spread over its block, so that it no longer sets the scale of all the others alone.

    y = H x / 128,  coded as int4,  decoded: H y          H: the Hadamard matrix of order 128, entries +-1, H H = 128

In 7 steps of sums and differences, so every rank gets the same bits; a matrix product would not promise that. The scale follows
the norm of the block and not its largest value; the mean error falls for spiked blocks and stays the same for normal ones. The
worst case is wider: errors of at most s / 2 in each of the 128 y may add up, |error| <= 64 s, s = bf16(max |y| / 7). Single zeros
do not stay zeros; all of them do. Coding what was decoded may give other codes.
Ashkboos et al. 2024 (QuaRot), Jia et al. 2024 (SDP4Bit: Hadamard-smoothed 4-bit gradients).
"""

import torch
from torch import Tensor


def rotate(rows: Tensor) -> Tensor:
    """[.., width] -> rows times the Hadamard matrix of order `width`, a power of two, without normalisation."""
    shape, width = rows.shape, rows.shape[-1]
    half = width // 2
    while half:
        pairs = rows.view(-1, width // (2 * half), 2, half)
        first, second = pairs[:, :, 0], pairs[:, :, 1]
        rows = torch.stack([first + second, first - second], 2).view(-1, width)
        half //= 2
    return rows.view(shape)
