"""What goes over a link: a head of 64 bytes, and behind it so many bytes as the head says.

                                                server -> worker    WELCOME  the service that was agreed on, and the host (JSON)
    worker -> server    HELLO     its name, pace ... (JSON)         STATE    step, version, incarnation
                        BEGIN                                       STATE    who is to give the weights, server 0 alone (`first`)
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
from dataclasses import asdict, dataclass, fields
from enum import IntEnum

import torch
from torch import Tensor

_LAYOUT = struct.Struct("<qqqqddqd")
HEAD_BYTES = _LAYOUT.size
MOST = 2**62
"""Above any number in a head."""
TEXT_BYTES, HELLO_BYTES, WELCOME_BYTES = 2**10, 2**10, 2**16
"""The most that such a payload may have."""
NAME_LETTERS = 100
"""The most in the name of a worker or host."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """version: merges or steps the server has made; -1: it has no weights yet. Others as `kind` needs them."""

    kind: Kind
    step: int = 0
    """INIT, and STATE that answers BEGIN: the number of the right to give the weights; 0: they are there."""
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
        numbers = self.kind, self.step, self.version, self.local_steps
        rate = math.nan if self.learning_rate is None else self.learning_rate
        return _LAYOUT.pack(*numbers, self.weight, rate, self.payload_bytes, self.merged)

    @classmethod
    def unpacked(cls, data: bytes) -> "Head":
        """The inverse of `packed`. BadMessage if no `packed` has made it. Floats are judged where they are used."""
        kind, step, version, local_steps, weight, rate, payload_bytes, merged = _LAYOUT.unpack(data)
        try:
            known = Kind(kind)
        except ValueError:
            raise BadMessage(f"a message of kind {kind}") from None
        if version < -1 or not all(0 <= number < MOST for number in (step, version + 1, local_steps, payload_bytes)):
            raise BadMessage(f"{known.name} with step {step}, version {version}, steps {local_steps}, {payload_bytes} bytes")
        return cls(
            kind=known,
            step=step,
            version=version,
            local_steps=local_steps,
            weight=weight,
            learning_rate=None if math.isnan(rate) else rate,
            payload_bytes=payload_bytes,
            merged=merged,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """With what a worker begins: which server it wants, who and where it is, how many values its model has in that range.

    incarnation: as server 0 has told it; 0 to server 0 itself. every, tokens_per_step: its pace.
    """

    server: int
    name: str
    incarnation: int
    host: str
    numel: int
    every: int
    tokens_per_step: float

    def packed(self) -> Tensor:
        """uint8, HELLO_BYTES at most."""
        return as_bytes(json.dumps(asdict(self)))

    @classmethod
    def unpacked(cls, payload: Tensor) -> "Hello":
        """The inverse of `packed`. BadMessage if no `packed` has made it."""
        try:
            told = json.loads(as_text(payload))
        except (ValueError, RecursionError):
            told = None
        wanted = {field.name: field.type for field in fields(cls)}
        if not isinstance(told, dict) or {name: type(value) for name, value in told.items()} != wanted:
            raise BadMessage("a greeting that is none")
        found = cls(**told)
        numbers = found.server, found.incarnation, found.numel, found.every
        if wrong_with_name(found.name) or not found.host.isprintable() or len(found.host) > NAME_LETTERS:
            raise BadMessage("a greeting with a name that cannot be")
        if not all(0 <= number < MOST for number in numbers) or not found.numel:
            raise BadMessage("a greeting with numbers that cannot be")
        return found


def wrong_with_name(name: str) -> str | None:
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
