"""Pushed distances: asynchronous DiLoCo with a quorum (after Decoupled DiLoCo, 2026).

A replica takes the weights w of version a, trains alone for H steps to w', and pushes D = w - w'. With L live replicas and a
quorum K,

    merge   once min(K, L) pushes are there, and then as soon as all L are, or `grace_s` has passed
    D       = sum_i c_i D_i / sum_i c_i       c_i = tokens_i^2 / steps_i  (or tokens_i, or 1)
    w       one Nesterov step with D (`weights`)

A push that comes later is part of the next merge; its staleness is the number of merges made since version a. The replica waits
for the merge that holds its push, and goes on from its result: with K = L that is DiLoCo, with K = 1 nobody waits for anybody.
A replica that is lost is not waited for; what it has pushed counts. Its steps are counted by name, so another life goes on there.
"""

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from thinwire.config.replicas import DiLoCo, Service
from thinwire.sync.server.lives import Lives
from thinwire.sync.server.members import Member
from thinwire.sync.server.merger import Push


@dataclass(frozen=True, slots=True)
class Merge:
    """One outer step: who was in it, how stale each was, and its part of the mean."""

    version: int
    workers: list[str]
    staleness: list[int]
    shares: list[float]


class DiLoCoMerger(Lives):
    """See the top of the file, and `thinwire.sync.server.merger.Merger`."""

    def __init__(self, service: Service) -> None:
        super().__init__(service)
        assert isinstance(service.merge, DiLoCo)
        self._diloco = service.merge
        self._pending: list[Push] = []
        self._deadline: float | None = None
        self.merges: list[Merge] = []

    def begin(self, member: Member) -> int:
        """Where an earlier life of this name was."""
        with self.changed:
            self.steps.setdefault(member.name, 0)
            self._born(member)
            return self.steps[member.name]

    def push(self, push: Push) -> None:
        """Collect it."""
        with self.changed:
            if push.member not in self.live:
                return
            self.steps[push.member.name] += push.local_steps
            self._pending.append(push)
            self._merge_if_due()

    def admit(self, member: Member) -> tuple[Tensor, int, int]:
        """Wait until what it has pushed is merged."""
        with self.changed:
            self.changed.wait_for(lambda: member not in self.live or self.started)
            while member in self.live and any(push.member == member for push in self._pending):
                self.changed.wait(None if self._deadline is None else max(0.0, self._deadline - time.monotonic()))
                self._merge_if_due()
            return self._copy(member)

    def lost(self, member: Member) -> None:
        """The quorum may be there without it."""
        with self.changed:
            self.live.discard(member)
            self._merge_if_due()
            self.changed.notify_all()

    def _merge_if_due(self) -> None:
        there = {push.member for push in self._pending}
        quorum = min(self._diloco.quorum or len(self.live), len(self.live))
        if not there or len(there) < quorum:
            return
        if there >= self.live:
            self._merge()
        elif self._deadline is None:
            self._deadline = time.monotonic() + self._diloco.grace_s
            self.changed.notify_all()  # those who wait must wait no longer than until then
        if self._deadline is not None and time.monotonic() >= self._deadline:
            self._merge()

    def _merge(self) -> None:
        assert self.weights is not None, "a worker gives the weights before it pushes"
        pushes = sorted(self._pending, key=lambda push: push.member)  # the sum must not depend on who was first
        shares = torch.tensor([self._weight(push) for push in pushes], dtype=torch.float64)
        shares = (shares / shares.sum()).float()
        mean = torch.stack([push.values for push in pushes]).mul_(shares[:, None]).sum(0)
        self.weights.step(mean, self._diloco.learning_rate)
        names = [push.member.name for push in pushes]
        staleness = [self.version - push.version for push in pushes]
        self.merges.append(Merge(self.version, names, staleness, shares.tolist()))
        self.version += 1
        self._pending, self._deadline = [], None
        self.changed.notify_all()

    def _weight(self, push: Push) -> float:
        match self._diloco.weighting:
            case "tokens_squared_per_step":
                return push.weight**2 / push.local_steps
            case "tokens":
                return push.weight
        return 1.0

    def state_dict(self) -> dict[str, Any]:
        """Pushes that wait for a quorum are not in it: their replicas' steps are not counted either."""
        with self.changed:
            state = super().state_dict()
            for push in self._pending:
                state["steps"][push.member.name] -= push.local_steps
            return state
