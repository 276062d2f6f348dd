"""What goes over a link: a head of 64 bytes, and behind it so many bytes as the head says.

    worker -> server    HELLO     pace          server -> worker    STATE    step, version
                        INIT      spans, weights                    STATE
                        PULL                                        WEIGHTS  step, version, the range's weights
                        PUSH      step, ..., code                   WEIGHTS  after the push has been reckoned with
                        LEAVE                                       STATE

The worker asks and the server answers, so neither side ever waits to send while the other does. A server that lets a worker wait
says WAIT from time to time, so that its silence means one thing only.
"""

import struct
from dataclasses import dataclass
from enum import IntEnum

_LAYOUT = struct.Struct("<qqqqddqd")
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
    WAIT = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """version: merges or steps the server has made; -1: it has no weights yet. Others as `kind` needs them."""

    kind: Kind
    step: int = 0
    version: int = 0
    local_steps: int = 0
    """PUSH: made. HELLO: wished for between pushes. WEIGHTS: to be made before the next push; 0: the run is over."""
    weight: float = 0.0
    """PUSH: tokens, or samples, behind it. HELLO: those of a step."""
    learning_rate: float = 0.0
    payload_bytes: int = 0
    merged: float = 0.0
    """WEIGHTS: tokens merged so far."""

    def packed(self) -> bytes:
        """HEAD_BYTES bytes."""
        numbers = self.kind, self.step, self.version, self.local_steps
        return _LAYOUT.pack(*numbers, self.weight, self.learning_rate, self.payload_bytes, self.merged)

    @classmethod
    def unpacked(cls, data: bytes) -> "Head":
        """The inverse of `packed`."""
        kind, step, version, local_steps, weight, learning_rate, payload_bytes, merged = _LAYOUT.unpack(data)
        return cls(
            kind=Kind(kind),
            step=step,
            version=version,
            local_steps=local_steps,
            weight=weight,
            learning_rate=learning_rate,
            payload_bytes=payload_bytes,
            merged=merged,
        )
