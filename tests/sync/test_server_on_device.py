"""A model on a device as a worker of servers, which are the CPU's: here on fake tensors, with `meta` in place of a device."""

from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from on_device import DEVICE
from thinwire.sync.server.flat import FlatParameters


class Crossings(TorchDispatchMode):
    """Counts copies from the device to the host, and back."""

    def __init__(self) -> None:
        super().__init__()
        self.up = self.down = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        devices = {one.device.type for one in [*args, result] if isinstance(one, torch.Tensor)}
        if len(devices) == 2:
            self.down += result.device.type == "cpu"
            self.up += result.device == DEVICE
        return result


@pytest.mark.long
def test_weights_and_distances_go_to_the_host_and_back_as_one_copy() -> None:
    with FakeTensorMode(), Crossings() as crossings:
        model = nn.Sequential(nn.Linear(8, 6, device=DEVICE), nn.Linear(6, 4, device=DEVICE, dtype=torch.bfloat16))
        flat = FlatParameters(model)
        values = flat.values()
        assert values.device.type == "cpu" and (crossings.down, crossings.up) == (1, 0)
        flat.put(values)
        assert (crossings.down, crossings.up) == (1, 1)
        went = flat.moved(values)
        assert went.device.type == "cpu" and went.shape == values.shape and (crossings.down, crossings.up) == (2, 1)
