"""What layouts are held to: one rank that trains the whole model on the same micro-batches."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]


def train_on_one_rank(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, batches: Callable[[int], Sequence[Batch]], clip: float = 0.0
) -> list[float]:
    """The loss of each step, the mean over its micro-batches. clip: of the gradient's norm, 0: not clipped."""
    losses = []
    for step in range(steps):
        total, found = 0.0, batches(step)
        for inputs, targets in found:
            loss = model(inputs, targets) / len(found)
            loss.backward()
            total += loss.item()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses
