"""What goes over a link: a head of 64 bytes, and behind it so many bytes as the head says.

    worker -> server    HELLO                   server -> worker    STATE    step, version
                        INIT      spans, weights                    STATE
                        PULL                                        WEIGHTS  step, version, the range's weights
                        PUSH      step, ..., code                   WEIGHTS  after the push has been reckoned with
                        LEAVE                                       STATE

The worker asks and the server answers, so neither side ever waits to send while the other does.
"""

import struct
from dataclasses import dataclass
from enum import IntEnum

_LAYOUT = struct.Struct("<qqqqddq8x")
HEAD_BYTES = _LAYOUT.size


class Kind(IntEnum):
    """See the top of the file."""

    HELLO = 1
    INIT = 2
    PULL = 3
    PUSH = 4
    LEAVE = 5
    STATE = 6
    WEIGHTS = 7


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """version: merges or steps the server has made; -1: it has no weights yet. Others as `kind` needs them."""

    kind: Kind
    step: int = 0
    version: int = 0
    local_steps: int = 0
    weight: float = 0.0
    """Tokens, or samples, behind what is pushed."""
    learning_rate: float = 0.0
    payload_bytes: int = 0

    def packed(self) -> bytes:
        """HEAD_BYTES bytes."""
        return _LAYOUT.pack(
            self.kind, self.step, self.version, self.local_steps, self.weight, self.learning_rate, self.payload_bytes
        )

    @classmethod
    def unpacked(cls, data: bytes) -> "Head":
        """The inverse of `packed`."""
        kind, step, version, local_steps, weight, learning_rate, payload_bytes = _LAYOUT.unpack(data)
        return cls(
            kind=Kind(kind),
            step=step,
            version=version,
            local_steps=local_steps,
            weight=weight,
            learning_rate=learning_rate,
            payload_bytes=payload_bytes,
        )
