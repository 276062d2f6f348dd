"""The contract of a merger: when what workers push becomes weights, and when a worker may go on.

One per server, called by the threads of all its workers. A worker is a Member: another life of the same name is another worker.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from thinwire.sync.server.members import Member
from thinwire.sync.server.ranges import Span
from thinwire.sync.server.weights import Weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Push:
    """values: [numel] of the server's range; version: of the weights it started from."""

    member: Member
    values: Tensor
    version: int
    weight: float
    local_steps: int
    learning_rate: float


class Merger(Protocol):
    """Every method takes the lock itself; `changed` is notified whenever somebody may go on."""

    changed: threading.Condition
    version: int
    """Steps or merges made."""
    weights: Weights | None

    def begin(self, member: Member) -> int:
        """It lives from now on. Returns the step at which it is to go on."""
        ...

    def initialise(self, values: Tensor, spans: Sequence[Span]) -> None:
        """The weights of the first worker that comes; those of later ones are not needed."""
        ...

    def push(self, push: Push) -> None:
        """Take it in; merge if it was the last one awaited."""
        ...

    def admit(self, member: Member) -> tuple[Tensor, int, int]:
        """Wait until the worker may go on. A copy of the weights, their version, and its step."""
        ...

    def lost(self, member: Member) -> None:
        """Nobody waits for it any more. Again is nothing."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Weights, moments, versions, and how far each worker was."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Before the first worker."""
        ...
