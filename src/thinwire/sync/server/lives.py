"""What both mergers keep: the lock, the weights, who lives, and how far each worker is."""

import threading
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from thinwire.config.replicas import DiLoCo, Gradients, Service
from thinwire.sync.server.members import Member
from thinwire.sync.server.ranges import Span
from thinwire.sync.server.weights import Weights


class Lives:
    """Base of the mergers."""

    def __init__(self, service: Service) -> None:
        self.changed = threading.Condition()
        self.version = 0
        self.weights: Weights | None = None
        self.steps: dict[str, int] = {}
        """By worker's name, over all its lives."""
        self.live: set[Member] = set()
        self._config: Gradients | DiLoCo = service.merge
        self._awaited = service.first_workers
        self._started = False

    @property
    def started(self) -> bool:
        """The first workers are all there, or were."""
        return self._started

    def initialise(self, values: Tensor, spans: Sequence[Span]) -> None:
        """The weights of the first worker that comes; those of later ones are not needed."""
        with self.changed:
            if self.weights is None:
                self.weights = Weights(self._config, values, spans)

    def _born(self, member: Member) -> None:
        self.live.add(member)
        if len(self.live) >= self._awaited:
            self._started = True
        self.changed.notify_all()

    def _copy(self, member: Member) -> tuple[Tensor, int, int]:
        assert self.weights is not None, "a worker gives the weights before it asks for them"
        return self.weights.values.clone(), self.version, self.steps[member.name]

    def state_dict(self) -> dict[str, Any]:
        """Weights, moments, versions, and how far each worker was."""
        with self.changed:
            weights = self.weights.state_dict() if self.weights else None
            return {"version": self.version, "steps": dict(self.steps), "weights": weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Before the first worker."""
        self.version, self.steps = state["version"], dict(state["steps"])
        self.weights = Weights.of(self._config, state["weights"])
