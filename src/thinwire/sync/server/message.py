"""What goes over a connection: a head of 64 bytes, and behind it so many bytes as the head says.

                                                server -> worker    WELCOME  the service that was agreed on, and the host (JSON)
    worker -> server    HELLO     its name, pace ... (JSON)         STATE    step, version, incarnation
                        BEGIN                                       STATE    who is to give the weights, server 0 alone (`lease`)
                        INIT      spans, weights                    STATE
                        PULL      the least version wished for      WEIGHTS  step, version, the range's weights
                        PUSH      step, ..., code                   WEIGHTS  after the push has been reckoned with
                        PROGRESS                                    nothing
                        LEAVE                                       STATE

The worker asks and the server answers, so neither side ever waits to send while the other does. A server that lets a worker wait
says WAIT from time to time, so that its silence means one thing only. In place of any answer it may say REFUSED, a line for the
user of this worker, or LOST: this life is given up, and why. A head whose kind or numbers cannot be, or whose payload is not of
the size that was agreed, is a BadMessage: it costs its sender the connection, and nothing behind it is read.
"""

import json
import math
import struct
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from enum import IntEnum
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from thinwire.sync.server.extent import Extent
from thinwire.sync.server.flat import Span, extent_of

_LAYOUT = struct.Struct("<qqqqddqd")
HEAD_BYTES = _LAYOUT.size
MOST = 2**62
"""Above any number in a head."""
TEXT_BYTES, HELLO_BYTES, WELCOME_BYTES = 2**10, 2**10, 2**16
"""The most that such a payload may have."""
NAME_LETTERS = 100
"""The most in the name of a worker or host."""
SPAN_BYTES = 3 * 8
Number = Annotated[int, Field(ge=0, lt=MOST)]


class BadMessage(ValueError):
    """What came is none of the messages that may come here."""


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
    WELCOME = 9
    BEGIN = 10
    PROGRESS = 11
    REFUSED = 12
    LOST = 13


@dataclass(frozen=True, slots=True)
class Head:
    """In the order of the wire. version: merges or steps the server has made; -1: no weights yet. Others as `kind` needs them."""

    kind: Kind
    step: int = 0
    """INIT, and STATE that answers BEGIN: the number of the lease under which it gives the weights; 0: they are there."""
    version: int = 0
    """INIT: a number that all ranges of these weights share."""
    local_steps: int = 0
    """PUSH: made. INIT: number of spans. WEIGHTS: to be made before the next push; 0: the run is over. STATE: the incarnation."""
    weight: float = 0.0
    """PUSH: tokens, or samples, behind it."""
    learning_rate: float | None = None
    """PUSH: None: the server's own; nan on the wire."""
    payload_bytes: int = 0
    merged: float = 0.0
    """WEIGHTS: tokens merged so far."""

    def packed(self) -> bytes:
        """HEAD_BYTES bytes."""
        rate = math.nan if self.learning_rate is None else self.learning_rate
        return _LAYOUT.pack(*astuple(replace(self, learning_rate=rate)))

    @classmethod
    def unpacked(cls, data: bytes) -> "Head":
        """The inverse of `packed`. BadMessage if no `packed` has made it. Floats are judged where they are used."""
        kind, step, version, local_steps, weight, rate, *others = _LAYOUT.unpack(data)
        try:
            head = cls(Kind(kind), step, version, local_steps, weight, None if math.isnan(rate) else rate, *others)
        except ValueError:
            raise BadMessage(f"a message of kind {kind}") from None
        if version < -1 or not all(0 <= number < MOST for number in (step, version + 1, local_steps, head.payload_bytes)):
            raise BadMessage(
                f"{head.kind.name} with step {step}, version {version}, steps {local_steps}, {head.payload_bytes} bytes"
            )
        return head


class Hello(BaseModel):
    """With what a worker begins: which server it wants, who and where it is, how many values its model has in that range.

    wide: how many of these are float64. incarnation: as server 0 has given it; 0 to server 0 itself. every, tokens_per_step: its
    pace.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    server: Number
    name: str
    incarnation: Number
    host: str = Field(max_length=NAME_LETTERS)
    numel: Number = Field(ge=1)
    wide: Number = 0
    every: Number
    tokens_per_step: float

    @model_validator(mode="after")
    def _check(self) -> "Hello":
        if name_error(self.name) or not self.host.isprintable() or self.wide > self.numel:
            raise ValueError("a name or number that cannot be")
        return self

    def packed(self) -> Tensor:
        """uint8, HELLO_BYTES at most."""
        return as_bytes(json.dumps(self.model_dump(exclude_defaults=True)))

    @classmethod
    def unpacked(cls, payload: Tensor) -> "Hello":
        """The inverse of `packed`. BadMessage if no `packed` has made it."""
        try:
            return cls.model_validate(json.loads(as_text(payload)))
        except (ValueError, RecursionError):
            raise BadMessage("a greeting that is none") from None


def name_error(name: str) -> str | None:
    """Of a worker; the reason, in one line."""
    if not name or "/" in name or not name.isprintable() or len(name) > NAME_LETTERS:
        return f"worker name {name[:NAME_LETTERS]!r}: write letters, digits, - and _, {NAME_LETTERS} at most"
    return None


def as_bytes(text: str) -> Tensor:
    """A text as a payload."""
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def as_text(payload: Tensor) -> str:
    """The inverse of `as_bytes`. BadMessage if it is no text."""
    try:
        return payload.numpy().tobytes().decode()
    except UnicodeDecodeError:
        raise BadMessage("bytes where a text was due") from None


def pack_start(values: Tensor, spans: Sequence[Span]) -> Tensor:
    """Spans and weights as one payload."""
    table = torch.tensor([(span.first, span.end, span.decays + 2 * span.wide) for span in spans], dtype=torch.int64)
    return torch.cat([table.view(torch.uint8).reshape(-1), extent_of(spans).pack(values)])


def unpack_start(payload: Tensor, num_spans: int, extent: Extent) -> tuple[Tensor, list[Span]]:
    """The inverse of `pack_start`, for weights of this extent."""
    size = num_spans * SPAN_BYTES
    table = payload[:size].clone().view(torch.int64).view(num_spans, 3).tolist()
    spans = [Span(first, end, bool(flags & 1), bool(flags & 2)) for first, end, flags in table]
    return extent.unpack(payload[size:].clone()), spans
