"""How pushes and pulls look on the wire: as they are (`extent`), or the code of a codec, which takes float32.

A push is coded with error feedback at the worker: with v what should be pushed, e what was lost before and C the codec,

    sent C(v + d e),   e <- (v + d e) - D C(v + d e)        d: feedback_decay; e is float64 where v is

which makes the "significantly modified" filter of Li et al. 2014 one codec among others (topk). A pull is coded as a difference:
both ends keep the copy c of what the worker has, the server sends C(w - c), both add D C(w - c) to c. What a code loses is in the
next difference, so nothing is lost for good. The first pull over a connection is not coded.

A push sends a head of 64 bytes and the code of the range to each server, its answer a head and the code of a pull. Joining costs
a HELLO and a head more to each server, and its weights once if it has none; leaving costs one head. What precedes HELLO is in no
ledger. A step that pushes nothing may send a head "progress to server i", one in `heartbeat_s` at most.
"""

from torch import Tensor

from thinwire.compress.base import Flat, finite, make_codec
from thinwire.compress.memory import ErrorFeedback, Memory, NoMemory
from thinwire.config.replicas import Code
from thinwire.errors import UserError
from thinwire.sync.server.extent import Extent


def make_flat(code: Code) -> Flat | None:
    """The codec of vectors of any length; None: they travel as they are."""
    codec = make_codec(code)
    return None if codec is None else Flat(codec)


def coded_bytes(codec: Flat | None, extent: Extent) -> int:
    """What its values take on the wire."""
    return extent.exact_bytes if codec is None else codec.payload_bytes((extent.numel,))


def encode(codec: Flat | None, values: Tensor, extent: Extent) -> Tensor:
    """[numel] -> uint8. Codes are of what float32 holds of the values."""
    return extent.pack(values) if codec is None else codec.encode(values.float())


def decode(codec: Flat | None, payload: Tensor, extent: Extent) -> Tensor:
    """uint8 -> [numel] of the extent's dtype."""
    return extent.unpack(payload) if codec is None else codec.decode(payload, (extent.numel,)).to(extent.dtype)


class PushCoder:
    """The worker's side of pushes: codes by range, and each range's error-feedback residual."""

    def __init__(self, code: Code) -> None:
        self._codec = make_flat(code)
        decay = 1.0 if code.feedback_decay is None else code.feedback_decay
        self.memory: Memory = ErrorFeedback(decay=decay) if code.feeds_back else NoMemory()

    def encode(self, name: str, values: Tensor, extent: Extent) -> Tensor:
        """The payload of one range. UserError if a value is not finite, which coding would spread."""
        values = values.to(extent.dtype)
        wanted = values if self._codec is None else self.memory.corrected(name, values)
        if not finite(wanted):
            raise UserError("what is pushed to the servers is not finite; lower the learning rate, or look at the data")
        payload = encode(self._codec, wanted, extent)
        if self.memory.keeps:
            self.memory.keep(name, wanted - decode(self._codec, payload, Extent(extent.numel)))
        return payload


class Mirror:
    """One end of coded pulls over one connection: the copy of what the worker has."""

    def __init__(self, code: Code) -> None:
        self._codec = make_flat(code)
        self._copy: Tensor | None = None

    def encode(self, values: Tensor, extent: Extent) -> Tensor:
        """At the server: the payload that brings the copy to `values`, or near."""
        if self._codec is None:
            return extent.pack(values)
        if self._copy is None:
            payload = extent.pack(values)
            self._copy = extent.unpack(payload).clone()
            return payload
        payload = encode(self._codec, values - self._copy, extent)
        self._copy += decode(self._codec, payload, extent)
        return payload

    def expected_bytes(self, extent: Extent) -> int:
        """Of the next payload."""
        return extent.exact_bytes if self._copy is None else coded_bytes(self._codec, extent)

    def decode(self, payload: Tensor, extent: Extent) -> Tensor:
        """At the worker: its weights now, [numel], of `expected_bytes`. Not to be changed."""
        if self._codec is None or self._copy is None:
            self._copy = extent.unpack(payload)
        else:
            self._copy = self._copy + decode(self._codec, payload, extent)
        return self._copy
