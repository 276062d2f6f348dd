"""Links chosen together with the layout, where hosts have a few ports each of a switch that can be rewired (TopoOpt, NSDI 2023).

In turns, until nothing changes: the best plan for the links that there are, then the cables that suit what this plan sends, made
better by swapping two of them as long as the plan's step gets shorter. Each turn is priced as `thinwire train` on those links.
"""

from collections import Counter
from dataclasses import dataclass, replace

from thinwire.cluster.ports import Cables, cables, swapped, wired
from thinwire.errors import UserError
from thinwire.plan.candidates import Candidate, Problem
from thinwire.plan.price import Priced, price
from thinwire.plan.queueing import messages
from thinwire.plan.search import search

TURNS = 6


@dataclass(frozen=True, kw_only=True)
class Rewired:
    """problem: on the cables; best: its plan; turns: how often both were chosen anew."""

    problem: Problem
    cables: Cables
    best: Priced
    turns: int


def rewired(problem: Problem, ports: int) -> Rewired:
    """UserError for clusters without compute rates, or too few ports."""
    if problem.rates is None:
        raise UserError("--ports wires hosts whose ranks are priced one by one; give devices flops_per_s, as cpu:10Gflop/s")
    hosts, seen = len(problem.cluster.hosts), list[Rewired]()
    taken = cables(hosts, ports, {})
    for turn in range(1, TURNS + 1):
        now = _on(problem, taken)
        seen.append(Rewired(problem=now, cables=taken, best=search(now, refined=0).best, turns=turn))
        plan = seen[-1].best.candidate
        taken = improved(problem, plan, cables(hosts, ports, sent(now, plan)), taken)
        if taken in [one.cables for one in seen]:
            break
    return min(seen, key=lambda one: one.best.time_s)


def improved(problem: Problem, plan: Candidate, *starts: Cables) -> Cables:
    """The better of the starts, cables swapped as long as the plan's step gets shorter."""
    best = min(starts, key=lambda one: price(plan, _on(problem, one)).step_s)
    best_s = price(plan, _on(problem, best)).step_s
    while True:
        step_s, found = min(((price(plan, _on(problem, one)).step_s, one) for one in swapped(best)), default=(best_s, best))
        if step_s >= best_s * (1 - 1e-9):
            return best
        best_s, best = step_s, found


def sent(problem: Problem, plan: Candidate) -> Counter[tuple[int, int]]:
    """Bytes of a step from one host to another, by number."""
    cluster, found = problem.cluster, Counter[tuple[int, int]]()
    number = {host.name: index for index, host in enumerate(cluster.hosts)}
    host_of = [number[cluster.host_of(rank).name] for rank in range(cluster.world_size)]
    for source, target, size, per_step in messages(*problem.outlined(plan)):
        found[host_of[source], host_of[target]] += size * per_step  # type: ignore[assignment]
    return found


def _on(problem: Problem, taken: Cables) -> Problem:
    return replace(problem, cluster=wired(problem.cluster, taken))
