"""What both mergers keep: the lock, the weights, who lives, how far each worker is, and how much is left (`merger`)."""

import math
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from thinwire.config.replicas import DiLoCo, Gradients, Service
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
        self._started = False
        self._deadline = math.inf
        """When those who wait must look again."""

    @property
    def started(self) -> bool:
        """The first workers are all there, or were."""
        return self._started

    @property
    def over(self) -> bool:
        """All tokens that were agreed on are merged."""
        return 0 < self._total <= self.merged

    def initialise(self, values: Tensor, spans: Sequence[Span]) -> None:
        """The weights of the first worker that comes; those of later ones are not needed."""
        with self.changed:
            if self.weights is None:
                self.weights = Weights(self._config, values, spans)

    def push(self, push: Push) -> None:
        """Take it in, unless it comes too late: from a life that was given up, or when the run is over."""
        with self.changed:
            if push.member not in self.live:
                return  # a new life will do it again
            if self.over:
                self.late[push.member.name] = self.late.get(push.member.name, 0) + push.local_steps
                return
            self.steps[push.member.name] += push.local_steps
            self._take(push)
            self.changed.notify_all()

    def admit(self, member: Member, patience_s: float) -> Standing | None:
        """Wait until the worker may go on; None if that takes longer than patience_s. One that is lost may, to no effect."""
        with self.changed:
            end = time.monotonic() + patience_s
            while member in self.live and not self.over and not (self.started and self._may_go_on(member)):
                now = time.monotonic()
                if now >= end:
                    return None
                self.changed.wait(max(0.0, min(end, self._deadline) - now))
                self._look()
            assert self.weights is not None, "a worker gives the weights before it asks for them"
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

    def state_dict(self) -> dict[str, Any]:
        """Weights, moments, versions, tokens, and how far each worker was."""
        with self.changed:
            weights = self.weights.state_dict() if self.weights else None
            return {"version": self.version, "merged": self.merged, "steps": dict(self.steps), "weights": weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Before the first worker."""
        self.version, self.merged, self.steps = state["version"], state["merged"], dict(state["steps"])
        self.weights = Weights.of(self._config, state["weights"])

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
        if len(self.live) >= self._awaited:
            self._started = True
        self.changed.notify_all()

    def _local_steps(self, member: Member) -> int:
        pace = self._paces[member]
        if self.over:
            return 0
        if not self._total:
            return pace.every
        return min(pace.every, math.ceil((self._total - self.merged) / (self._pushes_per_merge() * pace.tokens_per_step)))
