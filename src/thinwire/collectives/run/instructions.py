"""What a rank does in one run of a schedule, as a list to be worked off strictly in order. Plain data, no torch.

Memory is named by pieces: elements [first, last) of the rank's input, its output, or scratch memory (input and output are one
where the op is in place). Only `Arrive` and `Leave` wait.

    Expect(r)   begin to receive message r into `into`          Arrive(r)   wait until it is there
    Send(s)     begin to send `what` as message s               Leave(s)    wait until `what` may be overwritten
    Add         into <- a + b  (or the maximum, ...)             Copy        into <- what
    Together    begin several at once, where messages have no tags (`together`)
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
class Expect:
    """message: its number in the schedule."""

    message: int
    peer: int
    into: Piece


@dataclass(frozen=True, slots=True)
class Arrive:
    """Of an expected message."""

    message: int


@dataclass(frozen=True, slots=True)
class Send:
    """message: its number in the schedule."""

    message: int
    peer: int
    what: Piece


@dataclass(frozen=True, slots=True)
class Leave:
    """Of a message begun to be sent."""

    message: int


@dataclass(frozen=True, slots=True)
class Add:
    """`into` may be `a`, or `b`, or neither."""

    into: Piece
    a: Piece
    b: Piece


@dataclass(frozen=True, slots=True)
class Copy:
    """They do not overlap."""

    into: Piece
    what: Piece


@dataclass(frozen=True, slots=True)
class Together:
    """Receives and sends that begin as one."""

    parts: tuple[Expect | Send, ...]


Instruction = Expect | Arrive | Send | Leave | Add | Copy | Together


@dataclass(frozen=True, slots=True)
class Compiled:
    """For one rank and one size. lengths: elements of input, output and scratch; sent: elements that leave."""

    instructions: tuple[Instruction, ...]
    lengths: tuple[int, int, int]
    sent: int
