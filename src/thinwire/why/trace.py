"""What one rank has noted, in the order in which its main thread came by. Moments are seconds of that rank's own clock. No torch."""

from dataclasses import dataclass
from typing import Any

STEP, OPTIMIZER, FORWARD, BACKWARD, BACKWARD_END, DATA, DATA_END = (
    "step",
    "optimizer",
    "forward",
    "backward",
    "backward end",
    "data",
    "data end",
)
"""Marks: an optimizer has stepped, begins; the first module of a step is called; backward() and the data loader, from and to."""


@dataclass(slots=True, eq=False)
class Call:
    """A collective call. group: global ranks. ended: None while nobody has seen its end. Until `settled`, moments are the clock's."""

    issued: Any
    op: str
    message_bytes: int
    group: tuple[int, ...]
    ended: Any = None


@dataclass(slots=True, eq=False)
class Wait:
    """The rank stood still for `call`."""

    begun: Any
    ended: Any
    call: Call


@dataclass(slots=True, eq=False)
class Mark:
    """what: see the names above. who: of an optimizer, its number."""

    at: Any
    what: str
    who: int = 0


Event = Call | Wait | Mark
Trace = list[Event]
