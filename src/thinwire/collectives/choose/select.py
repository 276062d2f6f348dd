"""The candidates with their predicted seconds, the best first.

Each is estimated in every number of segments (`estimate`). Of one algorithm the best number stays, and the fewest segments that
are estimated less than THRIFT above it, since processors may be slower than thought; of all together the SIMULATED best, as far
as they are among the first few or estimated below FAR times the best. These, and the native ones, are simulated.

Less than TIE apart is the same: then the backend's own is the better one, and after it the one with the fewest steps (where
processors are busy every step waits for the slowest rank), and of these the one with the fewest messages.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from operator import itemgetter

from thinwire.cluster import Link
from thinwire.collectives.choose.call import CollectiveCall
from thinwire.collectives.choose.candidates import Candidate, candidates_for
from thinwire.collectives.choose.costs import Costs
from thinwire.collectives.choose.estimate import estimate
from thinwire.collectives.choose.native import closed_form_s, simulate_native
from thinwire.collectives.choose.simulate import Simulated, simulate
from thinwire.collectives.synthesis.bounds import Bound, bound

SIMULATED = 12
FAR = 1.5
_FEW = 4
TIE = 0.02
NEAR = 1.1
THRIFT = 0.05


@dataclass(frozen=True, slots=True)
class Priced:
    """run: what the simulation found; None for a native collective of too many messages, of which only the seconds are known."""

    candidate: Candidate
    seconds: float
    run: Simulated | None

    @property
    def link_bytes(self) -> Mapping[Link, int]:
        return self.run.link_bytes if self.run else {}

    @property
    def why(self) -> str:
        return self.run.why if self.run else "the fullest link, and latency in each step (closed form)"


@dataclass(frozen=True)
class Selection:
    """ranking: by seconds; estimated: how many candidates there were, segments counted; left_out: what was not made, and why."""

    call: CollectiveCall
    ranking: tuple[Priced, ...]
    estimated: int
    left_out: tuple[str, ...]

    @property
    def best(self) -> Priced:
        return self.promising[0]

    @cached_property
    def promising(self) -> tuple[Priced, ...]:
        """The ranking, but with those that are as good as the best in the order that the top of the file gives.

        Second comes the one with the fewest steps of all below NEAR times the best: steps cost more where ranks are busy.
        """
        efforts, least_s = [_effort(one) for one in self.ranking], self.ranking[0].seconds
        close = sum(one.seconds <= least_s * (1 + TIE) for one in self.ranking)
        near = sum(one.seconds <= least_s * NEAR for one in self.ranking)
        order = sorted(range(close), key=efforts.__getitem__) + list(range(close, len(efforts)))
        plain = min(range(near), key=efforts.__getitem__)
        if plain >= close:
            order.remove(plain)
            order.insert(1, plain)
        return tuple(self.ranking[place] for place in order)

    @cached_property
    def bound(self) -> Bound:
        """Below which no schedule can be."""
        return bound(self.call.cluster, self.call.op, self.call.message_bytes, self.call.root)

    @property
    def native(self) -> Priced:
        return next(one for one in self.ranking if one.candidate.name == "native")

    @property
    def runner_up(self) -> Priced | None:
        """The best one with another algorithm than the best."""
        return next((one for one in self.ranking if one.candidate.name != self.best.candidate.name), None)


def _effort(one: Priced) -> tuple[int, int]:
    schedule, run = one.candidate.schedule, one.run
    return (len(schedule.steps), len(run.transfers)) if schedule and run else (0, 0)


def choose(call: CollectiveCall, costs: Costs | None = None) -> Selection:
    """All candidates for `call`, ranked; default: the costs that were measured on loopback."""
    costs = costs or Costs()
    offered, left_out = candidates_for(call)
    priced = []
    for one in offered:
        if one.model is None:
            found = simulate_native(call, one.order, costs)
            priced.append(Priced(one, found.seconds if found else closed_form_s(call, one.order), found))
    for one in _promising(offered, call, costs):
        assert one.schedule is not None
        run = simulate(one.schedule, call.message_bytes, call.routes, costs)
        priced.append(Priced(one, run.seconds, run))
    # Of equal ones the first: native before ours, few segments before many.
    ranking = tuple(sorted(priced, key=lambda one: one.seconds))
    return Selection(call, ranking, len(offered), tuple(left_out))


def _promising(offered: Sequence[Candidate], call: CollectiveCall, costs: Costs) -> list[Candidate]:
    kept: list[tuple[float, Candidate]] = []
    for model, group in groupby(offered, key=lambda one: one.model):
        if model is None:
            continue
        seconds = estimate(model, call, costs)
        estimated = [(seconds(one.segments), one) for one in group]
        best = min(estimated, key=itemgetter(0))
        fewest = min((pair for pair in estimated if pair[0] <= best[0] * (1 + THRIFT)), key=lambda pair: pair[1].segments)
        kept += [best] if fewest is best else [best, fewest]
    first = sorted(kept, key=itemgetter(0))[:SIMULATED]
    return [one for place, (estimate_s, one) in enumerate(first) if place < _FEW or estimate_s <= FAR * first[0][0]]
