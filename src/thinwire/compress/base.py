"""The contract of a codec, and how one is made from run.toml.

A codec turns a flat float32 vector into bytes of a size known in advance, and back. It never talks to other ranks and knows no
names. What arrives is `decode(encode(values))`; how far that may be from `values` each codec states as `error_bound`.
"""

import importlib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from thinwire.errors import UserError


class Codec(Protocol):
    """Same values, same bytes: encode and decode are deterministic. The device of what comes in is kept."""

    def __hash__(self) -> int:
        """By its options: equal codecs code alike."""
        ...

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


class TensorCodec(Protocol):
    """A codec that wants the whole parameter with its shape: low rank, transforms of tiles, the largest of all values.

    Its payloads cannot be cut into shards, so they travel by all-gather (`gather`). Deterministic as a Codec is.
    """

    def __hash__(self) -> int:
        """By its options: equal codecs code alike."""
        ...

    @property
    def name(self) -> str:
        """As `kind` in run.toml."""
        ...

    def payload_bytes(self, shape: Sequence[int]) -> int:
        """Exact, and even."""
        ...

    def encode(self, values: Tensor) -> Tensor:
        """Any shape, float32, contiguous -> [payload_bytes] uint8."""
        ...

    def decode(self, payload: Tensor, shape: Sequence[int]) -> Tensor:
        """[payload_bytes] uint8, contiguous, beginning at an even byte of its storage -> float32 of `shape`."""
        ...


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


def make_codec(config: Any) -> Codec | None:
    """The codec of flat vectors of `config.kind`, None for "none". UserError for an unknown kind; see `build`."""
    if config.kind == "none":
        return None
    if config.kind not in CODECS:
        raise UserError(f"compress.kind {config.kind!r} does not exist; there are none, {', '.join(CODECS)}")
    codec: Codec = build(CODECS[config.kind], config)
    return codec


OPTIONS = ("fused", "hadamard", "rounding", "k", "values", "fraction", "rank", "tile", "momentum", "warmup_steps")
"""Keys of [compress] that belong to single kinds: None or False where they are not set."""


def build(path: str, config: Any, *given: Any) -> Any:
    """The class at "module:Name", made of `given` and the options of `config` that are set. UserError for one it does not
    have."""
    module, _, name = path.partition(":")
    made = getattr(importlib.import_module(module), name)
    own = inspect.signature(made).parameters
    set_ = {option: getattr(config, option, None) for option in OPTIONS}
    told = {option: value for option, value in set_.items() if value is not None and value is not False}
    for option in told:
        if option not in own:
            raise UserError(f"compress.{option}: {config.kind} has no such option; leave it out")
    return made(*given, **told)


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


def check_tensor(values: Tensor) -> None:
    """What every encode of a TensorCodec demands of its caller."""
    assert values.dtype == torch.float32 and values.is_contiguous(), (
        f"a codec takes a contiguous float32 tensor, not {values.dtype} of shape {tuple(values.shape)}"
    )


def check_payload(payload: Tensor, size: int) -> None:
    """What every decode demands of its caller."""
    assert payload.dtype == torch.uint8 and payload.dim() == 1 and payload.is_contiguous(), "a payload is flat contiguous uint8"
    assert payload.numel() == size, f"a payload of {payload.numel()} bytes where {size} are due"
    assert payload.storage_offset() % 2 == 0, "a payload begins at an even byte of its storage"
