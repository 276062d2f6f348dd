"""What one rank has noted, in the order in which its main thread came by; moments are seconds of its own clock. No torch."""

from dataclasses import dataclass
from typing import Any

STEP, OPTIMIZER, FORWARD, BACKWARD, BACKWARD_END, DATA, DATA_END, PLAIN = (
    "step",
    "optimizer",
    "forward",
    "backward",
    "backward end",
    "data",
    "data end",
    "plain",
)
"""Marks: an optimizer has stepped, begins; the first module of a step is called; backward() and the data loader, from and to;
calls of this step are not noted."""


@dataclass(slots=True, eq=False)
class Call:
    """A collective call. group: global ranks. returned: when the caller had control again, ended: None while nobody has seen its
    end. On a device moments are events, until a `Recorder` gives its trace.
    """

    issued: Any
    op: str
    message_bytes: int
    group: tuple[int, ...]
    returned: Any = None
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
