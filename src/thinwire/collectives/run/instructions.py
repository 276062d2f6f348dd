"""What a rank does in one run of a schedule, as a list to be worked off strictly in order. Plain data, no torch.

Memory is named by pieces: elements [first, last) of the rank's input, its output, or scratch memory (input and output are one
where the op is in place). Only the two waits block.

    StartReceive   of message r into `into`             WaitReceive   until message r is there
    StartSend      of `source` as message s             WaitSend      until the source of message s may be overwritten
    Combine        into <- a + b  (or the maximum, ...) Copy          into <- source
    StartBatch     of receives and sends that start as one, where messages have no tags (`compiler.compile_without_tags`)
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
        """Whether they share an element."""
        return self.buffer == other.buffer and self.first < other.last and other.first < self.last


@dataclass(frozen=True, slots=True)
class StartReceive:
    """message: its number in the schedule."""

    message: int
    peer: int
    into: Piece


@dataclass(frozen=True, slots=True)
class WaitReceive:
    """Of a message whose receive has started."""

    message: int


@dataclass(frozen=True, slots=True)
class StartSend:
    """message: its number in the schedule."""

    message: int
    peer: int
    source: Piece


@dataclass(frozen=True, slots=True)
class WaitSend:
    """Of a message whose send has started."""

    message: int


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

    parts: tuple[StartReceive | StartSend, ...]


Instruction = StartReceive | WaitReceive | StartSend | WaitSend | Combine | Copy | StartBatch


@dataclass(frozen=True, slots=True)
class Compiled:
    """For one rank and one size. lengths: elements of input, output and scratch; sent: elements that are sent."""

    instructions: tuple[Instruction, ...]
    lengths: tuple[int, int, int]
    sent: int
