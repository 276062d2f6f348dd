"""How pushes and pulls look on the wire: float32, or the code of a codec.

A push is coded with error feedback at the worker: with v what should be pushed, e what was lost before and C the codec,

    sent C(v + d e),   e <- (v + d e) - D C(v + d e)        d: feedback_decay

which makes the "significantly modified" filter of Li et al. 2014 one codec among others (topk). A pull is coded as a difference:
both ends keep the copy c of what the worker has, the server sends C(w - c), both add D C(w - c) to c. What a code loses is in the
next difference, so nothing is lost for good. The first pull over a connection is float32.

A push sends a head of 64 bytes and the code of the range to each server, its answer a head and the code of a pull. Joining costs
a HELLO and a head more to each server, and its weights once if it has none; leaving costs one head. What precedes HELLO is in no
ledger. A step that pushes nothing may send a head "progress to server i", one in `heartbeat_s` at most.
"""

import torch
from torch import Tensor

from thinwire.compress.base import Flat, finite, make_codec
from thinwire.compress.memory import ErrorFeedback, Memory, NoMemory
from thinwire.config.replicas import Code
from thinwire.errors import UserError


def make_flat(code: Code) -> Flat | None:
    """The codec of vectors of any length; None for float32."""
    codec = make_codec(code)
    return None if codec is None else Flat(codec)


def coded_bytes(codec: Flat | None, numel: int) -> int:
    """What `numel` values take on the wire."""
    return 4 * numel if codec is None else codec.payload_bytes((numel,))


def encode(codec: Flat | None, values: Tensor) -> Tensor:
    """[n] float32 -> uint8."""
    return values.contiguous().view(torch.uint8) if codec is None else codec.encode(values)


def decode(codec: Flat | None, payload: Tensor, numel: int) -> Tensor:
    """uint8 -> [numel] float32."""
    return payload.view(torch.float32) if codec is None else codec.decode(payload, (numel,))


class PushCoder:
    """The worker's side of pushes: codes by range, and each range's error-feedback residual."""

    def __init__(self, code: Code) -> None:
        self._codec = make_flat(code)
        decay = 1.0 if code.feedback_decay is None else code.feedback_decay
        self.memory: Memory = ErrorFeedback(decay=decay) if code.feeds_back else NoMemory()

    def encode(self, name: str, values: Tensor) -> Tensor:
        """The payload of one range. UserError if a value is not finite, which coding would spread."""
        if not finite(values):
            raise UserError("what is pushed to the servers is not finite; lower the learning rate, or look at the data")
        wanted = self.memory.corrected(name, values)
        payload = encode(self._codec, wanted)
        if self.memory.keeps:
            self.memory.keep(name, wanted - decode(self._codec, payload, values.numel()))
        return payload


class Mirror:
    """One end of coded pulls over one connection: the copy of what the worker has."""

    def __init__(self, code: Code) -> None:
        self._codec = make_flat(code)
        self._copy: Tensor | None = None

    def encode(self, values: Tensor) -> Tensor:
        """At the server: the payload that brings the copy to `values`, or near."""
        if self._codec is None:
            return encode(None, values)
        if self._copy is None:
            self._copy = values.clone()
            return encode(None, values)
        payload = self._codec.encode(values - self._copy)
        self._copy += self._codec.decode(payload, values.shape)
        return payload

    def expected_bytes(self, numel: int) -> int:
        """Of the next payload."""
        return 4 * numel if self._copy is None else coded_bytes(self._codec, numel)

    def decode(self, payload: Tensor, numel: int) -> Tensor:
        """At the worker: its weights now, [numel], of `expected_bytes`. Not to be changed."""
        if self._codec is None or self._copy is None:
            self._copy = decode(None, payload, numel)
        else:
            self._copy = self._copy + self._codec.decode(payload, (numel,))
        return self._copy
