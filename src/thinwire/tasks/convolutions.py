"""What models of pictures have in common: how they take images, and 3x3 convolutions."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn


def as_input(images: NDArray[np.uint8]) -> Tensor:
    """[count, height, width, channels] centred, as float32 [count, channels, height, width] in channels last."""
    return (torch.tensor(images).permute(0, 3, 1, 2).float() / 255.0 - 0.5) / 0.5


def convolutions(inputs: int, outputs: int, pool: bool = False) -> list[nn.Module]:
    """One 3x3 convolution with batch norm and ReLU; pool: and a 2x2 maximum."""
    layers = [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return [*layers, nn.MaxPool2d(2)] if pool else layers
