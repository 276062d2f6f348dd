"""A small model of blocks under `fully_shard`, and its training, for the tests of coded exchanges."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy

WIDTH, HIDDEN, VOCABULARY = 24, 50, 27
"""Rows that no number of ranks divides."""


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, HIDDEN)
        self.down = nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.to(dtype)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return cross_entropy(self.head(x), (tokens + 1) % VOCABULARY)


def sharded(reshard: bool | int = True, dtype: torch.dtype = torch.float32, mesh: DeviceMesh | None = None) -> Net:
    model = Net(dtype)
    for block in model.blocks:
        fully_shard(block, reshard_after_forward=reshard, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def batch(rank: int, step: int) -> torch.Tensor:
    return torch.randint(VOCABULARY, (16,), generator=torch.Generator().manual_seed(100 * step + rank))


def whole(model: nn.Module, of: Callable[[Any], Any] = lambda parameter: parameter) -> dict[str, torch.Tensor]:
    """Parameters (or their gradients) by name, put together."""
    return {name: of(parameter).full_tensor().detach() for name, parameter in model.named_parameters()}


def gradients_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return whole(model, lambda parameter: parameter.grad)


def train(model: nn.Module, rank: int, steps: range, num_micro: int = 1, clip: float = 1.0) -> list[float]:
    """Plain SGD, gradients accumulated before they are exchanged."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for step in steps:
        for micro in range(num_micro):
            model.set_requires_gradient_sync(micro == num_micro - 1)  # type: ignore[operator]
            loss = model(batch(rank, step * num_micro + micro))
            (loss / num_micro).backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
