"""int8, int4 and 4-bit floats with one scale a block: the workhorses.

    s = bf16(max |x| / L),  q = round(x / s) in -L..L,  decoded: q s          L = 127 (int8, block 256) or 7 (int4, block 128)

Rounded to nearest, |error| <= s / 2; bf16 moves s by at most 2^-8, too little to carry the largest value past L + 1/2. Coding
what was decoded gives the same payload again. fp4 is E3M0, a sign and a power of two: q in 0, 2^-6 .. 2^0 of s = bf16(max
|x|), nearest, |error| <= max(|x| / 3, 2^-7 s).

Stochastic rounding (int8, int4; s is then rounded up, so that no |x / s| passes L), without a random stream:

    t = |x| / s,  q = sign(x) floor(t + u),  u = hash(bits of |x|, place in the block) / 2^16  in 0 .. 1 - 2^-16

If u were drawn evenly, q would be t on average: the rounding has no bias. Here u is a function of the value's float32 bits and
of its place. So the same values give the same bytes, on every rank and after a resume, there is no state to keep, and -x codes to
minus what x codes to. The limit: it is unbiased only over values that differ, be it in their last bits alone. A value that comes
back with all its bits at the same place of a block is rounded alike each time, and its error does not average out. t is first
rounded to the nearest multiple of 2^-16, which brings no bias; from there on all is in integers. The hash mixes 32 bits by shifts
and odd multipliers. |error| <= s, and coding what was decoded may give another payload. It is for where nothing feeds errors
back; where something does, nearest loses less.

A rotated block (int4): a spike is spread over its block, so that it no longer sets the scale of all the others alone.

    y = H x / 128,  coded as int4,  decoded: H y          H: the Hadamard matrix of order 128, entries +-1, H H = 128

In 7 steps of sums and differences, so every rank gets the same bits; a matrix product would not promise that. The scale follows
the norm of the block and not its largest value; the mean error falls for spiked blocks and stays the same for normal ones. The
worst case is wider: errors of at most s / 2 in each of the 128 y may add up, |error| <= 64 s, s = bf16(max |y| / 7). Single zeros
do not stay zeros; all of them do. Coding what was decoded may give other codes.

Two 4-bit codes a, b in -7..7 share the byte a + 16 b, a from the first half of the block and b from the second: b is then the
byte / 16 rounded to nearest. All arithmetic is on small integers in float32, so it is exact.
Zeros decode to zeros; a block whose scale is below 2^-120 too. A block with a nan or an inf decodes to nothing finite.

Dettmers et al. 2022 (block-wise 8 bit), Wang et al. 2023 (ZeRO++: int4), Douillard et al. 2025 (Streaming DiLoCo: E3M0); Gupta et
al. 2015 (stochastic rounding), Alistarh et al. 2017 (QSGD), Wellons 2018 (the constants of the hash); Ashkboos et al. 2024
(QuaRot), Jia et al. 2024 (SDP4Bit: Hadamard-smoothed 4-bit gradients).
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from thinwire.compress.codecs.blocked import Fusable, Kernels
from thinwire.compress.codecs.fused import inverse, round_bf16
from thinwire.errors import UserError

INT8_BLOCK, INT4_BLOCK, HALF = 256, 128, 64
BITS = 16
"""Of the dither."""
_FIRST, _SECOND = 0x7FEB352D, 0x846CA68B - (1 << 32)
_PLACE = 0x1E3779B9


def _largest(rows: Tensor) -> Tensor:
    """[.., block] -> [.., 1]"""
    return rows.abs().amax(-1, keepdim=True)


def _pack(numbers: Tensor, codes: Tensor) -> None:
    """[.., block] whole numbers in -7..7 -> two in a byte."""
    codes.copy_(numbers[..., :HALF].add(numbers[..., HALF:], alpha=16))


def _unpack(codes: Tensor) -> Tensor:
    """What `_pack` packed, as [.., 2 halves, HALF]: byte - 16 b for the first half and b for the second, in one expression for
    both, because a compiler makes slow code of two writes into one tensor."""
    both = codes.unsqueeze(-2).to(torch.float32)
    second = (both * 0.0625).round_()
    half = torch.arange(2, dtype=torch.float32, device=codes.device).view(2, 1)
    return torch.addcmul(both * (1 - half), second, 17 * half - 16)


def _nearest(rows: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Scales [.., 1] and whole numbers [.., block]."""
    scales = round_bf16(_largest(rows) * (1 / levels))
    return scales, (rows * inverse(scales)).round_()


