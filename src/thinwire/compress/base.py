"""The contract of a codec, and how one is made from run.toml.

A codec turns a flat float32 vector into bytes of a size known in advance, and back. It never talks to other ranks and knows no
names. What arrives is `decode(encode(values))`; how far that may be from `values` the top of each codec's file states.
"""

import importlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from thinwire.errors import UserError


class Codec(ABC):
    """Same values, same bytes: encode and decode are deterministic. The device of what comes in is kept.

    Codecs are compared by their options: equal ones code alike. Several vectors of one length can be coded at once, into memory
    that is there already, with the same bits as one by one; a codec may know how to do it in fewer passes. r: vectors, n: values
    of each. Rows of `payloads` may be longer than a payload.
    """

    name: ClassVar[str]
    """As `kind` in run.toml."""
    block: ClassVar[int] = 1
    """Vectors come in multiples of this length."""
    wire_dtype: ClassVar[torch.dtype] = torch.uint8
    """What travels: uint8, or a float if the sum of payloads is a payload: values may then be cast to it and all-reduced."""

    @abstractmethod
    def payload_bytes(self, numel: int) -> int:
        """Exact, and even, so that payloads can lie side by side. `numel`: a multiple of block."""

    @abstractmethod
    def encode(self, values: Tensor) -> Tensor:
        """[numel] float32, contiguous -> [payload_bytes] uint8."""

    @abstractmethod
    def decode(self, payload: Tensor, numel: int) -> Tensor:
        """[payload_bytes] uint8, contiguous, beginning at an even byte of its storage -> [numel] float32."""

    def encode_rows(self, rows: Tensor, payloads: Tensor, *, subtract: bool = False) -> None:
        """[r, n] float32 -> [r, payload_bytes or more] uint8. subtract: leave in `rows` the error, rows - decoded."""
        size = self.payload_bytes(rows.shape[1])
        for row, payload in zip(rows, payloads, strict=True):
            payload[:size] = self.encode(row)
            if subtract:
                row.sub_(self.decode(payload[:size], row.numel()))

    def decode_rows(self, payloads: Tensor, rows: Tensor) -> None:
        """[r, payload_bytes or more] uint8 -> [r, n] float32, filled."""
        size = self.payload_bytes(rows.shape[1])
        for row, payload in zip(rows, payloads, strict=True):
            row.copy_(self.decode(payload[:size], row.numel()))

    def add_rows(self, payloads: Tensor, total: Tensor) -> None:
        """[r, payload_bytes or more] uint8 and [n] float32: each is decoded and added to `total`, in their order."""
        size = self.payload_bytes(total.numel())
        for payload in payloads:
            total.add_(self.decode(payload[:size], total.numel()))


class TensorCodec(ABC):
    """A codec that wants the whole parameter with its shape: low rank, transforms of tiles, the largest of all values.

    Its payloads cannot be cut into shards, so they travel by all-gather (`gather`). Deterministic and compared as a Codec is.
    """

    @abstractmethod
    def payload_bytes(self, shape: Sequence[int]) -> int:
        """Exact, and even."""

    @abstractmethod
    def encode(self, values: Tensor) -> Tensor:
        """Any shape, float32, contiguous -> [payload_bytes] uint8."""

    @abstractmethod
    def decode(self, payload: Tensor, shape: Sequence[int]) -> Tensor:
        """[payload_bytes] uint8, contiguous, beginning at an even byte of its storage -> float32 of `shape`."""


@dataclass(frozen=True)
class Flat(TensorCodec):
    """A Codec of flat vectors as a TensorCodec: zeros behind the end up to a whole block."""

    codec: Codec

    def payload_bytes(self, shape: Sequence[int]) -> int:
        return self.codec.payload_bytes(padded(prod(shape), self.codec.block))

    def encode(self, values: Tensor) -> Tensor:
        return self.codec.encode(pad(values.reshape(-1), (0, -values.numel() % self.codec.block)))

    def decode(self, payload: Tensor, shape: Sequence[int]) -> Tensor:
        numel = prod(shape)
        return self.codec.decode(payload, padded(numel, self.codec.block))[:numel].view(tuple(shape))


