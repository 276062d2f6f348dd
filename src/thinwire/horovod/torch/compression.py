"""How gradients look on the wire: `Compression.fp16` as Horovod has it, and all codes of thinwire.

    hvd.DistributedOptimizer(optimizer, ..., compression=hvd.Compression.int4)
    hvd.DistributedOptimizer(optimizer, ..., compression=hvd.Compression.topk(k=64))

Casts are summed up as they are. Codes are averaged by thinwire's exchange, with error feedback by the tensors' names; their
options are those of the section [compress] of run.toml. Tensors of integers go as they are in both.
"""

import json
from dataclasses import dataclass
from typing import Any

import torch

from thinwire.collectives.ledger import Ledger
from thinwire.compress.exchange import make_exchange
from thinwire.config.compress import read_coding


class Compressor:
    """As Horovod has it: what goes on the wire, and what comes of it. This one changes nothing."""

    def compress(self, tensor: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """What travels, and what `decompress` needs to know."""
        return tensor, None

    def decompress(self, tensor: torch.Tensor, ctx: Any) -> torch.Tensor:
        """What has arrived, as the tensor was."""
        return tensor


@dataclass(frozen=True)
class Cast(Compressor):
    """Floats as another dtype."""

    dtype: torch.dtype

    def compress(self, tensor: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """Integers stay."""
        return (tensor.to(self.dtype) if tensor.is_floating_point() else tensor), tensor.dtype

    def decompress(self, tensor: torch.Tensor, ctx: Any) -> torch.Tensor:
        """In the dtype that it had."""
        return tensor.to(ctx)


@dataclass(frozen=True)
class Code:
    """A kind of [compress], and its options as JSON. Called with options, one with those."""

    coding: str

    def __call__(self, **options: Any) -> "Code":
        """UserError (a ValueError) for an option that the kind does not have."""
        table = json.loads(self.coding) | options
        make_exchange(read_coding(table, "Compression"), Ledger())
        return Code(json.dumps(table, sort_keys=True))


def _kind(name: str) -> Code:
    return Code(json.dumps({"kind": name}))


class Compression:
    """All there are, by name; docs/compress.md says what each does."""

    none = Compressor()
    fp16 = Cast(torch.float16)
    bf16 = Cast(torch.bfloat16)
    int8 = _kind("int8")
    int4 = _kind("int4")
    fp4 = _kind("fp4")
    sign = _kind("sign")
    ternary = _kind("ternary")
    codebook2 = _kind("codebook2")
    topk = _kind("topk")
    topk_global = _kind("topk_global")
    randomk = _kind("randomk")
    dgc = _kind("dgc")
    svd = _kind("svd")
    powersgd = _kind("powersgd")
    demo = _kind("demo")
