"""What crosses a pipeline boundary, coded: activations on the way forward, their gradients on the way back.

    payload = C(flat(a), zeros up to a whole block)          arrives as a' = D(payload), |a' - a| <= the codec's error bound

The payload's size follows from the shape alone, so both sides know it before anything is sent. There is no error feedback:
an activation is used once, and its error cannot be corrected in a later one. (Where samples come back, `differences` sends less.)

What is not finite is an error at the side that has it. On a device, where the host does not look at values, it arrives: every
codec then makes at least one value of its block not finite, and the loss says so.

`CodedBoundary` does the same within one process: the next stage sees a', and the gradient that comes back is coded too. As
the rounding has no useful derivative, it is passed over (straight through, Bengio et al. 2013).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from thinwire.compress.base import Codec, Flat, finite
from thinwire.compress.stages import launched
from thinwire.errors import UserError


def encode_finite(codec: Codec, values: Tensor, what: str) -> Tensor:
    """[numel] float32 -> payload. On a CPU a UserError that names `what` if a value is nan or inf, or becomes inf in the codec's
    floats."""
    if launched(values.device):
        return codec.encode(values)
    if not finite(values):
        raise UserError(f"{what} is not finite; lower the learning rate, or look at the data of this step")
    payload = codec.encode(values)
    if codec.wire_dtype.is_floating_point and not finite(payload.view(codec.wire_dtype)):
        largest, limit = float(values.abs().max()), torch.finfo(codec.wire_dtype).max
        raise UserError(f"{what} has values of {largest:.3g}, and {codec.name} ends at {limit:.3g}; choose another codec")
    return payload


def flat_float32(values: Tensor, what: str) -> Tensor:
    """[numel], without autograd. UserError for complex numbers, of which float32 would silently keep one half."""
    if values.is_complex():
        raise UserError(
            f"{what} is {str(values.dtype).removeprefix('torch.')}; codes take real numbers: hand over view_as_real of it"
        )
    return values.detach().reshape(-1).to(torch.float32)


@dataclass(frozen=True)
class BoundaryCodec(Flat):
    """One direction of one boundary. `boundary` names it in errors: "the activation of boundary 0-1"."""

    boundary: str

    def pack(self, values: Tensor) -> Tensor:
        """Any shape, float32 or shorter floats -> [payload_bytes] uint8. UserError for complex ones; on a CPU if not finite."""
        return encode_finite(self.codec, self._filled(values), self.boundary)

    def unpack(self, payload: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """What `pack` was given, up to the codec's error. payload: uint8, from an even byte of its storage."""
        return self.decode(payload, shape).to(dtype)

    def _filled(self, values: Tensor) -> Tensor:
        """Flat, with zeros up to a whole block."""
        return pad(flat_float32(values, self.boundary), (0, -values.numel() % self.codec.block))


class CodedBoundary(torch.autograd.Function):
    """`CodedBoundary.apply(x, forward, backward)`: x and its gradient as they arrive behind a boundary. None: not coded."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: BoundaryCodec | None, backward: BoundaryCodec | None) -> Tensor:
        ctx.backward_codec = backward
        return _crossed(x, forward)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _crossed(gradients[0], ctx.backward_codec), None, None


def _crossed(values: Tensor, codec: BoundaryCodec | None) -> Tensor:
    if codec is None:
        return values.view_as(values)
    return codec.unpack(codec.pack(values), values.shape, values.dtype)
