"""What both mergers keep: the lock, the weights, who lives, how far each worker is, and how much is left (`merger`)."""

import math
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from thinwire.config.replicas import DiLoCo, Gradients, Service
from thinwire.sync.server.checks import wrong_with_push, wrong_with_start
from thinwire.sync.server.members import Member
from thinwire.sync.server.merger import Pace, Push, Standing
from thinwire.sync.server.ranges import Span
from thinwire.sync.server.weights import Weights


class Lives(ABC):
    """Base of the mergers."""

    def __init__(self, service: Service) -> None:
        self.changed = threading.Condition()
        self.version = 0
        self.merged = 0.0
        self.late: dict[str, int] = {}
        self.weights: Weights | None = None
        self.steps: dict[str, int] = {}
        """By worker's name, over all its lives."""
        self.live: set[Member] = set()
        self._paces: dict[Member, Pace] = {}
        self._config: Gradients | DiLoCo = service.merge
        self._awaited, self._total = service.first_workers, service.total_tokens
        self.keep_every = 0
        self._due: dict[str, Any] | None = None
        self._model = 0
        self._given = False
        """Somebody has these weights."""
        self._deadline = math.inf
        """When those who wait must look again."""

    @property
    def started(self) -> bool:
        """The first workers are all there, or were."""
        return len(self.steps) >= self._awaited

    @property
    def over(self) -> bool:
        """All tokens that were agreed on are merged."""
        return 0 < self._total <= self.merged

    def initialise(self, values: Tensor, spans: Sequence[Span], model: int = 0) -> str | None:
        """The first weights, in place of any that nobody has been given yet. Returns the reason if they are refused."""
        with self.changed:
            if self._given or self.version:
                return f"first weights for a server whose weights are in use, at version {self.version}"
            wrong = wrong_with_start(values, spans)
            if wrong:
                return wrong
            self.weights, self._model = Weights(self._config, values, spans), model
            self._made()
            self.changed.notify_all()
            return None

    def push(self, push: Push) -> str | None:
        """Take it in, unless it comes too late: from a life that was given up, or when the run is over."""
        with self.changed:
            if push.member not in self.live:
                return None  # a new life will do it again
            if self.weights is None:
                return "a push to servers that have no weights yet; join first"
            wrong = wrong_with_push(push, self.weights.values.numel(), self.version)
            if wrong:
                return wrong
            if self.over:
                self.late[push.member.name] = self.late.get(push.member.name, 0) + push.local_steps
                return None
            self.steps[push.member.name] += push.local_steps
            self._take(push)
            self.changed.notify_all()
            return None

    def admit(self, member: Member, patience_s: float) -> Standing | None:
        """Wait until the worker may go on; None if that takes longer than patience_s. One that is lost may, to no effect."""
        with self.changed:
            end = time.monotonic() + patience_s
            while member in self.live and (self.weights is None or not (self.over or self._lets_go_on(member))):
                now = time.monotonic()
                if now >= end:
                    return None
                self.changed.wait(max(0.0, min(end, self._deadline) - now))
                self._look()
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

    def lost(self, member: Member) -> None:
        """A merge may be due without it."""
        with self.changed:
            self.live.discard(member)
            self._look()
            self.changed.notify_all()

    def never_comes(self, name: str) -> None:
        """Nobody waits for the first life of this name. Nothing if it has joined."""
        with self.changed:
            self.steps.setdefault(name, 0)
            self._look()
            self.changed.notify_all()

    def due(self, patience_s: float = 0.0) -> dict[str, Any] | None:
        """The snapshot that is to be written; None if there is none for so long."""
        with self.changed:
            self.changed.wait_for(lambda: self._due is not None, patience_s)
            return self._due

    def written(self, state: dict[str, Any]) -> None:
        """That snapshot is on the disk; another may be due meanwhile."""
        with self.changed:
            if self._due is state:
                self._due = None
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
    def not_before(self, member: Member, version: int) -> None:
        """One that has just come goes on with this version, if others make it."""

    @abstractmethod
    def _take(self, push: Push) -> None:
        """Under the lock: a push that counts."""

    @abstractmethod
    def _look(self) -> None:
        """Under the lock: merge if it is due."""

    @abstractmethod
    def _may_go_on(self, member: Member) -> bool:
        """Under the lock."""

    @abstractmethod
    def _pushes_per_merge(self) -> int:
        """Under the lock: among so many what is left is shared."""

    def _born(self, member: Member, pace: Pace) -> None:
        self.live.add(member)
        self._paces[member] = pace
        self.changed.notify_all()

    def _made(self) -> None:
        """Under the lock: this version is there; if it is one to be kept, copy it now."""
        if self.keep_every and self.version % self.keep_every == 0:
            self._due = self.state_dict()

    def _lets_go_on(self, member: Member) -> bool:
        return self.started and self._due is None and self._may_go_on(member)

    def _local_steps(self, member: Member) -> int:
        pace = self._paces[member]
        if self.over:
            return 0
        if not self._total:
            return pace.every
        return min(pace.every, math.ceil((self._total - self.merged) / (self._pushes_per_merge() * pace.tokens_per_step)))