def _stochastic(rows: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """As `_nearest`."""
    scales = round_bf16(_largest(rows) * (1 / levels), up=True)
    return scales, round_stochastic(rows, inverse(scales), levels)


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


@dataclass(frozen=True)
class _Integers(Fusable):
    rounding: Literal["nearest", "stochastic"] = "nearest"
    """Stochastic: without bias over values that differ, with twice the largest error."""

    levels: ClassVar[int]

    def __post_init__(self) -> None:
        if self.rounding not in ("nearest", "stochastic"):
            raise UserError(f"compress.rounding = {self.rounding!r}: values are rounded nearest or stochastic")

    @staticmethod
    def put(numbers: Tensor, codes: Tensor) -> None:
        """Whole numbers in -levels .. levels [.., block] -> codes."""

    def make_kernels(self) -> Kernels:
        """The error comes for less than by decoding."""
        quantised, levels, put = _nearest if self.rounding == "nearest" else _stochastic, self.levels, self.put

        def encode(rows: Tensor, header: Tensor, codes: Tensor) -> None:
            scales, numbers = quantised(rows, levels)
            header.copy_(scales)
            put(numbers, codes)

        def subtract(rows: Tensor, header: Tensor, codes: Tensor) -> None:
            scales, numbers = quantised(rows, levels)
            header.copy_(scales)
            put(numbers, codes)
            rows.sub_(numbers.mul_(scales))

        return Kernels.of(encode, self.decode_kernel, subtract)


class Int8(_Integers):
    """8.0625 bits a value."""

    name: ClassVar[str] = "int8"
    block: ClassVar[int] = INT8_BLOCK
    code_bytes: ClassVar[int] = INT8_BLOCK
    levels: ClassVar[int] = 127

    @staticmethod
    def put(numbers: Tensor, codes: Tensor) -> None:
        codes.copy_(numbers)

    @staticmethod
    def decode_kernel(rows: Tensor, header: Tensor, codes: Tensor) -> None:
        rows.copy_(codes)
        rows.mul_(header.to(torch.float32))


@dataclass(frozen=True)
class Int4(_Integers):
    """4.125 bits a value."""

    name: ClassVar[str] = "int4"
    block: ClassVar[int] = INT4_BLOCK
    code_bytes: ClassVar[int] = HALF
    levels: ClassVar[int] = 7

    hadamard: bool = False
    """Rotate each block before it is coded: for vectors with spikes."""

    @staticmethod
    def put(numbers: Tensor, codes: Tensor) -> None:
        _pack(numbers, codes)

    @staticmethod
    def decode_kernel(rows: Tensor, header: Tensor, codes: Tensor) -> None:
        rows.unflatten(-1, (2, HALF)).copy_(_unpack(codes).mul_(header.to(torch.float32).unsqueeze(-1)))

    def make_kernels(self) -> Kernels:
        """Those of integers, of blocks that are rotated there and back if asked for."""
        plain = super().make_kernels()
        if not self.hadamard:
            return plain

        def encode(rows: Tensor, header: Tensor, codes: Tensor) -> None:
            plain.encode(rotate(rows * (1 / INT4_BLOCK)), header, codes)

        def decode(rows: Tensor, header: Tensor, codes: Tensor) -> None:
            numbers = _unpack(codes).mul_(header.to(torch.float32).unsqueeze(-1))
            rows.copy_(rotate(numbers.flatten(-2)))

        return Kernels.of(encode, decode)


@dataclass(frozen=True)
class Float4(Fusable):
    """4.125 bits a value, E3M0."""

    name: ClassVar[str] = "fp4"
    block: ClassVar[int] = INT4_BLOCK
    code_bytes: ClassVar[int] = HALF

    @staticmethod
    def encode_kernel(rows: Tensor, header: Tensor, codes: Tensor) -> None:
        """The exponent of 4/3 |x| / s is that of the nearest power of two: between 2^k and 2^(k+1) the middle is 3/2 2^k."""
        scales = round_bf16(_largest(rows))
        header.copy_(scales)
        parts = rows * inverse(scales)
        sizes = parts.abs()
        exponents = ((sizes * (4 / 3)).view(torch.int32) >> 23) - 120
        numbers = torch.maximum(exponents, (sizes >= 2**-7).to(torch.int32)).clamp(max=7)
        _pack(numbers.to(torch.float32) * parts.sign(), codes)

    @staticmethod
    def decode_kernel(rows: Tensor, header: Tensor, codes: Tensor) -> None:
        """+-2^(|q| - 7) s, made from the bits of its exponent; 0 for q = 0."""
        numbers = _unpack(codes)
        powers = ((numbers.abs().to(torch.int32) + 120) << 23).view(torch.float32)
        rows.unflatten(-1, (2, HALF)).copy_(numbers.sign_().mul_(powers).mul_(header.to(torch.float32).unsqueeze(-1)))
