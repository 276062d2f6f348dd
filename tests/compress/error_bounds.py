"""How far what a codec decodes may be from what it was given: for each the bound that the top of its file states, as numbers."""

import torch
from torch import Tensor

from thinwire.compress.activations.boundary import BoundaryCodec
from thinwire.compress.base import Codec
from thinwire.compress.codecs.blockwise import Float4, Int4, _Integers, rotate
from thinwire.compress.codecs.codebook import Codebook2, _normalised
from thinwire.compress.codecs.floating import _Float
from thinwire.compress.codecs.fused import SMALLEST
from thinwire.compress.codecs.sign import Sign, _means
from thinwire.compress.codecs.ternary import Ternary, _thresholds
from thinwire.compress.codecs.topk import CHUNK, TopK


def error_bound(codec: Codec, values: Tensor) -> Tensor:
    """[numel] float32: the largest error that decode(encode(values)) may have at each place, for finite values."""
    if isinstance(codec, Int4) and codec.hadamard:
        return rotated_bound(codec, values)
    return next(bound for kind, bound in BOUNDS.items() if isinstance(codec, kind))(codec, values)


def boundary_bound(boundary: BoundaryCodec, values: Tensor) -> Tensor:
    """Largest error of each value in float32, of any shape; a shorter dtype then rounds once more."""
    return error_bound(boundary.codec, boundary._filled(values))[: values.numel()].view(values.shape)


def float_bound(codec: _Float, values: Tensor) -> Tensor:
    """Half a unit in the last place, plus the same among the subnormals; inf where the value is out of range."""
    relative, absolute = {
        torch.bfloat16: (2**-8, 2**-134),
        torch.float16: (2**-11, 2**-25),
        torch.float32: (0.0, 0.0),
    }[codec.wire_dtype]
    bound = values.abs() * relative + absolute
    return torch.where(values.abs() <= torch.finfo(codec.wire_dtype).max, bound, torch.inf)


def largest_of(rows: Tensor) -> Tensor:
    return rows.abs().amax(-1, keepdim=True)


def integers_bound(codec: _Integers, values: Tensor) -> Tensor:
    """Half a scale or a whole one; a scale may be 2^-8 or 2^-7 more than max / levels; plus what float32 rounds off."""
    largest = largest_of(codec.rows(values))
    steps = (1 + 2**-8) * (0.5 + 2**-14) if codec.rounding == "nearest" else (1 + 2**-7) * (1 + 2**-14)
    tiny = largest < 2 * codec.levels * SMALLEST
    return torch.where(tiny, largest, largest * (steps / codec.levels)).view(-1).repeat_interleave(codec.block)


def rotated_bound(codec: Int4, values: Tensor) -> Tensor:
    """All errors of the block added up."""
    rotated = rotate(codec.rows(values) * (1 / codec.block))
    largest = largest_of(rotated) * (1 + 2**-10)
    return (integers_bound(codec, largest.expand_as(rotated).reshape(-1)) * codec.block).view(-1)


def powers_bound(codec: Float4, values: Tensor) -> Tensor:
    """A third of the value, or half of the smallest power."""
    largest = largest_of(codec.rows(values))
    smallest = torch.where(largest < 2 * SMALLEST, largest, largest * (2**-7 * (1 + 2**-7)))
    return torch.maximum(values.abs() * ((1 + 2**-20) / 3), smallest.view(-1).repeat_interleave(codec.block))


def codebook_bound(codec: Codebook2, values: Tensor) -> Tensor:
    """The width of an inner bin, or of the widest outer one."""
    rows = codec.rows(values)
    largest, (_, scales, root) = rows.abs().amax(1), _normalised(rows)
    inner = (root * scales).squeeze(1)
    bound = torch.maximum(inner, largest - inner) + largest * (2**-8 + 2**-14)
    return torch.where(largest < 2 * SMALLEST, largest, bound).repeat_interleave(codec.block)


def sign_bound(codec: Sign, values: Tensor) -> Tensor:
    """How far the size of the value is from the mean, and what bf16 moves the mean."""
    means = _means(codec.rows(values))
    bound = (codec.rows(values).abs() - means).abs() + means * (2**-8 + 2**-16) + 2**-133
    return bound.view(-1)


def ternary_bound(codec: Ternary, values: Tensor) -> Tensor:
    """The threshold, or from there to the largest."""
    rows = codec.rows(values)
    largest, threshold = rows.abs().amax(1), _thresholds(rows).squeeze(1)
    bound = torch.maximum(threshold, largest - threshold) * (1 + 2**-16) + largest * (2**-8 + 2**-16)
    return torch.where(largest < SMALLEST, largest, bound).repeat_interleave(codec.block)


def topk_bound(codec: TopK, values: Tensor) -> Tensor:
    """The k-th largest of the chunk, or the rounding of what is sent."""
    sizes = values.view(-1, CHUNK).abs()
    chosen = sizes.topk(codec.k, dim=1).values if sizes.shape[0] else sizes[:, : codec.k]
    largest, last = chosen[:, :1], chosen[:, -1:]
    if codec.values == "bf16":
        rounding = sizes * 2**-8 + 2**-134
    else:
        half_scale = largest * ((1 + 2**-8) * (0.5 + 2**-14) / 127)
        rounding = torch.where(largest < 254 * SMALLEST, largest, half_scale).expand_as(sizes)
    return torch.where(sizes > last, rounding, torch.maximum(last, rounding)).view(-1)


BOUNDS = {
    _Float: float_bound,
    _Integers: integers_bound,
    Float4: powers_bound,
    Codebook2: codebook_bound,
    Sign: sign_bound,
    Ternary: ternary_bound,
    TopK: topk_bound,
}
