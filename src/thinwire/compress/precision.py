"""Gradients of every real dtype before codes that take float32.

Of 16 bits each value is a float32. Of 64 bits what does not fit is kept aside (`Rest`), until what coding has lost is known.
"""

import torch
from torch import Tensor


def wide(dtype: torch.dtype) -> torch.dtype:
    """In which sums of it are made: float64 of float64, else float32."""
    return torch.promote_types(dtype, torch.float32)


def widened(gradient: Tensor) -> Tensor:
    """In float32, or float64 if it is; itself if it is either."""
    return gradient.to(wide(gradient.dtype))


class Rest:
    """What vectors in float64 lose when they become float32, until what coding has lost is known."""

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def of(self, name: str) -> bool:
        return name in self._kept

    def narrowed(self, name: str, wanted: Tensor) -> Tensor:
        """`wanted` in float32; itself if it is."""
        if wanted.dtype == torch.float32:
            return wanted
        narrow = wanted.float()
        self._kept[name] = wanted - narrow
        return narrow

    def with_rest(self, name: str, lost: Tensor) -> Tensor:
        """What coding has lost, in float64 with the rest where there is one."""
        rest = self._kept.pop(name, None)
        return lost if rest is None else rest.add_(lost)
