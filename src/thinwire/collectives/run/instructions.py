"""What a rank does in one run of a schedule, as a list to be worked off strictly in order. Plain data, no torch.

Memory is named by pieces: elements [first, last) of the rank's input, its output, or scratch memory (input and output are one
where the op is in place). Only waits block.

    Start       to receive a message into `piece`, or to send `piece` as one
    Wait        until a message is there, or until what is sent as one may be overwritten
    Combine     into <- a + b  (or the maximum, ...)
    Copy        into <- source
    StartBatch  of receives and sends that start as one, where messages have no tags (`compiler.compile_without_tags`)
"""

from dataclasses import dataclass

INPUT, OUTPUT, SCRATCH = range(3)


@dataclass(frozen=True, slots=True)
class Piece:
    """Elements [first, last) of one of the three buffers."""

    buffer: int
    first: int
    last: int

    def __len__(self) -> int:
        return self.last - self.first

    def overlaps(self, other: "Piece") -> bool:
        return self.buffer == other.buffer and self.first < other.last and other.first < self.last


@dataclass(frozen=True, slots=True)
class Start:
    """message: its number in the schedule; piece: what is sent (`sends`), or where what is received goes."""

    message: int
    peer: int
    piece: Piece
    sends: bool


@dataclass(frozen=True, slots=True)
class Wait:
    """Of a message whose send or receive has started."""

    message: int
    sends: bool


@dataclass(frozen=True, slots=True)
class Combine:
    """`into` may be `a`, or `b`, or neither."""

    into: Piece
    a: Piece
    b: Piece


@dataclass(frozen=True, slots=True)
class Copy:
    """They do not overlap."""

    into: Piece
    source: Piece


@dataclass(frozen=True, slots=True)
class StartBatch:
    """Receives and sends that start as one."""

    parts: tuple[Start, ...]


Instruction = Start | Wait | Combine | Copy | StartBatch


@dataclass(frozen=True, slots=True)
class Compiled:
    """For one rank and one size. lengths: elements of input, output and scratch; sent: elements that are sent."""

    instructions: tuple[Instruction, ...]
    lengths: tuple[int, int, int]
    sent: int
