"""The k largest coefficients of the cosine transform of each tile: DeMo.

    Y = C_h X C_w^T for each tile X of h x w,  decoded: C_h^T Y_k C_w          Y_k: bf16 of the k largest |Y_ij|, else 0
    C_n[i, j] = sqrt((1 + [i > 0]) / n) cos(pi i (2 j + 1) / 2 n),  C_n C_n^T = 1: the orthonormal DCT-II

The transform keeps the norm, so by Parseval what is lost is the energy of the coefficients that are not sent: at most
(1 - k / hw) ||X||^2, a contraction, which needs error feedback. What is smooth along rows or columns goes into few coefficients.

A parameter is the matrix [shape[0], all the rest]; one with a single dim is cut into tiles of 1 x w. A side of at most `tile` is
one piece. A longer one is cut by its largest divisor up to `tile`, or, if that is below 16, as with primes, filled up with zeros
to a multiple of `tile`. Payload: values of all tiles in bf16, then places of b = ceil(log2 hw) bits each in one stream, low bits
first, zero bits up to an even number of bytes: 12 + 16 bits for each value sent where tiles are 64 x 64.

Decoding scatters to places that differ, so the order does not matter. The matrix products give the same bits on processors of one
kind, not on all. Zeros decode to zeros; a tile with a nan or an inf decodes to nothing finite. A largest coefficient may be
sqrt(hw) times the largest value. Peng et al. 2024 (DeMo, arXiv 2411.19870): tiles of 64, k of 1 to 32.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from thinwire.compress.base import TensorCodec, check_payload, check_tensor, matrix_shape
from thinwire.errors import UserError

SMALLEST_SIDE = 16
"""A shorter piece of a longer side gathers too little."""


def pack_bits(numbers: Tensor, bits: int) -> Tensor:
    """Integers below 2^bits -> uint8, `bits` each, low bits first; the last byte is filled with zeros. [n] -> [n bits / 8]"""
    stream = ((numbers.unsqueeze(1) >> torch.arange(bits, device=numbers.device)) & 1).view(-1)
    stream = functional.pad(stream, (0, -stream.numel() % 8)).view(-1, 8)
    return (stream << torch.arange(8, device=numbers.device)).sum(1).to(torch.uint8)


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """What `pack_bits` packed -> [count] int64."""
    stream = ((packed.to(torch.int64).unsqueeze(1) >> torch.arange(8, device=packed.device)) & 1).view(-1)
    return (stream[: count * bits].view(count, bits) << torch.arange(bits, device=packed.device)).sum(1)


def basis(length: int, device: torch.device) -> Tensor:
    """C_n."""
    places = torch.arange(length, dtype=torch.float64, device=device)
    waves = torch.cos(places.unsqueeze(1) * (2 * places + 1) * (math.pi / (2 * length))) * math.sqrt(2 / length)
    waves[0] = math.sqrt(1 / length)
    return waves.to(torch.float32)


@dataclass(frozen=True)
class Demo(TensorCodec):
    """By default 8 of 64 x 64 values: 0.055 bits a value where sides are multiples of 64."""

    k: int = 8
    """Coefficients of each tile; all of them where a tile has no more."""
    tile: int = 64
    """The longest side of a tile."""

    def __post_init__(self) -> None:
        if self.k < 1:
            raise UserError(f"compress.k = {self.k}: at least 1 coefficient of each tile is sent")
        if not SMALLEST_SIDE <= self.tile <= 1024:
            raise UserError(f"compress.tile = {self.tile}: the sides of tiles are {SMALLEST_SIDE} to 1024")

    def tile_shape(self, shape: Sequence[int]) -> tuple[int, int]:
        """h, w of the tiles that a parameter of `shape` is cut into."""
        rows, columns = _sides(shape)
        return self._piece(rows), self._piece(columns)

    def payload_bytes(self, shape: Sequence[int]) -> int:
        """Values and packed places."""
        count, bits = self._sent(shape)
        return 2 * count + 2 * math.ceil(count * bits / 16)

    def encode(self, values: Tensor) -> Tensor:
        check_tensor(values)
        count, bits = self._sent(values.shape)
        if not count:
            return values.new_empty(0, dtype=torch.uint8)
        h, w = self.tile_shape(values.shape)
        rows, columns = _sides(values.shape)
        matrix = functional.pad(values.view(rows, columns), (0, -columns % w, 0, -rows % h))
        tiles = matrix.unflatten(0, (-1, h)).unflatten(2, (-1, w)).transpose(1, 2)  # [down, across, h, w]
        coefficients = (basis(h, values.device) @ (tiles.reshape(-1, h, w) @ basis(w, values.device).T)).flatten(1)
        places = coefficients.abs().topk(min(self.k, h * w), dim=1, sorted=False).indices.sort(1).values
        chosen = coefficients.gather(1, places).to(torch.bfloat16).view(-1)
        packed = pack_bits(places.view(-1), bits)
        return torch.cat([chosen.view(torch.uint8), functional.pad(packed, (0, packed.numel() % 2))])

    def decode(self, payload: Tensor, shape: Sequence[int]) -> Tensor:
        check_payload(payload, self.payload_bytes(shape))
        count, bits = self._sent(shape)
        if not count:
            return torch.empty(tuple(shape), device=payload.device)
        h, w = self.tile_shape(shape)
        rows, columns = _sides(shape)
        kept = min(self.k, h * w)
        places = unpack_bits(payload[2 * count :], bits, count).view(-1, kept)
        chosen = payload[: 2 * count].view(torch.bfloat16).view(-1, kept).to(torch.float32)
        coefficients = torch.zeros(count // kept, h * w, device=payload.device).scatter_(1, places, chosen).view(-1, h, w)
        tiles = basis(h, payload.device).T @ (coefficients @ basis(w, payload.device))
        across = math.ceil(columns / w)
        matrix = tiles.view(-1, across, h, w).transpose(1, 2).reshape(-1, across * w)
        return matrix[:rows, :columns].contiguous().view(tuple(shape))

    def _piece(self, side: int) -> int:
        if side <= self.tile:
            return max(side, 1)
        largest = max(divisor for divisor in range(1, self.tile + 1) if side % divisor == 0)
        return largest if largest >= SMALLEST_SIDE else self.tile

    def _sent(self, shape: Sequence[int]) -> tuple[int, int]:
        """Coefficients in all, and bits of a place."""
        h, w = self.tile_shape(shape)
        rows, columns = _sides(shape)
        return math.ceil(rows / h) * math.ceil(columns / w) * min(self.k, h * w), (h * w - 1).bit_length()


def _sides(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns; a single dim lies along the row."""
    return matrix_shape(shape) if len(shape) > 1 else (1, math.prod(shape))
