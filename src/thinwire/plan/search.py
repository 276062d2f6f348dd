"""The plans that nothing beats: of all candidates those with no other that is as fast and needs no more memory. What a run costs
goes with its time on given hosts; fewer hosts are another search.

Best first: drafts, without what replicas exchange, and plans wait together in the order of their bounds (`price.least_s`, times
their tokens); of a draft come its plans, of a plan its price. It is over when all that wait have a bound above FAR times the
fastest plan. Not priced is a plan whose bound is above the fastest, by more than TIE, and above one that needs no more memory;
nor one that computes activations again where it would fit without. So the plans that nothing beats, and the one that is chosen,
are those that pricing everything would find, which a test holds.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from heapq import heapify, heappop, heappush
from math import prod

from thinwire.errors import UserError
from thinwire.plan.candidates import Candidate, Problem, drafts, variants
from thinwire.plan.price import Least, Priced, Unfit, draft_s, least_s, least_with_exchange_s, memory_of, of_tokens, price
from thinwire.units import show

REFINED, WORTH = 4, 0.05
"""Usually so many plans are priced with chosen collectives too, of those that spend so much of a step in exchanges."""
TIE = 0.01
FAR = 1.25
"""Plans slower than so many times the fastest are of no use, however little memory they need."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """ranking: all that were priced, the fastest first; front: those of them that no other beats; considered: candidates; unfit:
    how many of the priced ones do not fit."""

    ranking: tuple[Priced, ...]
    front: tuple[Priced, ...]
    considered: int
    unfit: int

    @property
    def best(self) -> Priced:
        """Of those that are no more than TIE slower than the fastest the one that sends least: predictions know no better."""
        near = (one for one in self.ranking if one.time_s <= (1 + TIE) * self.ranking[0].time_s)
        return min(near, key=lambda one: one.wire_bytes / one.tokens_per_step)


def search(problem: Problem, tell: Callable[[int, int], None] = lambda done, of: None, refined: int = REFINED) -> Found:
    """UserError if nothing fits, with what comes nearest. tell(done, of): of drafts, now and then. refined: so many plans are
    priced with chosen collectives too."""
    first = list(drafts(problem))
    waiting = [(_steps(one, problem) * least_s(one, problem), number, -1, one) for number, one in enumerate(first)]
    heapify(waiting)
    priced: list[Priced] = []
    front: list[Priced] = []
    fastest_s, reason, considered, done = float("inf"), "", 0, 0
    unfit: dict[int, Unfit] = {}
    while waiting and waiting[0][0] <= FAR * fastest_s:
        bound_s, number, of_draft, one = heappop(waiting)
        try:
            if of_draft < 0:
                done += 1
                if done % 64 == 0:
                    tell(done, len(first))
                if one.recompute != "none" and _fits(replace(one, recompute="none"), problem):
                    continue
                least = draft_s(one, problem)
                for whole in variants(problem, one):
                    considered += 1
                    bound_s = _steps(whole, problem) * max(least, least_with_exchange_s(whole, problem))
                    if bound_s <= FAR * fastest_s:
                        heappush(waiting, (bound_s, len(first) + considered, number, whole))
                continue
            if of_draft in unfit:  # however they exchange
                continue
            if bound_s > (1 + TIE) * fastest_s and _beaten(bound_s, memory_of(one, problem)[0], front):
                continue
            found = price(one, problem)
        except Unfit as error:
            unfit[number if of_draft < 0 else of_draft] = error
        except UserError as error:
            reason = reason or str(error)
        else:
            priced.append(found)
            if not _beaten(found.time_s, found.memory_bytes, front):
                front = [old for old in front if old.time_s < found.time_s or old.memory_bytes < found.memory_bytes] + [found]
            fastest_s = min(fastest_s, found.time_s)
    if not priced:
        raise UserError(f"{problem.cluster.name}: no plan of {len(first)} fits; {_advice(problem, list(unfit.values()), reason)}")
    priced += _refined(problem, priced, refined)
    ranking = tuple(sorted(priced, key=lambda one: one.time_s))
    front.sort(key=lambda one: one.time_s)
    return Found(ranking=ranking, front=tuple(front), considered=considered, unfit=len(unfit))


def _fits(draft: Candidate, problem: Problem) -> bool:
    try:
        memory_of(draft, problem)
    except UserError:
        return False
    return True


def _refined(problem: Problem, priced: Sequence[Priced], most: int) -> Iterator[Priced]:
    """The fastest that spend time in exchanges, with collectives that fit the network, of which each takes long to price; not
    those that would be too slow if they took as little as any schedule can."""
    if problem.rates is None or "collectives.kind" in problem.kept or len(problem.cluster.hosts) < 2:
        return
    best: dict[object, Priced] = {}
    for one in sorted(priced, key=lambda one: one.time_s):
        layout = one.candidate.layout
        if layout.tensor == layout.shard == 1 and layout.replicas > 2 and one.terms["exchange"] > WORTH * one.step_s:
            best.setdefault((layout, one.candidate.sync, one.candidate.codec), one)
    fastest_s, least = min(one.time_s for one in priced), Least(problem.numbered)
    for one in list(best.values())[:most]:
        unhindered_s = one.time_s * (1 - one.terms["exchange"] / one.step_s)
        if unhindered_s < fastest_s and price(one.candidate, problem, least).time_s < fastest_s:
            found = price(replace(one.candidate, collectives="priced"), problem)
            fastest_s = min(fastest_s, found.time_s)
            yield found


def _steps(candidate: Candidate, problem: Problem) -> float:
    """To the tokens that it needs; of a draft, at the least."""
    more = prod(of_tokens(candidate, problem).values())
    return problem.tokens * more / (candidate.sequences * problem.config.train.sequence)


def _beaten(time_s: float, memory_bytes: float, front: Sequence[Priced]) -> bool:
    return any(one.time_s <= time_s and one.memory_bytes <= memory_bytes for one in front)


def _advice(problem: Problem, unfit: Sequence[Unfit], reason: str) -> str:
    if not unfit:
        return reason or "change what --set keeps, or --batch"
    nearest, whole = min(unfit, key=lambda one: one.times), 16.0 * problem.parameters
    return (
        f"nearest is {nearest}; weights, gradients and optimizer alone are {show(whole, 'B')} in all: take a smaller model, more "
        "devices, or --beyond"
    )
