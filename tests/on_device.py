"""What tests of a device share: scripts in processes of their own, on fake tensors, or as two ranks with one device."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = torch.device("meta")
"""Stands for a device on fake tensors."""


class FromTheDevice(TorchDispatchMode):
    """Refuses what copies from the device to the host; by_itself: but for copies that go on by themselves (non_blocking)."""

    def __init__(self, *, by_itself: bool = False) -> None:
        super().__init__()
        self._by_itself = by_itself

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [one for one in args if isinstance(one, torch.Tensor)]
        result = function(*args, **kwargs)
        on_host = isinstance(result, torch.Tensor) and result.device.type == "cpu"
        is_copy = self._by_itself and function is torch.ops.aten.copy_.default
        goes_on = is_copy and (args[2:] or [kwargs.get("non_blocking")])[0]
        if on_host and not goes_on and any(one.device == DEVICE for one in given):
            raise AssertionError(f"{function} copies from the device to the host")
        return result


def as_saved(state: Any) -> Any:
    """What a checkpoint holds of a device's state: the CPU's."""
    return torch.utils._pytree.tree_map_only(torch.Tensor, lambda one: torch.zeros(one.shape, dtype=one.dtype), state)


class Given(nn.Module):
    """Parameters of ones by their shapes; its gradients are what it is given."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], device: torch.device) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.ones(shape, device=device)))

    def forward(self, wanted: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.stack([(getattr(self, name) * values).sum() for name, values in wanted.items()]).sum()


def alone(script: Path, *arguments: str) -> str:
    """What a script prints, which must end well."""
    done = subprocess.run([sys.executable, str(script), *arguments], capture_output=True, text=True, timeout=280, env=_paths())
    assert done.returncode == 0, done.stderr
    return done.stdout


def two_ranks(script: Path, *arguments: str) -> None:
    """A script with RANK WORLD_SIZE PORT before its arguments, as two ranks that must end well."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    commands = [[sys.executable, str(script), str(rank), "2", str(port), *arguments] for rank in range(2)]
    running = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=_paths()) for command in commands]
    try:
        for process in running:
            _, errors = process.communicate(timeout=250)
            assert process.returncode == 0, errors[-2000:]
    finally:
        for process in running:
            process.kill()


def _paths() -> dict[str, str]:
    """The environment of a script that imports this file."""
    before = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *([before] if before else [])])}
