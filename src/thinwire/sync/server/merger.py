"""A merger: when what workers push becomes weights, when a worker may go on, and when the run is over. One per server.

    tau     tokens merged so far, by the weights of the pushes that were merged
    T       tokens that were agreed on (`Service.total_tokens`)
    over    tau >= T, for everybody at once: a push that comes later is not merged, and each worker learns so when it next asks
    next    a worker is to make min(h, ceil((T - tau) / (q t))) local steps before its next push
                h: steps between pushes, t: tokens of a step, q: how many pushes make a merge

So no worker has a number of steps of its own to make: what one that is killed misses is done by those that live, and nobody is
left to merge alone at the end. The last merge may exceed T by less than the pushes in it.

    begun      once `first_workers` names have ever joined: one that joined and died is not waited for, before a restart or after
    a push     is checked before it is kept (`checks`); one that is refused changes nothing
    no weight  a merge of which all pushes weigh nothing moves nothing: weights and momentum stay, the version counts
    snapshot   one version, copied in whole under the lock; at multiples of `keep_every`, and nobody goes on from such a version
               before it is written (`snapshots` says why)

A worker is a Member, one life of a name:

    life        from HELLO to LEAVE, or until it is lost. Server 0 numbers the lives of each name, 1, 2, ...
    supersede   a life with a higher number ends those before it, on every server
    lost        its connection is closed, or it makes no progress for `timeout_s`: no step of its loop, no wait for a server's
                answer, and no word of its own that it pauses on purpose (`ServerClient.alive`). No heartbeat runs beside the
                loop: a loop that hangs is lost like a process that has ended.
"""

import math
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from thinwire.config.replicas import DiLoCo, Gradients, Service
from thinwire.sync.server.checks import initial_weights_error, push_error
from thinwire.sync.server.flat import Span
from thinwire.sync.server.weights import Weights


@dataclass(frozen=True, slots=True, order=True)
class Member:
    """One life of a named worker."""

    name: str
    incarnation: int


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


