"""Stochastic rounding without a random stream: the dither is a hash of the value itself.

    t = |x| / s,  q = sign(x) floor(t + u),  u = hash(bits of |x|, place in the block) / 2^16  in 0 .. 1 - 2^-16

If u were drawn evenly, q would be t on average: the rounding has no bias. Here u is a function of the value's float32 bits and
of its place. So the same values give the same bytes, on every rank and after a resume, there is no state to keep, and -x codes to
minus what x codes to. The limit: it is unbiased only over values that differ, be it in their last bits alone. A value that comes
back with all its bits at the same place of a block is rounded the same way each time, and its error does not average out.

t is first rounded to the nearest multiple of 2^-16, which brings no bias; from there on all is in integers. The hash mixes 32
bits by shifts and odd multipliers. Gupta et al. 2015 (stochastic rounding), Alistarh et al. 2017 (QSGD), Wellons 2018 (the
constants).
"""

import torch
from torch import Tensor

BITS = 16
"""Of the dither."""
_FIRST, _SECOND = 0x7FEB352D, 0x846CA68B - (1 << 32)
_PLACE = 0x1E3779B9


def _shifted(words: Tensor, by: int) -> Tensor:
    """words >> by, zeros coming in from the left: on int32 `>>` brings in the sign."""
    return (words >> by) & ((1 << (32 - by)) - 1)


def dither(rows: Tensor) -> Tensor:
    """[.., block] float32 -> [.., block] int32 in 0 .. 2^16 - 1. The product of int32 wraps, which is what is wanted."""
    places = torch.arange(rows.shape[-1], dtype=torch.int32, device=rows.device) * _PLACE
    words = (rows.view(torch.int32) & 0x7FFFFFFF) ^ places
    words = (words ^ _shifted(words, 16)) * _FIRST
    words = (words ^ _shifted(words, 15)) * _SECOND
    return _shifted(words, 32 - BITS)


def round_stochastic(rows: Tensor, inverses: Tensor, levels: int) -> Tensor:
    """[.., block] float32 and [.., 1] 1 / s -> q as float32, in -levels .. levels. Finite |x| / s must not pass 2^14."""
    fixed = (rows.abs() * inverses * 2**BITS).round_().to(torch.int32)
    return ((fixed + dither(rows)) >> BITS).clamp(max=levels).to(torch.float32).copysign(rows)
