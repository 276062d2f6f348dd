"""What codecs with a small header per block share: the layout of the payload, and the walk over a long vector.

    payload = header of every block (bf16 each), then the codes of every block

Headers are bf16, not fp16: the same two bytes, but fp16 ends at 6e-8, where gradients go on. Where kernels are not fused, the
vector is walked in pieces that stay in the processor's cache, so that memory is read once and not once an operation.

On a device kernels are fused wherever Triton is there, without being asked: each operation by itself would read all of memory.
Scratch memory is then the codes of the vectors; else some times PIECE_ON_DEVICE values.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.utils._triton import has_triton

from thinwire.compress.base import Codec, check_payload, check_values
from thinwire.compress.codecs.fused import compiled, fused_or_reason

PIECE = 1 << 17
"""Values a piece has at most: half a MiB."""
PIECE_ON_DEVICE = 1 << 24
"""As PIECE: enough to keep a device busy, 64 MiB."""
TOGETHER = 4
"""Payloads that one fused kernel adds up at most: each number of them is a kernel of its own."""

Kernel = Callable[[Tensor, Tensor, Tensor], None]
"""(rows [n, block] float32, header [n, header_values] bf16, codes [n, code_bytes] int8): reads one side, fills the other."""


class Kernels(NamedTuple):
    """Of one codec, as they are or fused."""

    encode: Kernel
    decode: Kernel
    subtract: Kernel
    """Encodes, and leaves rows - decoded in `rows`."""
    add: Kernel
    """(total [n, block], header [r, n, ..], codes [r, n, ..]): adds what is decoded to `total`, payload after payload."""

    @classmethod
    def of(cls, encode: Kernel, decode: Kernel, subtract: Kernel | None = None) -> "Kernels":
        """subtract: where that can be had for less than encode, decode and subtract."""

        def composed(rows: Tensor, header: Tensor, codes: Tensor) -> None:
            encode(rows, header, codes)
            decoded = torch.empty_like(rows)
            decode(decoded, header, codes)
            rows.sub_(decoded)

        def add(total: Tensor, header: Tensor, codes: Tensor) -> None:
            for one in range(codes.shape[0]):
                decoded = torch.empty_like(total)
                decode(decoded, header[one], codes[one])
                total.add_(decoded)

        return cls(encode, decode, subtract or composed, add)


@dataclass(frozen=True)
class Blocked(Codec):
    """A codec of independent blocks. A codec names its sizes, its two kernels and its error bound."""

    fused: ClassVar[bool] = False
    header_values: ClassVar[int] = 1
    code_bytes: ClassVar[int]

    @staticmethod
    def encode_kernel(rows: Tensor, header: Tensor, codes: Tensor) -> None:
        """See `Kernel`."""

    @staticmethod
    def decode_kernel(rows: Tensor, header: Tensor, codes: Tensor) -> None:
        """See `Kernel`."""

    def payload_bytes(self, numel: int) -> int:
        """Header and codes of each block."""
        return numel // self.block * (2 * self.header_values + self.code_bytes)

    def encode(self, values: Tensor) -> Tensor:
        check_values(values, self.block)
        payload = torch.empty(self.payload_bytes(values.numel()), dtype=torch.uint8, device=values.device)
        self.encode_rows(values.view(1, -1), payload.view(1, -1))
        return payload

    def decode(self, payload: Tensor, numel: int) -> Tensor:
        assert numel % self.block == 0, f"{numel} values are no multiple of the block {self.block}"
        check_payload(payload, self.payload_bytes(numel))
        values = torch.empty(numel, dtype=torch.float32, device=payload.device)
        self.decode_rows(payload.view(1, -1), values.view(1, -1))
        return values

    def encode_rows(self, rows: Tensor, payloads: Tensor, *, subtract: bool = False) -> None:
        blocks = rows.shape[1] // self.block
        fused = self._fused_for(blocks, rows.device)
        header, codes = self._parts(payloads, blocks)
        kernels = fused or self.kernels
        kernel = kernels.subtract if subtract else kernels.encode
        if fused is None:
            self._walk(kernel, rows, header, codes)
            return
        flat = [
            part if len(part) == 1 else torch.empty_like(part, memory_format=torch.contiguous_format) for part in (header, codes)
        ]
        kernel(self.rows(rows), *(part.view(-1, part.shape[2]) for part in flat))
        for part, made in zip((header, codes), flat, strict=True):
            if made is not part:
                part.copy_(made)

    def decode_rows(self, payloads: Tensor, rows: Tensor) -> None:
        blocks = rows.shape[1] // self.block
        fused = self._fused_for(blocks, rows.device)
        header, codes = self._parts(payloads, blocks)
        if fused is None:
            self._walk(self.kernels.decode, rows, header, codes)
        else:
            fused.decode(self.rows(rows), *(part.reshape(-1, part.shape[2]) for part in (header, codes)))

    def add_rows(self, payloads: Tensor, total: Tensor) -> None:
        rows = self.rows(total)
        blocks = len(rows)
        fused = self._fused_for(blocks, rows.device)
        kernels, width, step = (self.kernels, 1, self._step(rows)) if fused is None else (fused, TOGETHER, blocks)
        header, codes = self._parts(payloads, blocks)
        for first in range(0, blocks, step):
            piece = slice(first, first + step)
            for one in range(0, len(payloads), width):
                some = slice(one, one + width)
                kernels.add(rows[piece], header[some, piece], codes[some, piece])

    def rows(self, values: Tensor) -> Tensor:
        """[blocks, block]"""
        return values.view(values.numel() // self.block, self.block)

    @cached_property
    def kernels(self) -> Kernels:
        """Operation by operation."""
        return self.make_kernels()

    def make_kernels(self) -> Kernels:
        """Of the two of the class, by default."""
        return Kernels.of(self.encode_kernel, self.decode_kernel)

    @cached_property
    def fused_kernels(self) -> Kernels | None:
        """Each in one pass, where that was asked for and a compiler was found."""
        if not self.fused or fused_or_reason() is not None:
            return None
        return Kernels(*(compiled(kernel) for kernel in self.kernels))

    def _parts(self, payloads: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
        """[r, at least payload_bytes] -> header and codes as kernels want them, views."""
        border, r = 2 * self.header_values * blocks, payloads.shape[0]
        if blocks == 0:  # torch refuses other views of what has no elements
            empty = payloads.new_empty((r, 0, 0))
            return empty, empty
        header = payloads[:, :border].view(torch.bfloat16).view(r, blocks, self.header_values)
        codes = payloads[:, border : border + self.code_bytes * blocks].view(torch.int8).view(r, blocks, self.code_bytes)
        return header, codes

    @cached_property
    def device_kernels(self) -> Kernels | None:
        """Each in one pass, where a device can have them."""
        return Kernels(*(compiled(kernel) for kernel in self.kernels)) if has_triton() else None

    def _fused_for(self, blocks: int, device: torch.device) -> Kernels | None:
        if blocks < 2:  # torch.compile makes a kernel of its own for lengths of 1
            return None
        return self.fused_kernels if device.type == "cpu" else self.device_kernels

    def _step(self, rows: Tensor) -> int:
        """Blocks to take at a time."""
        return (PIECE if rows.device.type == "cpu" else PIECE_ON_DEVICE) // self.block

    def _walk(self, kernel: Kernel, rows: Tensor, header: Tensor, codes: Tensor) -> None:
        """Row by row and piece by piece."""
        for one, row in enumerate(rows):
            shaped = self.rows(row)
            step = self._step(shaped)
            for first in range(0, len(shaped), step):
                piece = slice(first, first + step)
                kernel(shaped[piece], header[one, piece], codes[one, piece])


@dataclass(frozen=True)
class Fusable(Blocked):
    """A codec that gains by it, as not all do."""

    fused: bool = False  # type: ignore[misc]
    """Kernels compiled into one pass, where a compiler is found (`fused_or_reason`); same bits."""


def digits_packed(digits: Tensor, base: int) -> Tensor:
    """[n, digits, bytes] -> [n, bytes], digit k times base^k; the dtype stays."""
    packed = digits[:, 0]
    for place in range(1, digits.shape[1]):
        packed = packed.add(digits[:, place], alpha=base**place)
    return packed


def bits_of(packed: Tensor, bits: int) -> Tensor:
    """What `digits_packed` packed with base 2^bits: [n, bytes] uint8 -> [n, 8 / bits, bytes]."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device).view(1, -1, 1)
    return (packed.unsqueeze(1) >> shifts) & (2**bits - 1)
