"""The contract of a codec, and how one is made from run.toml.

A codec turns a flat float32 vector into bytes of a size known in advance, and back. It never talks to other ranks and knows no
names. What arrives is `decode(encode(values))`; how far that may be from `values` each codec states as `error_bound`.
"""

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from thinwire.errors import UserError


class Codec(Protocol):
    """Same values, same bytes: encode and decode are deterministic. The device of what comes in is kept."""

    @property
    def name(self) -> str:
        """As `kind` in run.toml."""
        ...

    @property
    def block(self) -> int:
        """Vectors come in multiples of this length; 1 if it does not matter."""
        ...

    @property
    def summable(self) -> bool:
        """Payloads may be added up on the way: values may be cast to `wire_dtype` and all-reduced."""
        ...

    @property
    def wire_dtype(self) -> torch.dtype:
        """What travels; uint8 if payloads are not summable."""
        ...

    def payload_bytes(self, numel: int) -> int:
        """Exact, and even, so that payloads can lie side by side. `numel`: a multiple of block."""
        ...

    def encode(self, values: Tensor) -> Tensor:
        """[numel] float32, contiguous -> [payload_bytes] uint8."""
        ...

    def decode(self, payload: Tensor, numel: int) -> Tensor:
        """[payload_bytes] uint8, contiguous, beginning at an even byte of its storage -> [numel] float32."""
        ...

    def error_bound(self, values: Tensor) -> Tensor:
        """[numel] float32: the largest error that decode(encode(values)) may have at each place, for finite values."""
        ...


CODECS: Mapping[str, str] = {
    "bf16": "thinwire.compress.floating:BFloat16",
    "fp16": "thinwire.compress.floating:Float16",
    "int8": "thinwire.compress.blockwise:Int8",
    "int4": "thinwire.compress.blockwise:Int4",
    "fp4": "thinwire.compress.blockwise:Float4",
    "sign": "thinwire.compress.sign:Sign",
    "ternary": "thinwire.compress.ternary:Ternary",
    "codebook2": "thinwire.compress.codebook:Codebook2",
    "topk": "thinwire.compress.topk:TopK",
}


def make_codec(config: Any) -> Codec | None:
    """The codec of `config.kind`, None for "none". Its options are the attributes of `config` that are called as they are.

    UserError for an unknown kind, and for `fused` with a codec that has no fused kernels.
    """
    if config.kind == "none":
        return None
    if config.kind not in CODECS:
        raise UserError(f"compress.kind {config.kind!r} does not exist; there are none, {', '.join(CODECS)}")
    module, _, name = CODECS[config.kind].partition(":")
    made = getattr(importlib.import_module(module), name)
    options = {field.name for field in dataclasses.fields(made)}
    if getattr(config, "fused", False) and "fused" not in options:
        raise UserError(f"compress.fused: {config.kind} has no fused kernels; leave fused out")
    return made(**{option: getattr(config, option) for option in options if hasattr(config, option)})


def finite(values: Tensor) -> bool:
    """Neither nan nor inf anywhere. One pass over `values` (aminmax hands nan on); waits for the device."""
    if values.numel() == 0:
        return True
    lowest, highest = torch.aminmax(values)
    return bool(torch.isfinite(lowest) & torch.isfinite(highest))


def check_values(values: Tensor, block: int) -> None:
    """What every encode demands of its caller."""
    assert values.dtype == torch.float32 and values.dim() == 1 and values.is_contiguous(), (
        f"a codec takes a flat contiguous float32 vector, not {values.dtype} of shape {tuple(values.shape)}"
    )
    assert values.numel() % block == 0, f"{values.numel()} values are no multiple of the block {block}"


def check_payload(payload: Tensor, size: int) -> None:
    """What every decode demands of its caller."""
    assert payload.dtype == torch.uint8 and payload.dim() == 1 and payload.is_contiguous(), "a payload is flat contiguous uint8"
    assert payload.numel() == size, f"a payload of {payload.numel()} bytes where {size} are due"
    assert payload.storage_offset() % 2 == 0, "a payload begins at an even byte of its storage"
