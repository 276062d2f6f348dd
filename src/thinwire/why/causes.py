"""What each possible cause costs: how much shorter a step would be without it, by replay. No torch.

Causes that overlap are not added up. The one that costs most is named; plain bandwidth only where no nearer cause explains
a good part of what the wire costs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import median, median_low

from thinwire.cluster import Cluster, Link
from thinwire.collectives.price import link_seconds
from thinwire.measure.findings import SLOW_BELOW
from thinwire.units import show
from thinwire.why.prices import Prices, Services, with_rates
from thinwire.why.replay import merged, overlapped, replay, scaled
from thinwire.why.steps import Key, Profile, Program

LOADER, OUTSIDE, HOST = "slow data loader", "time between the passes", "slow host"
CARD, ORDER, LATENCY, OVERLAP, BANDWIDTH = "slow card", "order of ranks", "many small messages", "no overlap", "bandwidth"
NOTHING = "nothing"
PASSES = ("forward", "backward")
LEAST = 0.05
"""Of a step; below that nothing is named."""
NEARER = 0.3
SLOWER = 1.2
"""A host that computes so much longer than the usual one is called slow."""
BUCKETS = tuple(size << 20 for size in (1, 4, 25, 100))
PARTS = 8
"""Into which a whole gradient is cut, to be sent while the backward pass goes on."""
SUMS = ("all_reduce", "reduce_scatter", "all_gather")


@dataclass(frozen=True, slots=True)
class Cause:
    """saving_s: of a step. about: the evidence, a sentence."""

    name: str
    saving_s: float
    about: str


@dataclass(frozen=True)
class Case:
    """What was measured: the mean step on a cluster. pause_s: for how long the script stood still for it."""

    profile: Profile
    cluster: Cluster
    pause_s: float = 0.0

    @cached_property
    def prices(self) -> Prices:
        return Prices(self.cluster, self.profile.calls)

    @cached_property
    def _as_it_is(self) -> float:
        return replay(self.profile.programs, self.prices.measured)

    def step_s(self, programs: Sequence[Program] | None = None, services: Services | None = None) -> float:
        """Of a step with other programs or calls; what replay is off by for the step as it is, it is off by here too."""
        found = replay(programs or self.profile.programs, self.prices.measured if services is None else services)
        return found * self.profile.step_s / self._as_it_is if self._as_it_is else found

    @property
    def busy_s(self) -> list[float]:
        """Of a step, by rank: what it would be alone."""
        return [program.total() for program in self.profile.programs]

    @cached_property
    def passes_s(self) -> list[float]:
        """Of a step, by rank: forward and backward."""
        return [program.total(*PASSES) for program in self.profile.programs]

    @cached_property
    def cards(self) -> dict[str, tuple[Link, ...]]:
        """The links of hosts: out, in."""
        names = {host.name for host in self.cluster.hosts}
        found: dict[str, list[Link]] = {}
        for link in self.cluster.links:
            if link.source in names or link.target in names:
                found.setdefault(link.source if link.source in names else link.target, []).append(link)
        return {name: tuple(links) for name, links in found.items()}

    @cached_property
    def card_bps(self) -> dict[str, float]:
        """Of each host, the thinner way."""
        return {name: min(link.bandwidth_bps.value for link in links) for name, links in self.cards.items()}

    @cached_property
    def usual_card_bps(self) -> float:
        """Both ways counted."""
        return median(link.bandwidth_bps.value for links in self.cards.values() for link in links)

    # -- The step without a cause: (programs, services), None where there is no such cause.

    def without_loader(self) -> tuple[Program, ...]:
        """Batches are there when they are asked for."""
        return tuple(scaled(program, {"data": 0.0}) for program in self.profile.programs)

    def with_equal_hosts(self) -> tuple[Program, ...]:
        """No rank computes longer than the usual one."""
        usual = median_low(self.passes_s)
        factors = [usual / seconds if seconds > SLOWER * usual else 1.0 for seconds in self.passes_s]
        return tuple(
            scaled(program, dict.fromkeys((*PASSES, "optimizer"), factor))
            for program, factor in zip(self.profile.programs, factors, strict=True)
        )

    def slow_hosts(self) -> list[str]:
        """Names of those whose ranks compute longer than the usual one."""
        usual = median_low(self.passes_s)
        slow = [rank for rank, seconds in enumerate(self.passes_s) if seconds > SLOWER * usual]
        return list(dict.fromkeys(self.cluster.host_of(rank).name for rank in slow))

    def slow_cards(self) -> list[str]:
        """Hosts whose card is far slower than the usual one."""
        rates = self.card_bps
        if len(rates) < 3:
            return []
        return [name for name, rate in rates.items() if rate < SLOW_BELOW * median(rates.values())]

    def with_equal_cards(self) -> Cluster | None:
        """The slow cards are as fast as the usual one."""
        slow = self.slow_cards()
        if not slow:
            return None
        return with_rates(self.cluster, {link: self.usual_card_bps for name in slow for link in self.cards[name]})

    def bucketed(self, bucket_bytes: int) -> tuple[tuple[Program, ...], Services] | None:
        """Calls of one kind that follow each other go out together, up to so many bytes; None if nothing changes."""
        calls, services = self.profile.calls, dict(self.prices.measured)
        heads: dict[Key, Key] = {}
        for first in {group: None for group, _ in calls}:
            run: list[Key] = []
            for key in [*(key for key in calls if key[0] == first), None]:
                total = sum(calls[one].message_bytes for one in run)
                joins = key and calls[key].op in SUMS and (not run or calls[key].op == calls[run[-1]].op)
                if key and joins and total + calls[key].message_bytes <= bucket_bytes:
                    run.append(key)
                    continue
                if len(run) > 1:
                    heads.update(dict.fromkeys(run, run[-1]))
                    services[run[-1]] = self.prices.sized(first, calls[run[-1]].op, total)
                run = [key] if key and joins else []
        if not heads:
            return None
        return tuple(merged(program, heads) for program in self.profile.programs), services

    def with_overlap(self) -> tuple[tuple[Program, ...], Services] | None:
        """What is summed after the backward pass goes out while it runs; None where it does already."""
        sums = [key for key, made in self.profile.calls.items() if made.op == "all_reduce" and made.message_bytes]
        groups = {key[0] for key in sums}
        if len(groups) != 1:
            return None
        group = groups.pop()
        parts: list[Key] = [(group, number) for number in range(-PARTS, 0)]
        programs = [overlapped(program, sums, parts) for program in self.profile.programs]
        if any(program is None for program in programs):
            return None
        total = sum(self.profile.calls[key].message_bytes for key in sums)
        services = self.prices.measured | dict.fromkeys(parts, self.prices.sized(group, "all_reduce", total / PARTS))
        return tuple(program for program in programs if program is not None), services

    def utilisation(self) -> list[tuple[Link, float, float]]:
        """(link, share of the step that it is busy, share of the time that calls take), the fullest first."""
        step_s, wire_s = self.profile.step_s, self.profile.wire_s or float("inf")
        busy = [(link, link_seconds(link, size)) for link, size in self.prices.link_bytes().items()]
        return [(link, seconds / step_s, seconds / wire_s) for link, seconds in sorted(busy, key=lambda pair: -pair[1])]


def best_buckets(case: Case) -> tuple[int, float] | None:
    """(bytes, predicted step) of the best size of buckets; None where none makes a difference."""
    tried = [(case.step_s(*found), size) for size in BUCKETS if (found := case.bucketed(size))]
    return min(tried)[::-1] if tried else None


def causes(case: Case) -> list[Cause]:
    """All that cost anything, the named one first; the others by what they cost."""
    now_s, profile, prices = case.profile.step_s, case.profile, case.prices
    found = [
        Cause(LOADER, now_s - case.step_s(case.without_loader()), _of_phase(profile, "data", now_s, "in the data loader")),
        Cause(
            OUTSIDE,
            now_s - case.step_s([scaled(program, {"outside": 0.0}) for program in profile.programs]),
            _of_phase(profile, "outside", now_s, "between an update and the next forward pass, the data loader aside"),
        ),
    ]
    if slow := case.slow_hosts():
        own = {
            name: [seconds for rank, seconds in enumerate(case.passes_s) if case.cluster.host_of(rank).name == name]
            for name in slow
        }
        usual = median_low(case.passes_s)
        about = ", ".join(
            f"{name} computes {max(seconds) / usual:.1f} times as long as the usual one" for name, seconds in own.items()
        )
        found.append(Cause(HOST, now_s - case.step_s(case.with_equal_hosts()), about))
    if equal := case.with_equal_cards():
        peers = show(case.usual_card_bps, "bit/s")
        about = ", ".join(f"{name} has {show(case.card_bps[name], 'bit/s')}, its peers {peers}" for name in case.slow_cards())
        found.append(Cause(CARD, now_s - case.step_s(services=prices.all(equal)), about))
    if order := prices.best_order():
        names = " ".join(case.cluster.host_of(rank).name for rank in order)
        saved = now_s - case.step_s(services=prices.all(order=order))
        found.append(Cause(ORDER, saved, f"neighbours in the ring sit on two sides of a thin link; {names} cross it least"))
    if buckets := best_buckets(case):
        sizes = [made.message_bytes for made in profile.calls.values()]
        about = f"{len(sizes)} calls a step of {show(median(sizes), 'B')} each; latency, not bytes, is what they cost"
        found.append(Cause(LATENCY, now_s - buckets[1], about))
    if found_overlap := case.with_overlap():
        found.append(Cause(OVERLAP, now_s - case.step_s(*found_overlap), "gradients are sent when the backward pass is over"))
    bandwidth = Cause(BANDWIDTH, now_s - case.step_s(services=prices.all(busy=0.0)), _of_links(case))
    return _ranked([one for one in found if one.saving_s > 0], bandwidth, now_s)


def _ranked(found: Sequence[Cause], bandwidth: Cause, now_s: float) -> list[Cause]:
    wire = [one for one in found if one.name in (CARD, ORDER, LATENCY, OVERLAP)]
    nearest = max((one.saving_s for one in wire), default=0.0)
    others = [*found, *([bandwidth] if bandwidth.saving_s > 0 else [])]
    named = [one for one in others if one is not bandwidth or nearest < NEARER * bandwidth.saving_s]
    first = max(named, key=lambda one: one.saving_s, default=None)
    rest = sorted((one for one in others if one is not first), key=lambda one: -one.saving_s)
    if first is None or first.saving_s < LEAST * now_s:
        nothing = Cause(NOTHING, 0.0, "computing is what a step consists of; no single change would shorten it by 5 %")
        return [nothing, *([first] if first else []), *rest]
    return [first, *rest]


def _of_phase(profile: Profile, phase: str, now_s: float, where: str) -> str:
    longest = max(program.total(phase) for program in profile.programs)
    return f"{show(longest, 's')} of a step, {longest / now_s:.0%}, are spent {where}"


def _of_links(case: Case) -> str:
    fullest = case.utilisation()
    if not fullest:
        return "the ranks share a host: there is no link between them"
    link, of_step, of_calls = fullest[0]
    rate = show(link.bandwidth_bps.value, "bit/s")
    return (
        f"{link.source} -> {link.target}, {rate}, is busy {of_step:.0%} of a step and {of_calls:.0%} of the time that calls take"
    )
