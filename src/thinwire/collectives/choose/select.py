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

from thinwire.cluster import Cluster, Link
from thinwire.collectives.choose.candidates import Candidate, Offers, offers
from thinwire.collectives.choose.costs import Costs
from thinwire.collectives.choose.estimate import Profile, profile
from thinwire.collectives.choose.native import closed_form_s, simulate_native
from thinwire.collectives.choose.question import Question, question
from thinwire.collectives.choose.simulate import Simulated, simulate

SIMULATED = 12
FAR = 1.5
_FEW = 4

_Estimated = tuple[float, Candidate]
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
        """Payload bytes on each link."""
        return self.run.link_bytes if self.run else {}

    @property
    def why(self) -> str:
        """What decides its seconds."""
        return self.run.why if self.run else "the fullest link, and latency in each step (closed form)"


@dataclass(frozen=True)
class Selection:
    """ranking: by seconds; estimated: how many candidates there were, segments counted; left_out: what was not made, and why."""

    asked: Question
    ranking: tuple[Priced, ...]
    estimated: int
    left_out: tuple[str, ...]

    @property
    def best(self) -> Priced:
        """What should run."""
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

    @property
    def native(self) -> Priced:
        """The backend's own collective as it is."""
        return next(one for one in self.ranking if one.candidate.name == "native")

    @property
    def runner_up(self) -> Priced | None:
        """The best one with another algorithm than the best."""
        return next((one for one in self.ranking if one.candidate.name != self.best.candidate.name), None)


def _effort(one: Priced) -> tuple[int, int]:
    """Steps and messages of ours."""
    schedule, run = one.candidate.schedule, one.run
    return (len(schedule.steps), len(run.transfers)) if schedule and run else (0, 0)


def select(
    cluster: Cluster,
    op: str,
    message_bytes: int,
    ranks: Sequence[int] | None = None,
    root: int = 0,
    costs: Costs | None = None,
) -> list[Priced]:
    """For the group of the global ranks `ranks` (default: all), root a position in it; sorted by predicted seconds."""
    return list(choose(question(cluster, op, message_bytes, ranks, root), costs).ranking)


def choose(asked: Question, costs: Costs | None = None) -> Selection:
    """The same, with what was looked at."""
    costs = costs or Costs()
    offered = offers(asked)
    priced = [_native(one, asked, costs) for one in offered.candidates if one.model is None]
    for one in _promising(offered, asked, costs):
        assert one.schedule is not None
        run = simulate(one.schedule, asked.message_bytes, asked.routes, costs)
        priced.append(Priced(one, run.seconds, run))
    # Of equal ones the first: native before ours, few segments before many.
    ranking = tuple(sorted(priced, key=lambda one: one.seconds))
    return Selection(asked, ranking, len(offered.candidates), offered.left_out)


def _native(candidate: Candidate, asked: Question, costs: Costs) -> Priced:
    run = simulate_native(asked, candidate.order, costs)
    return Priced(candidate, run.seconds if run else closed_form_s(asked, candidate.order), run)


def _promising(offered: Offers, asked: Question, costs: Costs) -> list[Candidate]:
    by_name: dict[str, list[_Estimated]] = {}
    profiles: dict[str, Profile] = {}
    for one in offered.candidates:
        if one.model is not None:
            if one.name not in profiles:
                profiles[one.name] = profile(one.model, asked, costs)
            by_name.setdefault(one.name, []).append((profiles[one.name].seconds(one.segments), one))
    kept = [pair for pairs in by_name.values() for pair in _best_and_fewest(pairs)]
    best = sorted(kept, key=_first)[:SIMULATED]
    return [one for place, (seconds, one) in enumerate(best) if place < _FEW or seconds <= FAR * best[0][0]]


def _best_and_fewest(pairs: list[_Estimated]) -> list[_Estimated]:
    best = min(pairs, key=_first)
    fewest = min((pair for pair in pairs if pair[0] <= best[0] * (1 + THRIFT)), key=lambda pair: pair[1].segments)
    return [best] if fewest is best else [best, fewest]


def _first(pair: _Estimated) -> float:
    return pair[0]
