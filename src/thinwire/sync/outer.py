"""The outer optimizer: one step along the averaged pseudo-gradient.

    u <- mu u + D,   x <- x - eta (D + mu u)        Nesterov's momentum, as torch.optim.SGD has it; mu = 0: x <- x - eta D

eta by the number of replicas M (Charles et al. 2025, "Communication-Efficient Language Model Training Scales Reliably and
Robustly", arXiv 2503.09799: the best of models from 335 M to 10 B parameters at H = 30, mu = 0.9, which did not depend on their
size):

    M      1     2     4     8
    eta    0.4   0.6   0.6   0.8        in between by log2 M, beyond 8 as for 8

Of H, the steps between exchanges, the paper reports a trend only, the best eta rises with it, and what others chose gives no
formula either: DiLoCo (2311.08105) and OpenDiLoCo took 0.7 for H = 500, the former with M = 8, which is less than the 0.8 above;
Streaming DiLoCo took 0.4 for H = 30 and 100. So H does not enter; far from 30, try some values of `outer_learning_rate`.
"""

from dataclasses import dataclass
from math import log2

import torch

PUBLISHED = (0.4, 0.6, 0.6, 0.8)
"""For 1, 2, 4, 8 replicas."""


def published_learning_rate(replicas: int) -> float:
    """eta for `replicas`, see the top of the file."""
    place = min(log2(max(1, replicas)), len(PUBLISHED) - 1)
    low = min(int(place), len(PUBLISHED) - 2)
    return PUBLISHED[low] + (place - low) * (PUBLISHED[low + 1] - PUBLISHED[low])


@dataclass(frozen=True)
class Nesterov:
    """eta and mu."""

    learning_rate: float
    momentum: float

    def step(self, parameters: torch.Tensor, average: torch.Tensor, momentum: torch.Tensor) -> None:
        """All flat, of one dtype; changes `parameters` and `momentum` (empty if mu = 0). The same bits from the same values."""
        if self.momentum:
            momentum.mul_(self.momentum).add_(average)
            average = average.add(momentum, alpha=self.momentum)
        parameters.sub_(average, alpha=self.learning_rate)
