"""What codecs with a small header per block share: the layout of the payload, and the walk over a long vector.

    payload = header of every block (bf16 each), then the codes of every block

Headers are bf16, not fp16: the same two bytes, but fp16 ends at 6e-8, where gradients go on. Where kernels are not fused, the
vector is walked in pieces that stay in the processor's cache, so that memory is read once and not once an operation.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from thinwire.compress.base import check_payload, check_values, composed_with_error
from thinwire.compress.codecs.fused import compiled, fused_or_reason

PIECE = 1 << 17
"""Values a piece has at most: half a MiB."""

Kernel = Callable[[Tensor, Tensor, Tensor], None]
"""(rows [n, block] float32, header [n, header_values] bf16, codes [n, code_bytes] int8): reads one side, fills the other."""

LosingKernel = Callable[[Tensor, Tensor, Tensor, Tensor], None]
"""(rows, header, codes, lost [n, block] float32): encodes, and fills `lost` with rows - decoded."""


@dataclass(frozen=True)
class Blocked:
    """A codec of independent blocks. A codec names its sizes, its two kernels and its error bound."""

    name: ClassVar[str]
    block: ClassVar[int]
    header_values: ClassVar[int] = 1
    code_bytes: ClassVar[int]
    summable: ClassVar[bool] = False
    wire_dtype: ClassVar[torch.dtype] = torch.uint8
    encode_kernel: ClassVar[Kernel]
    decode_kernel: ClassVar[Kernel]

    def payload_bytes(self, numel: int) -> int:
        """Header and codes of each block."""
        return numel // self.block * (2 * self.header_values + self.code_bytes)

    def encode(self, values: Tensor) -> Tensor:
        """[numel] float32 -> [payload_bytes] uint8."""
        check_values(values, self.block)
        payload = torch.empty(self.payload_bytes(values.numel()), dtype=torch.uint8, device=values.device)
        self._walk(0, values, payload)
        return payload

    def decode(self, payload: Tensor, numel: int) -> Tensor:
        """[payload_bytes] uint8 -> [numel] float32."""
        assert numel % self.block == 0, f"{numel} values are no multiple of the block {self.block}"
        check_payload(payload, self.payload_bytes(numel))
        values = torch.empty(numel, dtype=torch.float32, device=payload.device)
        self._walk(1, values, payload)
        return values

    def error_bound(self, values: Tensor) -> Tensor:
        """See `Codec`."""
        raise NotImplementedError

    def rows(self, values: Tensor) -> Tensor:
        """[blocks, block]"""
        return values.view(values.numel() // self.block, self.block)

    def kernels(self) -> tuple[Kernel, Kernel]:
        """Encode and decode."""
        return type(self).encode_kernel, type(self).decode_kernel

    def _fused_kernels(self) -> tuple[Kernel, Kernel] | None:
        """None: operation by operation."""
        return None

    def _walk(self, way: int, values: Tensor, payload: Tensor) -> None:
        fused = self._fused_kernels()
        self._run(self.kernels()[way], None if fused is None else fused[way], payload, values)

    def _run(self, kernel: Callable[..., None], fused: Callable[..., None] | None, payload: Tensor, *flat: Tensor) -> None:
        """`kernel(rows of flat[0], header, codes, rows of flat[1] ..)`, piece by piece, or `fused` with all at once."""
        rows, *others = (self.rows(values) for values in flat)
        blocks = rows.shape[0]
        border = 2 * self.header_values * blocks
        header = payload[:border].view(torch.bfloat16).view(blocks, self.header_values)
        codes = payload[border:].view(torch.int8).view(blocks, self.code_bytes)
        if fused is not None and blocks > 1:  # torch.compile makes a kernel of its own for lengths of 1
            fused(rows, header, codes, *others)
            return
        step = PIECE // self.block if rows.device.type == "cpu" else max(1, blocks)
        for first in range(0, blocks, step):
            piece = slice(first, first + step)
            kernel(rows[piece], header[piece], codes[piece], *(other[piece] for other in others))


@dataclass(frozen=True)
class Fusable(Blocked):
    """A codec that gains by it, as not all do."""

    fused: bool = False
    """Kernels compiled into one pass, where a compiler is found (`fused_or_reason`); same bits."""

    def encode_with_error(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """The payload and values - decode(payload), in one pass where there is a kernel for it."""
        kernel = self.losing_kernel()
        if kernel is None:
            return composed_with_error(self, values)
        check_values(values, self.block)
        payload = torch.empty(self.payload_bytes(values.numel()), dtype=torch.uint8, device=values.device)
        lost = torch.empty_like(values)
        self._run(kernel, self._compiled_losing, payload, values, lost)
        return payload, lost

    def kernels(self) -> tuple[Kernel, Kernel]:
        """Encode and decode."""
        return type(self).encode_kernel, type(self).decode_kernel

    def losing_kernel(self) -> LosingKernel | None:
        """For `encode_with_error`; None: encode, decode and subtract."""
        return None

    def _fused_kernels(self) -> tuple[Kernel, Kernel] | None:
        return self._compiled

    @cached_property
    def _compiled(self) -> tuple[Kernel, Kernel] | None:
        if not self.fused or fused_or_reason() is not None:
            return None
        encode, decode = self.kernels()
        return compiled(encode), compiled(decode)

    @cached_property
    def _compiled_losing(self) -> LosingKernel | None:
        kernel = self.losing_kernel()
        return compiled(kernel) if kernel is not None and self._compiled is not None else None
