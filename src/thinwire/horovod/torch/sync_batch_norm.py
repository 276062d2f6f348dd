"""Batch normalisation with the statistics of all ranks' batches.

    n = sum n_r      mean = sum n_r m_r / n      var = (sum M_r + sum n_r (m_r - mean)^2) / n

with n_r values of a channel on rank r, m_r their mean and M_r the sum of their squared deviations from it (Chan et al. 1979).
Each rank puts its three into its own of p rows of zeros, and the rows are summed: one allreduce, through which gradients flow.
"""

import torch
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from thinwire.adapters.horovod.context import CONTEXT
from thinwire.horovod.torch.mpi_ops import Sum, allreduce


class SyncBatchNorm(_BatchNorm):
    """In place of BatchNorm1d, 2d and 3d; [batch, channels, ...]. Ranks may have batches of different sizes. Collective."""

    def _check_input_dim(self, input: torch.Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"SyncBatchNorm takes [batch, channels, ...], not a tensor of {input.dim()} dims")

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        self._check_input_dim(input)
        own = self.running_mean is None or self.training  # statistics of the batch
        if not own or CONTEXT.size() == 1:
            return super().forward(input)
        mean, var, number = _statistics(input)
        if self.training and self.running_mean is not None and self.running_var is not None:
            self._remember(mean.detach(), (var * number / (number - 1).clamp(min=1)).detach())
        shape = (1, -1, *([1] * (input.dim() - 2)))
        normal = (input - mean.view(shape)) * torch.rsqrt(var + self.eps).view(shape)
        if self.affine:
            normal = normal * self.weight.view(shape) + self.bias.view(shape)
        return normal.to(input.dtype)

    @torch.no_grad()
    def _remember(self, mean: torch.Tensor, unbiased: torch.Tensor) -> None:
        assert self.running_mean is not None and self.running_var is not None
        weight = self.momentum
        if self.num_batches_tracked is not None:
            self.num_batches_tracked += 1
            weight = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean), weight or 0.0)
        self.running_var.lerp_(unbiased.to(self.running_var), weight or 0.0)


def _statistics(input: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean and biased variance of each channel, and the number of its values, over all ranks; float32, or float64."""
    wide = input if input.dtype == torch.float64 else input.float()
    dims = [dim for dim in range(input.dim()) if dim != 1]
    count = input.numel() // max(input.shape[1], 1)
    mean = wide.mean(dims) if count else wide.sum(dims)
    shape = (1, -1, *([1] * (input.dim() - 2)))
    squares = (wide - mean.view(shape)).square().sum(dims)
    own = torch.stack([torch.full_like(mean, count), mean, squares])
    rank = CONTEXT.rank()
    rows = functional.pad(own[None], (0, 0, 0, 0, rank, CONTEXT.size() - rank - 1))
    counts, means, parts = allreduce(rows, op=Sum).unbind(1)
    number = counts[:, 0].sum()
    whole = (counts * means).sum(0) / number
    var = (parts.sum(0) + (counts * (means - whole).square()).sum(0)) / number
    return whole, var, number
