"""The k largest of each chunk, with their places.

    decoded: bf16(x_i) for the k largest |x_i| of each 4096 values, else 0          12 + 16 bits for each value sent

or, with values = "int8", round(x_i / s) s with s = bf16(max |x| / 127) for each chunk: 12 + 8 bits. Choosing within chunks
keeps places at 12 bits and every rank's payload the same size; for k of 4096 it loses at most (1 - k / 4096) ||x||^2: a
contraction, to be used with error feedback, without which it stalls. |error| <= the k-th largest |x| where not sent, 2^-8 |x|
or s / 2 where sent. Zeros decode to zeros; coding what was decoded decodes to the same. A nan counts as largest, so it
arrives; with bf16 so does an inf, with int8 nothing that such a chunk sends is finite.

Places go up. Two of them, a and b, take three bytes: a's low 8 bits, a's high 4 and b's low 4, b's high 8.
Sarfi et al. 2025 (SparseLoCo: chunks of 4096, k = 64), Stich et al. 2018 (sparsified SGD with memory).
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from thinwire.compress.base import Codec, check_payload, check_values
from thinwire.compress.codecs.fused import inverse, round_bf16
from thinwire.errors import UserError

CHUNK = 4096


def pack_places(places: Tensor) -> Tensor:
    """[n, k] integers below 4096, k even -> [n, 3/2 k] uint8."""
    a, b = places[:, 0::2], places[:, 1::2]
    parts = torch.stack([a & 255, (a >> 8) | ((b & 15) << 4), b >> 4], 2)
    return parts.to(torch.uint8).reshape(places.shape[0], 3 * places.shape[1] // 2)


def unpack_places(packed: Tensor) -> Tensor:
    """[n, 3/2 k] uint8 -> [n, k] int64."""
    parts = packed.to(torch.int64).unflatten(1, (-1, 3))
    a = parts[:, :, 0] | ((parts[:, :, 1] & 15) << 8)
    b = (parts[:, :, 1] >> 4) | (parts[:, :, 2] << 4)
    return torch.stack([a, b], 2).flatten(1)


@dataclass(frozen=True)
class TopK(Codec):
    """Sparse; by default 64 of 4096 in bf16, 0.4375 bits a value."""

    k: int = 64
    """Of 4096; a multiple of 4."""
    values: Literal["bf16", "int8"] = "bf16"
    """What is sent of each."""

    name: ClassVar[str] = "topk"
    block: ClassVar[int] = CHUNK

    def __post_init__(self) -> None:
        if not 4 <= self.k <= CHUNK or self.k % 4:
            raise UserError(f"compress.k = {self.k}: of each {CHUNK} values 4, 8, 12 .. {CHUNK} can be sent")
        if self.values not in ("bf16", "int8"):
            raise UserError(f"compress.values = {self.values!r}: the chosen values are sent as bf16 or int8")

    def payload_bytes(self, numel: int) -> int:
        """Values, with a scale for each chunk where they are int8, and places."""
        value_bytes = 2 * self.k if self.values == "bf16" else self.k + 2
        return numel // CHUNK * (value_bytes + 3 * self.k // 2)

    def encode(self, values: Tensor) -> Tensor:
        """[numel] float32 -> [payload_bytes] uint8: scales, values and places, each for all chunks."""
        check_values(values, CHUNK)
        rows = values.view(-1, CHUNK)
        if not rows.shape[0]:
            return values.new_empty(0, dtype=torch.uint8)
        places = rows.abs().topk(self.k, dim=1, sorted=False).indices.sort(1).values
        parts = [*self._code(rows.gather(1, places)), pack_places(places)]
        return torch.cat([part.view(torch.uint8).view(-1) for part in parts])

    def decode(self, payload: Tensor, numel: int) -> Tensor:
        assert numel % CHUNK == 0, f"{numel} values are no multiple of the block {CHUNK}"
        check_payload(payload, self.payload_bytes(numel))
        chunks = numel // CHUNK
        border = payload.numel() - chunks * 3 * self.k // 2
        places = unpack_places(payload[border:].view(chunks, 3 * self.k // 2))
        rows = torch.zeros(chunks, CHUNK, device=payload.device)
        return rows.scatter_(1, places, self._uncode(payload[:border], chunks)).view(-1)

    def _code(self, chosen: Tensor) -> list[Tensor]:
        """[chunks, k] float32 -> the parts of the payload before the places."""
        if self.values == "bf16":
            return [chosen.to(torch.bfloat16)]
        scales = round_bf16(chosen.abs().amax(1, keepdim=True) * (1 / 127))
        return [scales.to(torch.bfloat16), (chosen * inverse(scales)).round_().to(torch.int8)]

    def _uncode(self, coded: Tensor, chunks: int) -> Tensor:
        """What `_code` made -> [chunks, k] float32."""
        if self.values == "bf16":
            return coded.view(torch.bfloat16).view(chunks, self.k).to(torch.float32)
        scales, codes = coded[: 2 * chunks].view(torch.bfloat16), coded[2 * chunks :].view(torch.int8)
        return codes.view(chunks, self.k).to(torch.float32) * scales.view(chunks, 1)
