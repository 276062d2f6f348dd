"""Pushed distances: asynchronous DiLoCo with a quorum (after Decoupled DiLoCo, 2026).

A replica takes the weights w of version a, trains alone for H steps to w', and pushes D = w - w'. With L live replicas and a
quorum K,

    merge   once min(K, L) pushes are there, and then as soon as all L are, or `grace_s` has passed
    D       = sum_i c_i D_i / sum_i c_i       c_i = tokens_i^2 / steps_i  (or tokens_i, or 1); all 0: nothing moves
    w       one Nesterov step with D (`weights`)

A push that comes later is part of the next merge; its staleness is the number of merges made since version a. The replica waits
for the merge that holds its push, and goes on from its result: with K = L that is DiLoCo, with K = 1 nobody waits for anybody.
A replica that is lost is not waited for; what it has pushed is in the next merge, but the quorum counts pushes of live replicas
only, so that the dead stand in for nobody who lives; what it has not pushed is gone. One that comes, or comes back, takes
the weights of the next merge and goes on from there: nobody waits for it meanwhile, and it repeats no rounds that it has missed.
Where several servers would take it in a merge apart, those behind make that merge without it, so that it begins at one version.
The run is over when its tokens are merged (`merger`). Steps are counted by name for the data only: another life begins behind the
last push.
"""

import math
import time
from dataclasses import dataclass
from typing import Any

from thinwire.config.replicas import DiLoCo, Service
from thinwire.sync.server.merger import Member, Merger, Pace, Push, mean_of, shares_of


@dataclass(frozen=True, slots=True)
class Merge:
    """One outer step: who was in it, how stale each was, and its part of the mean."""

    version: int
    workers: list[str]
    staleness: list[int]
    shares: list[float]


class DiLoCoMerger(Merger):
    """See the top of the file."""

    def __init__(self, service: Service) -> None:
        super().__init__(service)
        assert isinstance(service.merge, DiLoCo)
        self._diloco = service.merge
        self._next_round: set[Member] = set()
        """Those who have joined while a merge was under way."""
        self.merges: list[Merge] = []

    def begin(self, member: Member, pace: Pace) -> int:
        """Where an earlier life of this name was."""
        with self.changed:
            if self.started and self._awaited_now():
                self._next_round.add(member)
            self.steps.setdefault(member.name, 0)
            self._admit_new(member, Pace(every=pace.every or self._diloco.every, tokens_per_step=pace.tokens_per_step))
            return self.steps[member.name]

    def not_before(self, member: Member, version: int) -> None:
        """A merge that others are at is made without it."""
        with self.changed:
            if member in self.live and self.version < version and self._awaited_now() - {member}:
                self._next_round.add(member)
                self._merge_if_due()
                self.changed.notify_all()

    def _awaited_now(self) -> set[Member]:
        """Those whose push this merge waits for, or has."""
        return self.live - self._next_round

    def _take(self, push: Push) -> None:
        self._pending.append(push)
        self._merge_if_due()

    def _may_go_on(self, member: Member) -> bool:
        return member not in self._next_round and not any(push.member == member for push in self._pending)

    def _pushes_per_merge(self) -> int:
        awaited = max(1, len(self._awaited_now()))
        return min(self._diloco.quorum or awaited, awaited)

    def _merge_if_due(self) -> None:
        awaited = self._awaited_now()
        if not awaited:
            self._next_round.clear()  # nobody is left whose merge they could wait for
        there = awaited & {push.member for push in self._pending}
        if len(there) < self._pushes_per_merge():
            return
        if there == awaited:
            self._merge()
        elif self._deadline == math.inf:
            self._deadline = time.monotonic() + self._diloco.grace_s
            self.changed.notify_all()  # those who wait must wait no longer than until then
        if time.monotonic() >= self._deadline:
            self._merge()

    def _merge(self) -> None:
        pushes = sorted(self._pending, key=lambda push: push.member)  # the sum must not depend on who was first
        most = max(push.weight for push in pushes) or 1.0
        shares = shares_of([self._weight(push, most) for push in pushes])
        names = [push.member.name for push in pushes]
        staleness = [self.version - push.version for push in pushes]
        self.merges.append(Merge(self.version, names, staleness, [0.0] * len(pushes) if shares is None else shares.tolist()))
        mean = None if shares is None else mean_of(pushes, shares)
        self._step(mean, self._diloco.learning_rate, sum(push.weight for push in pushes))
        self._pending, self._deadline = [], math.inf
        self._next_round.clear()
        self._snapshot_if_due()
        self.changed.notify_all()

    def _weight(self, push: Push, most: float) -> float:
        """most: tokens of the heaviest push; relative to them, so that no square is infinite."""
        match self._diloco.weighting:
            case "tokens_squared_per_step":
                return (push.weight / most) ** 2 / push.local_steps
            case "tokens":
                return push.weight / most
        return 1.0

    def state_dict(self) -> dict[str, Any]:
        """Pushes that wait for a quorum are not in it: their replicas' steps are not counted either."""
        with self.changed:
            state = super().state_dict()
            for push in self._pending:
                state["steps"][push.member.name] -= push.local_steps
            return state
