"""The contract of a merger: when what workers push becomes weights, when a worker may go on, and when the run is over.

    tau     tokens merged so far, by the weights of the pushes that were merged
    T       tokens that were agreed on (`Service.total_tokens`)
    over    tau >= T, for everybody at once: a push that comes later is not merged, and each worker is told so when it next asks
    next    a worker is to make min(h, ceil((T - tau) / (q t))) local steps before its next push
                h: steps between pushes, t: tokens of a step, q: how many pushes make a merge

So no worker owes a number of steps of its own: what one that is killed misses is done by those that live, and nobody is left to
merge alone at the end. The last merge may exceed T by less than the pushes in it.

    begun      once `first_workers` names have ever joined: one that joined and died is not waited for, before a restart or after
    a push     is checked before it is kept (`checks`); one that is refused changes nothing
    nothing    a merge of which all pushes weigh nothing moves nothing: weights and momentum stay, the version counts
    snapshot   one version, copied in whole under the lock; at multiples of `keep_every`, and nobody goes on from such a version
               before it is written (`kept` says why)

One merger per server, called by the threads of all its workers. A worker is a Member: another life of the same name is another.
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
class Pace:
    """What a worker wishes: local steps between pushes (0: as the service says), and tokens of a local step."""

    every: int = 0
    tokens_per_step: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Push:
    """values: [numel] of the server's range; version: of the weights it started from."""

    member: Member
    values: Tensor
    version: int
    weight: float
    local_steps: int
    learning_rate: float | None
    """For the server's optimizer; None: its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """With what a worker goes on: a copy of the weights, its own step, and the local steps until its next push (0: over)."""

    values: Tensor
    version: int
    step: int
    merged: float
    local_steps: int


class Merger(Protocol):
    """Every method takes the lock itself; `changed` is notified whenever somebody may go on."""

    changed: threading.Condition
    version: int
    """Steps or merges made."""
    merged: float
    """Tokens in them."""
    late: dict[str, int]
    """Local steps by worker's name that came when the run was over, and were not merged."""
    weights: Weights | None
    steps: dict[str, int]
    """By worker's name, over all its lives."""
    keep_every: int
    """Versions between snapshots; 0: none."""

    def begin(self, member: Member, pace: Pace) -> int:
        """It lives from now on. Returns the step at which it is to go on."""
        ...

    def initialise(self, values: Tensor, spans: Sequence[Span], model: int = 0) -> str | None:
        """The first weights, in place of any that nobody has been given yet. Returns the reason if they are refused.

        model: a number that those have in common who were initialised together.
        """
        ...

    def push(self, push: Push) -> str | None:
        """Take it in, and merge if it was the last one awaited. Returns the reason if it is refused."""
        ...

    def admit(self, member: Member, patience_s: float) -> Standing | None:
        """Wait until the worker may go on; None if that takes longer than patience_s."""
        ...

    def lost(self, member: Member) -> None:
        """Nobody waits for it any more. Again is nothing."""
        ...

    def not_before(self, member: Member, version: int) -> None:
        """One that has just come, and that another server has taken in at this version, goes on with it here too if it can."""
        ...

    def never_comes(self, name: str) -> None:
        """Nobody waits for the first life of this name. Nothing if it has joined."""
        ...

    def due(self, patience_s: float = 0.0) -> dict[str, Any] | None:
        """The snapshot that is to be written; None if there is none for so long."""
        ...

    def written(self, state: dict[str, Any]) -> None:
        """That snapshot is on the disk."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Weights, moments, versions, tokens, and how far each worker was."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Before the first worker."""
        ...
