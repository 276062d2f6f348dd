"""The k largest values of a whole parameter, with their places.

    decoded: bf16(x_i) for the k largest |x_i|, else 0          k = ceil(fraction n), n values, 32 + 16 bits for each sent

The best approximation with k values, before bf16: it loses the squares of all others, at most (1 - k / n) ||x||^2, a contraction,
to be used with error feedback. Against `topk`, which chooses within chunks of 4096, a place costs 20 bits more, and nothing is
spent on chunks where all is small. Coding what was decoded gives the same payload again, unless values as large as the k-th stay
behind. A nan counts as largest and an inf next, so both arrive.
Aji & Heafield 2017 (sparse gradients), Lin et al. 2018 (DGC).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from thinwire.compress.base import TensorCodec, check_payload, check_tensor
from thinwire.errors import UserError


@dataclass(frozen=True)
class GlobalTopK(TensorCodec):
    """Sparse; by default one of a hundred values, 0.48 bits a value."""

    fraction: float = 0.01
    """Of the values of each parameter, rounded up to a whole number."""

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise UserError(f"compress.fraction = {self.fraction}: more than 0 and at most 1 of a parameter's values can be sent")

    def kept(self, shape: Sequence[int]) -> int:
        """k. The fraction counts as the decimal number it was written as: 0.07 of 100 are 7, not 8."""
        return math.ceil(Fraction(str(self.fraction)) * math.prod(shape))

    def payload_bytes(self, shape: Sequence[int]) -> int:
        """A place and a value for each."""
        return 6 * self.kept(shape)

    def encode(self, values: Tensor) -> Tensor:
        """float32 of any shape -> [payload_bytes] uint8: places, going up, then values."""
        check_tensor(values)
        assert values.numel() < 2**31, f"places are int32; {values.numel()} values are too many"
        flat = values.view(-1)
        places = flat.abs().topk(self.kept(values.shape), sorted=False).indices.sort().values
        chosen = flat[places].to(torch.bfloat16)
        return torch.cat([places.to(torch.int32).view(torch.uint8), chosen.view(torch.uint8)])

    def decode(self, payload: Tensor, shape: Sequence[int]) -> Tensor:
        check_payload(payload, self.payload_bytes(shape))
        border = 4 * self.kept(shape)
        places = payload[:border].clone().view(torch.int32)  # a payload need not begin where an int32 may
        chosen = payload[border:].view(torch.bfloat16).to(torch.float32)
        flat = torch.zeros(math.prod(shape), device=payload.device)
        return flat.scatter_(0, places.to(torch.int64), chosen).view(tuple(shape))
