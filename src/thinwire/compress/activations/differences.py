"""AQ-SGD: activations that cross a boundary as the difference from what the same sample sent when it came before.

For sample s, at its visit t, with a the activation, m the copy that both sides hold, C a codec and D its decoder:

    first visit    sent: C1(a)           m_1 = D C1(a)              C1: plain values of the buffer's dtype, or a codec
    later          sent: C(a_t - m_t-1)  m_t = m_t-1 + D C(a_t - m_t-1)

Both sides add the same decoded difference in the same arithmetic, so their copies are bit-equal at all times; the receiver
goes on with m_t. Its error is the codec's on the difference, |m_t - a_t| <= bound(a_t - m_t-1) + one rounding to the buffer's
dtype: it vanishes as activations settle, where coding them directly keeps the error of their size. Gradients that come back
are coded directly (`activations.BoundaryCodec`), as in the paper. Where what arrives of a sample is not finite, both sides see
it, and keep the copy that they had, or zeros.

The price is memory: a copy of each sample's activation on both sides. Wang et al. 2022 (Fine-tuning language models over slow
networks using activation compression with guarantees).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from thinwire.compress.activations.boundary import BoundaryCodec, flat_float32
from thinwire.compress.base import Codec, spoiled
from thinwire.compress.codecs.floating import BFloat16, Float16, Float32
from thinwire.errors import UserError

PLAIN: Mapping[torch.dtype, Codec] = {torch.float32: Float32(), torch.bfloat16: BFloat16(), torch.float16: Float16()}


class Differences:
    """One side of one boundary. Samples of a message differ; their ids are the data's, the same in each epoch."""

    def __init__(self, codec: Codec, boundary: str, first: Codec | None = None, dtype: torch.dtype = torch.float32) -> None:
        """dtype: of the copies, float32, bfloat16 or float16."""
        self.copies: dict[int, Tensor] = {}
        """By sample id: what the other side holds too."""
        self._boundary, self._dtype = boundary, dtype
        self._later = BoundaryCodec(codec, boundary)
        self._first = BoundaryCodec(first or PLAIN[dtype], boundary)

    @property
    def memory_bytes(self) -> int:
        """Of the copies, on this side."""
        return sum(copy.numel() * copy.element_size() for copy in self.copies.values())

    def payload_bytes(self, ids: Sequence[int], shape: Sequence[int]) -> int:
        """Of the next message about these samples; shape: [samples, ..]. Exact."""
        new, old = self._parted(ids)
        return self._first.payload_bytes([len(new), *shape[1:]]) + self._later.payload_bytes([len(old), *shape[1:]])

    def pack(self, ids: Sequence[int], activation: Tensor) -> Tensor:
        """The side that has the activations: [samples, ..] -> [payload_bytes] uint8.

        UserError on a CPU if a value is not finite; the copies then stay as they were.
        """
        new, old = self._parted(ids)
        values, parts = flat_float32(activation, self._boundary).view(activation.shape), []
        if new:
            parts.append(self._first.pack(torch.stack([values[place] for place in new])))
        if old:
            wanted = torch.stack([values[place] for place in old])
            parts.append(self._later.pack(wanted - self._old_copies(ids, old, activation.shape)))
        payload = torch.cat(parts)
        self.unpack(payload, ids, activation.shape)
        return payload

    def unpack(self, payload: Tensor, ids: Sequence[int], shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """The side that goes on with them: [payload_bytes] uint8 -> [samples, ..], the new copies."""
        new, old = self._parted(ids)
        border = self._first.payload_bytes([len(new), *shape[1:]])
        arrived = torch.empty(tuple(shape), dtype=self._dtype, device=payload.device)
        if new:
            first = self._first.unpack(payload[:border].clone(), (len(new), *shape[1:]), self._dtype)
            for place, values in zip(new, first, strict=True):
                arrived[place] = values
        if old:
            difference = self._later.unpack(payload[border:].clone(), (len(old), *shape[1:]))
            for place, values in zip(old, self._old_copies(ids, old, shape) + difference, strict=True):
                arrived[place] = values
        for place, sample in enumerate(ids):
            before = self.copies.get(sample, arrived.new_zeros(()))
            self.copies[sample] = torch.where(spoiled(arrived[place]), before, arrived[place])
        return arrived.to(dtype)

    def knows(self, ids: Sequence[int]) -> bool:
        """Whether all of them came before."""
        return self.copies.keys() >= set(ids)

    def state_dict(self) -> dict[str, Any]:
        return {"copies": dict(self.copies)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """UserError where the copies are of another dtype."""
        wrong = next((copy.dtype for copy in state["copies"].values() if copy.dtype != self._dtype), None)
        if wrong is not None:
            raise UserError(f"{self._boundary}: the checkpoint holds copies in {wrong}, and the buffer is set to {self._dtype}")
        self.copies = dict(state["copies"])

    def _parted(self, ids: Sequence[int]) -> tuple[list[int], list[int]]:
        """Places in the message of samples that come for the first time, and of the others."""
        assert len(set(ids)) == len(ids), "a sample may come once in a message"
        new = [place for place, sample in enumerate(ids) if sample not in self.copies]
        return new, [place for place, sample in enumerate(ids) if sample in self.copies]

    def _old_copies(self, ids: Sequence[int], old: list[int], shape: Sequence[int]) -> Tensor:
        """[old, ..] in float32."""
        for place in old:
            had = tuple(self.copies[ids[place]].shape)
            if had != tuple(shape[1:]):
                raise UserError(
                    f"{self._boundary}: sample {ids[place]} came with shape {tuple(shape[1:])} and was {had} before; keep the "
                    "sequence length, or begin with empty copies"
                )
        return torch.stack([self.copies[ids[place]] for place in old]).to(torch.float32)


@dataclass(frozen=True)
class Visit:
    """One message about these samples, as `BoundaryCodec` has it."""

    copies: Differences
    ids: Sequence[int]

    def payload_bytes(self, shape: Sequence[int]) -> int:
        """Of what is yet to be packed or unpacked."""
        return self.copies.payload_bytes(self.ids, shape)

    def pack(self, values: Tensor) -> Tensor:
        """As of `Differences`."""
        return self.copies.pack(self.ids, values)

    def unpack(self, payload: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """As of `Differences`."""
        return self.copies.unpack(payload, self.ids, shape, dtype)
