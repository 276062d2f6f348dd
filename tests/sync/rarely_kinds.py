"""Kinds of replicas that exchange rarely, and a model for them, for the tests of what they do on a device."""

from typing import Any

import torch
from torch import nn

KINDS: dict[str, dict[str, Any]] = {
    "diloco": {"every": 3},
    "diloco-host": {"every": 3, "compress": "int8", "outer_device": "host"},
    "streaming": {"kind": "streaming", "every": 4, "layers_per_fragment": 1, "overlap": 2, "compress": "int4"},
    "streaming-host": {"kind": "streaming", "every": 4, "layers_per_fragment": 1, "overlap": 3, "outer_device": "host"},
    "streaming-none": {"kind": "streaming", "every": 3, "layers_per_fragment": 1, "overlap": 0, "outer_device": "host"},
    "sparseloco": {"kind": "sparseloco", "every": 3, "outer_device": "host"},
    "muloco": {"kind": "muloco", "every": 2, "compress": {"kind": "int8", "vectors": True}},
    "local_sgd": {"kind": "local_sgd", "every": 3, "compress": "bf16", "outer_device": "host"},
    "noloco": {"kind": "noloco", "every": 3},
    "noloco-host": {"kind": "noloco", "every": 2, "compress": "bf16", "outer_device": "host"},
}


def net(device: str = "cpu") -> nn.Module:
    """Of two wide dtypes, and one that is rounded."""
    torch.manual_seed(0)
    dtypes = torch.float32, torch.bfloat16, torch.float64
    widths = zip((24, 40, 24), (40, 24, 12), dtypes, strict=True)
    return nn.ModuleList(nn.Linear(inputs, outputs, dtype=dtype, device=device) for inputs, outputs, dtype in widths)
