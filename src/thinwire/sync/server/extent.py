"""How many values a range of the weights has, and how they lie in a message that has no code.

    [ float32 .. | float64 .. ]      parameters in float64 stand last; all others travel as float32, also those that a model holds
                                     in 16 bits; of complex numbers the parts

In memory a range is one vector, of float32, or of float64 if any of it is: then a server moves all of it in float64, and what is
float32 is rounded when it is sent.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Extent:
    """wide: so many of the `numel` values, the last ones, are float64."""

    numel: int
    wide: int = 0

    def __str__(self) -> str:
        return f"{self.numel} weights ({self.wide} in float64)" if self.wide else f"{self.numel} weights"

    @property
    def exact_bytes(self) -> int:
        """On the wire, without a code."""
        return 4 * (self.numel - self.wide) + 8 * self.wide

    @property
    def dtype(self) -> torch.dtype:
        """Of the vector in memory."""
        return torch.float64 if self.wide else torch.float32

    def pack(self, values: Tensor) -> Tensor:
        """[numel] float32 or float64 -> [exact_bytes] uint8, perhaps in the same memory."""
        border = self.numel - self.wide
        parts = values[:border].float(), values[border:].double()
        packed = [part.contiguous().view(torch.uint8) for part in parts]
        return torch.cat(packed) if self.wide else packed[0]

    def unpack(self, payload: Tensor) -> Tensor:
        """[exact_bytes] uint8 -> [numel] of `dtype`, perhaps in the same memory."""
        if not self.wide:
            return payload.view(torch.float32)
        border = 4 * (self.numel - self.wide)
        return torch.cat([payload[:border].clone().view(torch.float32).double(), payload[border:].clone().view(torch.float64)])
