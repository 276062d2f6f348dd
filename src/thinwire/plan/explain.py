"""Why a plan: what its step is made of, what limits it, what comes next and loses where, and what another cluster would bring.

Each question about another cluster is another search on it, so that its best plan is compared, not the same plan on other links.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from thinwire.cluster import Cluster, Device, Host, Quantity
from thinwire.errors import UserError
from thinwire.layout import Layout
from thinwire.plan.candidates import Candidate, Problem
from thinwire.plan.price import Priced, price
from thinwire.plan.search import Found, search
from thinwire.units import show

TIMES_FASTER = 10
MORE_HOSTS = 2
CLASSES = 3
"""Of rates of links: so many of the thinnest are asked about."""
FULL = 0.95
"""Part of the time from which on a link is in use always."""
ENOUGH = 1.1
"""One host is enough where all are no more than so many times as fast."""

Tell = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Explained:
    """plain: data parallelism that averages float32 gradients in each step, where that fits; one_host: the best on one alone.
    what_ifs: the best on other clusters, None if nothing fits there."""

    problem: Problem
    found: Found
    plain: Priced | None
    one_host: Priced | None
    what_ifs: Mapping[str, Priced | None]

    @property
    def best(self) -> Priced:
        """The plan."""
        one, best = self.one_host, self.found.best
        return one if one is not None and one.time_s <= best.time_s else best

    def lines(self) -> list[str]:
        """For people: one fact a line."""
        best = self.best
        low, high = best.interval_s
        within = f"80 % of measured steps lie within {show(low, 's')} and {show(high, 's')}"
        found = [f"a step: {waterfall(best)}; {within}", f"limited by: {limit(best)}"]
        if best.penalties:
            factors = " x ".join(f"{factor:.3f} ({name})" for name, factor in best.penalties.items())
            found.append(f"tokens to the same loss: {factors} times as many")
        other = next((one for one in self.found.ranking if family(one) != family(best) and one is not best), None)
        if other is not None:
            found.append(f"next best: {other.candidate}: {loses(other, best)}")
        if self.plain is not None and family(self.plain) != family(best):
            found.append(f"plain DDP: a step of {show(self.plain.step_s, 's')}, {slower(self.plain, best)}")
        elif self.plain is None:
            found.append("plain DDP: does not fit")
        if len(self.problem.cluster.hosts) > 1:
            found.append(self._one_host())
        for what, one in self.what_ifs.items():
            if one is None:
                found.append(f"{what}: nothing fits")
            elif (gain := best.time_s / one.time_s) < 1:
                found.append(f"{what}: no gain")
            else:
                found.append(f"{what}: {show_time(one.time_s)}, {gain:.2f} times as fast, by {one.candidate}")
        return found

    def _one_host(self) -> str:
        one, all_of_them = self.one_host, self.found.best
        hosts = len(self.problem.cluster.hosts)
        if one is None:
            return "one host alone: nothing fits there"
        times = one.time_s / all_of_them.time_s
        if times <= ENOUGH:
            return f"one host is enough: {show_time(one.time_s)} on it alone; all {hosts} take {show_time(all_of_them.time_s)}"
        return f"one host alone: {show_time(one.time_s)}; all {hosts} are {times:.2f} times as fast"

    def as_json(self) -> dict[str, Any]:
        """All of it, as numbers."""
        return {
            "cluster": self.problem.cluster.name,
            "parameters": self.problem.parameters,
            "tokens": self.problem.tokens,
            "considered": self.found.considered,
            "priced": len(self.found.ranking),
            "best": record(self.best),
            "front": [record(one) for one in self.found.front],
            "plain": record(self.plain) if self.plain else None,
            "one_host": record(self.one_host) if self.one_host else None,
            "what_if": {what: record(one) if one else None for what, one in self.what_ifs.items()},
            "why": self.lines(),
        }


def explain(problem: Problem, found: Found, *, asks: bool = True, tell: Tell = lambda done, of: None) -> Explained:
    """asks: also about one host and other clusters, which takes as many searches."""
    cluster = problem.cluster
    several = len(cluster.hosts) > 1
    questions: list[tuple[str, Cluster]] = []
    if asks and several:
        rates = sorted({link.bandwidth_bps.value for link in cluster.links})[:CLASSES]
        questions += [(f"{TIMES_FASTER} x the links of {show(rate, 'bit/s')}", faster(cluster, rate)) for rate in rates]
        questions.append((f"{MORE_HOSTS} more hosts", more_hosts(cluster)))
    return Explained(
        problem=problem,
        found=found,
        plain=plain(problem),
        one_host=_best(problem.on_hosts(1), tell) if several and asks else None,
        what_ifs={what: _best(replace(problem, cluster=other), tell) for what, other in questions},
    )


def _best(problem: Problem, tell: Tell) -> Priced | None:
    try:
        return search(problem, tell, refined=1).best
    except UserError:
        return None


def plain(problem: Problem) -> Priced | None:
    """What PyTorch's DistributedDataParallel would take with the given batch, in the largest micro-batches that fit."""
    world = problem.cluster.world_size
    each = max(1, round(problem.batch / world))
    for count in (count for count in range(1, each + 1) if each % count == 0):
        try:
            return price(Candidate(layout=Layout(data=world), micro_batch=each // count, accumulate=count), problem)
        except UserError:
            continue
    return None


def family(one: Priced) -> tuple[object, ...]:
    """Plans that differ in micro-batches or in how often they exchange are of one."""
    plan = one.candidate
    return one.hosts, plan.layout, plan.sync, plan.codec, plan.zero, plan.collectives


def waterfall(one: Priced) -> str:
    """Seconds by what they are spent on, the largest first."""
    parts = sorted(one.terms.items(), key=lambda item: -item[1])
    named = [f"{name} {show(value, 's')}" for name, value in parts if value > 0.001 * one.step_s]
    return f"{' + '.join(named)} = {show(one.step_s, 's')}"


def limit(one: Priced) -> str:
    """The largest part of a step but computing, with the link if it is one; computing where nothing else counts."""
    name, value = max(((name, value) for name, value in one.terms.items() if name != "computing"), key=lambda item: item[1])
    link, busy_s = one.busiest
    if busy_s > FULL * one.step_s:
        return f"{link}, in use all of the time"
    used = f"; {link} is in use {min(1.0, busy_s / one.step_s):.0%} of the time" if link else ""
    if value < 0.05 * one.step_s:
        return f"computing, {one.terms['computing'] / one.step_s:.0%} of the step{used}"
    return f"{name}, {value / one.step_s:.0%} of the step{used}"


def slower(one: Priced, best: Priced) -> str:
    """Than the best, all in all; which may be a little slower, and sends less."""
    near = ": as fast, as far as a prediction can tell, and it sends more" if one.time_s < best.time_s else ""
    return f"{show_time(one.time_s)} in all, {one.time_s / best.time_s:.2f} times as long{near}"


def loses(one: Priced, best: Priced) -> str:
    """Where: the terms and the tokens that make the difference."""
    names = one.terms.keys() | best.terms.keys()
    per_token = {
        name: one.terms.get(name, 0.0) / one.tokens_per_step - best.terms.get(name, 0.0) / best.tokens_per_step for name in names
    }
    name = max(per_token, key=lambda key: per_token[key])
    more = prod(one.penalties.values()) / prod(best.penalties.values()) - 1
    parts = []
    if (extra := per_token[name] * best.tokens_per_step) > 0.001 * best.step_s:
        parts.append(f"{show(extra, 's')} more {name} a step")
    if abs(more) > 0.001:
        parts.append(f"{abs(more):.1%} {'more' if more > 0 else 'fewer'} tokens")
    return f"{', '.join(parts) or 'as fast'}; {slower(one, best)}"


def show_time(seconds: float) -> str:
    """Of a whole run."""
    for name, size in (("days", 86400.0), ("h", 3600.0)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.3g} {name}" if seconds < 1e4 * size else f"{seconds / size:,.0f} {name}"
    return show(seconds, "s")


def record(one: Priced) -> Mapping[str, Any]:
    """A plan as JSON."""
    low, high = one.interval_s
    return {
        "plan": str(one.candidate),
        "run": one.candidate.changes(),
        "launched": one.candidate.launched,
        "hosts": one.hosts,
        "step_s": one.step_s,
        "step_s_80": [low, high],
        "tokens_per_s": one.tokens_per_step / one.step_s,
        "time_s": one.time_s,
        "dollars": one.dollars or None,
        "terms": dict(one.terms),
        "penalties": dict(one.penalties),
        "memory_bytes": one.memory_bytes,
        "wire_bytes_per_token": one.wire_bytes / one.tokens_per_step,
        "busiest": list(one.busiest),
    }


def faster(cluster: Cluster, rate_bps: float, times: float = TIMES_FASTER) -> Cluster:
    """The same, with links of that rate so many times as fast."""

    def rated(bandwidth: Quantity) -> Quantity:
        return Quantity(times * bandwidth.value) if bandwidth.value == rate_bps else bandwidth

    return replace(cluster, links=tuple(replace(link, bandwidth_bps=rated(link.bandwidth_bps)) for link in cluster.links))


def more_hosts(cluster: Cluster, count: int = MORE_HOSTS) -> Cluster:
    """With copies of the last host, on the same switches."""
    last, hosts, links, ranks = cluster.hosts[-1], list(cluster.hosts), list(cluster.links), list(cluster.ranks)

    def renamed(node: str, name: str) -> str:
        return name + node.removeprefix(last.name) if node == last.name or node.startswith(f"{last.name}/") else node

    for number in range(1, count + 1):
        name = f"{last.name} copy {number}"
        devices: Sequence[Device] = [replace(device, name=renamed(device.name, name)) for device in last.devices]
        hosts.append(Host(name=name, devices=tuple(devices), rack=last.rack))
        ranks += [device.name for device in devices]
        for link in cluster.links:
            ends = renamed(link.source, name), renamed(link.target, name)
            if ends != (link.source, link.target):
                links.append(replace(link, source=ends[0], target=ends[1]))
    return replace(cluster, hosts=tuple(hosts), links=tuple(links), ranks=tuple(ranks))