CODECS: Mapping[str, str] = {
    "bf16": "thinwire.compress.codecs.floating:BFloat16",
    "fp16": "thinwire.compress.codecs.floating:Float16",
    "int8": "thinwire.compress.codecs.blockwise:Int8",
    "int4": "thinwire.compress.codecs.blockwise:Int4",
    "fp4": "thinwire.compress.codecs.blockwise:Float4",
    "sign": "thinwire.compress.codecs.sign:Sign",
    "ternary": "thinwire.compress.codecs.ternary:Ternary",
    "codebook2": "thinwire.compress.codecs.codebook:Codebook2",
    "topk": "thinwire.compress.codecs.topk:TopK",
}
TENSOR_CODECS: Mapping[str, str] = {
    "demo": "thinwire.compress.codecs.dct:Demo",
    "topk_global": "thinwire.compress.codecs.largest:GlobalTopK",
    "svd": "thinwire.compress.codecs.svd:TruncatedSVD",
}
OPTIONS = ("fused", "hadamard", "rounding", "k", "values", "fraction", "rank", "tile", "momentum", "warmup_steps")
"""Keys of [compress] that belong to single kinds: None or False where they are not set."""


def make_codec(config: Any) -> Codec | None:
    """The codec of flat vectors of `config.kind`, None for "none". UserError for an unknown kind; see `build`."""
    if config.kind == "none":
        return None
    if config.kind not in CODECS:
        raise UserError(f"compress.kind {config.kind!r} does not exist; there are none, {', '.join(CODECS)}")
    codec: Codec = build(CODECS[config.kind], config)
    return codec


def build(path: str, config: Any, *arguments: Any) -> Any:
    """The class at "module:Name", made of `arguments` and the options set in `config`. UserError for one it does not have."""
    module, _, name = path.partition(":")
    made = getattr(importlib.import_module(module), name)
    found = {option: getattr(config, option, None) for option in OPTIONS}
    options = {option: value for option, value in found.items() if value is not None and value is not False}
    own = inspect.signature(made).parameters
    if unknown := [option for option in options if option not in own]:
        raise UserError(f"compress.{unknown[0]}: {config.kind} has no such option; leave it out")
    return made(*arguments, **options)


def padded(numel: int, block: int) -> int:
    """`numel`, or the next multiple of `block`."""
    return -(-numel // block) * block


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """A parameter as a matrix: [first dim, all others]; one without dims is [1, 1]."""
    return (shape[0], prod(shape[1:])) if len(shape) else (1, 1)


def finite(values: Tensor) -> bool:
    """Neither nan nor inf anywhere. Waits for the device."""
    return not values.numel() or not bool(spoiled(values))


def spoiled(values: Tensor) -> Tensor:
    """A nan or an inf somewhere: [] bool, on the device of `values`. One pass over them (aminmax hands nan on)."""
    if values.numel() == 0:
        return torch.zeros((), dtype=torch.bool, device=values.device)
    lowest, highest = torch.aminmax(values)
    return ~(torch.isfinite(lowest) & torch.isfinite(highest))


def sum_in_order(parts: Sequence[Tensor]) -> Tensor:
    """First to last, as the order of ranks: the same bits everywhere. A new tensor."""
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total


def check_values(values: Tensor, block: int) -> None:
    """What every encode demands of its caller."""
    check_tensor(values)
    assert values.dim() == 1, f"a codec takes a flat vector, not one of shape {tuple(values.shape)}"
    assert values.numel() % block == 0, f"{values.numel()} values are no multiple of the block {block}"


def check_tensor(values: Tensor) -> None:
    """What every encode of a TensorCodec demands of its caller."""
    assert values.dtype == torch.float32 and values.is_contiguous(), (
        f"a codec takes a contiguous float32 tensor, not {values.dtype} of shape {tuple(values.shape)}"
    )


def check_payload(payload: Tensor, size: int) -> None:
    """What every decode demands of its caller."""
    assert payload.dtype == torch.uint8 and payload.dim() == 1 and payload.is_contiguous(), "a payload is flat contiguous uint8"
    assert payload.numel() == size, f"a payload of {payload.numel()} bytes instead of {size}"
    assert payload.storage_offset() % 2 == 0, "a payload begins at an even byte of its storage"
