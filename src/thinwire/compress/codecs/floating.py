"""bf16 and fp16: a shorter float for each value; the sum of two payloads is the payload of a sum, so they may be all-reduced.

Rounding to nearest, ties to even. bf16 keeps float32's range with 8 bits of significand: |error| <= 2^-8 |x| (+ 2^-134 among
the subnormals). fp16 has 11 bits, |error| <= 2^-11 |x| (+ 2^-25), but ends at 65504: what is beyond becomes inf, as does a
sum that grows beyond it on the way; divide before summing, and look at the result with `finite`. nan and inf arrive as they
are. Micikevicius et al. 2018 (mixed precision training), Kalamkar et al. 2019 (bfloat16).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from thinwire.compress.base import Codec, check_payload, check_values


@dataclass(frozen=True)
class _Float(Codec):
    def payload_bytes(self, numel: int) -> int:
        return numel * self.wire_dtype.itemsize

    def encode(self, values: Tensor) -> Tensor:
        check_values(values, self.block)
        return values.to(self.wire_dtype).view(torch.uint8)

    def decode(self, payload: Tensor, numel: int) -> Tensor:
        check_payload(payload, self.payload_bytes(numel))
        return payload.view(self.wire_dtype).to(torch.float32)


class BFloat16(_Float):
    """float32 with the lower half of its bits rounded away."""

    name: ClassVar[str] = "bf16"
    wire_dtype: ClassVar[torch.dtype] = torch.bfloat16


class Float16(_Float):
    """IEEE half precision."""

    name: ClassVar[str] = "fp16"
    wire_dtype: ClassVar[torch.dtype] = torch.float16


class Float32(_Float):
    """As it is: for what may be coded or not. Its payloads begin where a float32 may."""

    name: ClassVar[str] = "float32"
    wire_dtype: ClassVar[torch.dtype] = torch.float32
