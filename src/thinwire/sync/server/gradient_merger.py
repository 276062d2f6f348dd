"""Pushed gradients: sequential, bounded delay, eventual (Li et al., OSDI 2014, section 3.4).

A worker that has pushed s gradients asks for weights to compute gradient s. With s_min the least over all live workers, and t the
delay,

    it may go on when  s - s_min <= t       t = 0: sequential; t = -1 stands for infinity: eventual

    t = 0    step s is one optimizer step with the mean of all live workers' gradients of that step, weighted by their samples:
             the mathematics of data parallelism; where they name different learning rates, at the mean of these, weighted alike
    else     each gradient is an optimizer step as it comes, at 1 / (number of live workers) of the learning rate, so that the
             weights go about as far when everybody has pushed once

A worker that dies is not waited for; what it has pushed counts, in the next step that a live one takes part in. One that comes
begins at the step of the slowest. Gradients of no samples make no step of the optimizer, and count as one. The run is over
when its tokens are merged (`merger`): while a worker is away, a step has fewer of them, and there are more steps.
"""

from thinwire.config.replicas import Gradients, Service
from thinwire.sync.server.merger import Member, Merger, Pace, Push, Standing, mean_of, shares_of

EVENTUAL = -1


class GradientMerger(Merger):
    """See the top of the file."""

    def __init__(self, service: Service) -> None:
        super().__init__(service)
        assert isinstance(service.merge, Gradients)
        self._delay = service.merge.delay
        self.furthest_ahead = 0
        """The most steps by which a worker that was admitted was ahead of the slowest live one."""

    def begin(self, member: Member, pace: Pace) -> int:
        """Sequential: the step that is being collected. Bounded: that of the slowest. Eventual: where it was before."""
        with self.changed:
            others = [self.steps[other.name] for other in self.live if other.name != member.name]
            if self._delay == 0:
                self.steps[member.name] = self.version
            elif self._delay > 0 and others:
                self.steps[member.name] = min(others)
            else:
                self.steps.setdefault(member.name, 0)
            self._admit_new(member, Pace(every=1, tokens_per_step=pace.tokens_per_step))
            return self.steps[member.name]

    def admit(self, member: Member, patience_s: float) -> Standing | None:
        """Wait as long as the delay asks for it."""
        with self.changed:
            standing = super().admit(member, patience_s)
            if standing is not None and member in self.live:
                self.furthest_ahead = max(self.furthest_ahead, self._ahead(member))
            return standing

    def _take(self, push: Push) -> None:
        """Sequential: collect it. Else: one step of the optimizer."""
        if self._delay == 0:
            self._pending.append(push)
            self._merge_if_due()
        else:
            gradient = push.values if push.weight else None
            self._step(gradient, self._rate(push) / len(self.live), push.weight)
            self._snapshot_if_due()

    def _may_go_on(self, member: Member) -> bool:
        if self._delay == 0:
            return self.version >= self.steps[member.name]
        return self._delay == EVENTUAL or self._ahead(member) <= self._delay

    def _pushes_per_merge(self) -> int:
        return 1  # a push is one step, so there is nothing to share

    def _ahead(self, member: Member) -> int:
        """Steps before the slowest live worker."""
        return self.steps[member.name] - min(self.steps[other.name] for other in self.live)

    def _merge_if_due(self) -> None:
        if not self.live or not self._pending or not self.started or not {push.member for push in self._pending} >= self.live:
            return
        pushes = sorted(self._pending, key=lambda push: push.member)  # the sum must not depend on who was first
        shares = shares_of([push.weight for push in pushes])
        self._pending = []
        mean, rate = None, 0.0
        if shares is not None:
            mean = mean_of(pushes, shares)
            rates = [self._rate(push) for push in pushes]
            alike = min(rates) == max(rates)
            rate = rates[0] if alike else sum(r * s for r, s in zip(rates, shares.tolist(), strict=True))
        self._step(mean, rate, sum(push.weight for push in pushes))
        self._snapshot_if_due()

    def _rate(self, push: Push) -> float:
        return self._config.learning_rate if push.learning_rate is None else push.learning_rate