class Merger(ABC):
    """Called by the threads of all workers. Public methods take the lock, those with _ are called under it."""

    def __init__(self, service: Service) -> None:
        self.changed = threading.Condition()
        """The lock; notified whenever somebody may go on."""
        self.version = 0
        """Steps or merges made."""
        self.merged = 0.0
        """Tokens in them."""
        self.late: dict[str, int] = {}
        """Local steps by worker's name that came when the run was over, and were not merged."""
        self.weights: Weights | None = None
        self.steps: dict[str, int] = {}
        """By worker's name, over all its lives."""
        self.live: set[Member] = set()
        self.keep_every = 0
        """Versions between snapshots; 0: none."""
        self._paces: dict[Member, Pace] = {}
        self._config: Gradients | DiLoCo = service.merge
        self._first_workers, self._total = service.first_workers, service.total_tokens
        self._snapshot: dict[str, Any] | None = None
        self._model = 0
        self._given = False
        """Somebody has these weights."""
        self._deadline = math.inf
        """When those who wait must look again."""
        self._pending: list[Push] = []

    @property
    def started(self) -> bool:
        """The first workers are all there, or were."""
        return len(self.steps) >= self._first_workers

    @property
    def over(self) -> bool:
        """All tokens that were agreed on are merged."""
        return 0 < self._total <= self.merged

    @abstractmethod
    def begin(self, member: Member, pace: Pace) -> int:
        """It lives from now on. Returns the step at which it is to go on."""

    def initialise(self, values: Tensor, spans: Sequence[Span], model: int = 0) -> str | None:
        """The first weights, in place of any that nobody has been given yet. Returns the reason if they are refused.

        model: a number that those have in common who were initialised together.
        """
        with self.changed:
            if self._given or self.version:
                return f"first weights for a server whose weights are in use, at version {self.version}"
            if error := initial_weights_error(values, spans):
                return error
            self.weights, self._model = Weights(self._config, values, spans), model
            self._snapshot_if_due()
            self.changed.notify_all()
            return None

    def push(self, push: Push) -> str | None:
        """Take it in, unless it comes too late: from a life that was given up, or when the run is over. The reason if refused."""
        with self.changed:
            if push.member not in self.live:
                return None  # a new life will do it again
            if self.weights is None:
                return "a push to servers that have no weights yet; join first"
            if error := push_error(push, self.weights.values, self.version):
                return error
            name = push.member.name
            if self.over:
                self.late[name] = self.late.get(name, 0) + push.local_steps
                return None
            self.steps[name] += push.local_steps
            self._take(push)
            self.changed.notify_all()
            return None

    def admit(self, member: Member, patience_s: float) -> Standing | None:
        """Wait until the worker may go on; None if that takes longer than patience_s. One that is lost may, to no effect."""
        with self.changed:
            end = time.monotonic() + patience_s
            while member in self.live and not self._ready_for(member):
                now = time.monotonic()
                if now >= end:
                    return None
                self.changed.wait(max(0.0, min(end, self._deadline) - now))
                self._merge_if_due()
            if self.weights is None:
                return None  # lost before there were any
            self._given = True
            return Standing(
                values=self.weights.values.clone(),
                version=self.version,
                step=self.steps[member.name],
                merged=self.merged,
                local_steps=self._local_steps(member),
            )

    def not_before(self, member: Member, version: int) -> None:  # noqa: B027 (nothing unless servers make versions in step)
        """One that has just come, and that another server has taken in at this version, goes on with it here too if it can."""

    def lost(self, member: Member) -> None:
        """Nobody waits for it any more, so a merge may be due. Again is nothing."""
        with self.changed:
            self.live.discard(member)
            self._merge_if_due()
            self.changed.notify_all()

    def never_comes(self, name: str) -> None:
        """Nobody waits for the first life of this name. Nothing if it has joined."""
        with self.changed:
            self.steps.setdefault(name, 0)
            self._merge_if_due()
            self.changed.notify_all()

    def snapshot(self, patience_s: float = 0.0) -> dict[str, Any] | None:
        """The one that is to be written; None if there is none for so long."""
        with self.changed:
            self.changed.wait_for(lambda: self._snapshot is not None, patience_s)
            return self._snapshot

    def written(self, state: dict[str, Any]) -> None:
        """That snapshot is on the disk; another may be due meanwhile."""
        with self.changed:
            if self._snapshot is state:
                self._snapshot = None
                self.changed.notify_all()

    def state_dict(self) -> dict[str, Any]:
        """Weights, moments, versions, tokens, and how far each worker was."""
        with self.changed:
            weights = self.weights.state_dict() if self.weights else None
            numbers = {"model": self._model, "version": self.version, "merged": self.merged}
            return numbers | {"steps": dict(self.steps), "weights": weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Before the first worker."""
        self.version, self.merged, self.steps = state["version"], state["merged"], dict(state["steps"])
        self._model, self._given = state["model"], True
        self.weights = Weights.of(self._config, state["weights"])

    @abstractmethod
    def _take(self, push: Push) -> None:
        """A push that counts."""

    @abstractmethod
    def _merge_if_due(self) -> None: ...

    @abstractmethod
    def _may_go_on(self, member: Member) -> bool: ...

    @abstractmethod
    def _pushes_per_merge(self) -> int:
        """Among so many what is left is shared."""

    def _admit_new(self, member: Member, pace: Pace) -> None:
        self.live.add(member)
        self._paces[member] = pace
        self.changed.notify_all()

    def _step(self, gradient: Tensor | None, learning_rate: float, weight: float) -> None:
        """A new version. None: no weight was behind it."""
        assert self.weights is not None, "a push is checked against the weights before"
        if gradient is not None:
            self.weights.step(gradient, learning_rate)
        self.version += 1
        self.merged += weight

    def _snapshot_if_due(self) -> None:
        """Copy a version that is to be kept as it is made."""
        if self.keep_every and self.version % self.keep_every == 0:
            self._snapshot = self.state_dict()

    def _ready_for(self, member: Member) -> bool:
        if self.weights is None:
            return False
        return self.over or (self.started and self._snapshot is None and self._may_go_on(member))

    def _local_steps(self, member: Member) -> int:
        pace = self._paces[member]
        if self.over:
            return 0
        if not self._total:
            return pace.every
        return min(pace.every, math.ceil((self._total - self.merged) / (self._pushes_per_merge() * pace.tokens_per_step)))


def mean_of(pushes: Sequence[Push], shares: Tensor) -> Tensor:
    """[numel] sum of shares[i] times the values of push i."""
    values = torch.stack([push.values for push in pushes])
    return values.mul_(shares.to(values.dtype)[:, None]).sum(0)


def shares_of(weights: Sequence[float]) -> Tensor | None:
    """[n] weights >= 0 -> [n] float64 that sum to 1; None if all of them weigh nothing."""
    most = max(weights)
    if most <= 0:
        return None
    scaled = torch.tensor(weights, dtype=torch.float64) / most  # the sum of finite weights might be none
    return scaled / scaled.sum()
