"""AQ-SGD: activations that cross a boundary as the difference from what the same sample sent when it came before.

For sample s, at its visit t, with a the activation, m the copy that both sides hold, C a codec and D its decoder:

    first visit    sent: C1(a)           m_1 = D C1(a)              C1: plain values of the buffer's dtype, or a codec
    later          sent: C(a_t - m_t-1)  m_t = m_t-1 + D C(a_t - m_t-1)

Both sides add the same decoded difference in the same arithmetic, so their copies are bit-equal at all times; the receiver
goes on with m_t. Its error is the codec's on the difference, |m_t - a_t| <= bound(a_t - m_t-1) + one rounding to the buffer's
dtype: it vanishes as activations settle, where coding them directly keeps the error of their size. Gradients that come back
are coded directly (`activations.BoundaryCodec`), as in the paper.

The price is memory: a copy of each sample's activation on both sides. Wang et al. 2022 (Fine-tuning language models over slow
networks using activation compression with guarantees).
"""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from thinwire.compress.activations.boundary import BoundaryCodec, flat_float32
from thinwire.compress.base import Codec, finite
from thinwire.errors import UserError


class Differences:
    """What both sides of one boundary do alike. Samples of a message differ; their ids are the data's, the same in each epoch."""

    def __init__(self, codec: Codec, boundary: str, first: Codec | None = None, dtype: torch.dtype = torch.float32) -> None:
        self.copies: dict[int, Tensor] = {}
        """By sample id: what the other side holds too."""
        self._boundary, self._dtype = boundary, dtype
        self._later = BoundaryCodec(codec, boundary)
        self._first = BoundaryCodec(first, boundary) if first else None

    @property
    def memory_bytes(self) -> int:
        """Of the copies, on this side."""
        return sum(copy.numel() * copy.element_size() for copy in self.copies.values())

    def payload_bytes(self, ids: Sequence[int], shape: Sequence[int]) -> int:
        """Of the next message about these samples; shape: [samples, ..]. Exact."""
        new, old = self._parted(ids)
        return self._new_bytes([len(new), *shape[1:]]) + self._later.payload_bytes([len(old), *shape[1:]])

    def state_dict(self) -> dict[str, Any]:
        """The copies."""
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

    def _new_bytes(self, shape: Sequence[int]) -> int:
        if self._first:
            return self._first.payload_bytes(shape)
        return prod(shape) * self._dtype.itemsize

    def _add(self, payload: Tensor, ids: Sequence[int], shape: Sequence[int]) -> Tensor:
        """Bring the copies up to date with one message. Returns [samples, ..] of the buffer's dtype."""
        new, old = self._parted(ids)
        border = self._new_bytes([len(new), *shape[1:]])
        arrived = torch.empty(tuple(shape), dtype=self._dtype, device=payload.device)
        if new:
            new_shape = (len(new), *shape[1:])
            if self._first:
                arrived[new] = self._first.unpack(payload[:border], new_shape, self._dtype)
            else:
                arrived[new] = payload[:border].clone().view(self._dtype).view(new_shape)
        if old:
            difference = self._later.unpack(payload[border:].clone(), (len(old), *shape[1:]))
            arrived[old] = (self._old_copies(ids, old, shape) + difference).to(self._dtype)
        for place, sample in enumerate(ids):
            self.copies[sample] = arrived[place].clone()
        return arrived


class DifferenceSender(Differences):
    """The side that has the activations."""

    def pack(self, ids: Sequence[int], activation: Tensor) -> Tensor:
        """[samples, ..] -> [payload_bytes] uint8. UserError if a value is not finite; the copies then stay as they were."""
        new, old = self._parted(ids)
        values, parts = flat_float32(activation, self._boundary).view(activation.shape), []
        if new and self._first:
            parts.append(self._first.pack(values[new]))
        elif new:
            plain = values[new].to(self._dtype).contiguous()
            if not finite(plain):
                raise UserError(f"{self._boundary} is not finite; lower the learning rate, or look at the data of this step")
            parts.append(plain.view(-1).view(torch.uint8))
        if old:
            parts.append(self._later.pack(values[old] - self._old_copies(ids, old, activation.shape)))
        payload = torch.cat(parts)
        self._add(payload, ids, activation.shape)
        return payload


class DifferenceReceiver(Differences):
    """The side that goes on with them."""

    def unpack(self, payload: Tensor, ids: Sequence[int], shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """[payload_bytes] uint8 -> [samples, ..]: the new copies."""
        return self._add(payload, ids, shape).to(dtype)
