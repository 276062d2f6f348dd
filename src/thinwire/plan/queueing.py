"""Waiting at what several senders share: a link, or a server that merges what workers push.

    lambda   arrivals a second, of all sources together      s     seconds of service of one arrival, always the same
    rho      lambda s, the utilisation                       W_q   mean seconds that one waits before its service
    L        mean number in the system, waiting or served    L_q   of these, waiting

    Little's law (1961)              L = lambda W,  L_q = lambda W_q,  with W = W_q + s: seconds become a number of arrivals
    M/M/1   Poisson, service random  W_q = rho s / (1 - rho)
    M/D/1   Poisson                  W_q = rho s / (2 (1 - rho))                              (Pollaczek, Khinchine)
    nD/D/1  n sources, each of one arrival every D seconds, at times that have nothing to do with each other: what one finds is
            the work V that m = n - 1 others left; D counted in services (Roberts & Virtamo 1991):
            P(V > x) = sum over x < k <= m of C(m, k) ((k - x) / D)^k (1 - (k - x) / D)^(m - k) (D - m + x) / (D - k + x)
            W_q = s * integral of P(V > x) dx;   below M/D/1 of the same rho, and the same for many sources
    incast  n sources that arrive at once, as ranks of a step do:  W_q = (n - 1) s / 2, the last one (n - 1) s

Traffic of others on a link, frames of f seconds at utilisation rho_o (M/D/1), leaves a part 1 - rho_o of its rate: services are
as much longer, and each waits for the frames before it, rho_o f / (2 (1 - rho_o)).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any, Literal

import numpy as np
from scipy.stats import binom

from thinwire.cluster import Link
from thinwire.cluster.graph import Routes
from thinwire.collectives.choose.simulate import FRAME_BYTES
from thinwire.collectives.price import Carrier, link_seconds
from thinwire.errors import UserError
from thinwire.plan.candidates import Problem
from thinwire.plan.cost import Setting
from thinwire.plan.price import BITS, Priced
from thinwire.traffic import EVALUATION, PIPELINE, Transfer

Arrivals = Literal["M/M/1", "M/D/1", "nD/D/1", "incast"]
POINTS = 64
"""At which P(V > x) is evaluated within each service."""
WAITING = 0.05
"""Of the time between two pushes: what a push may wait at parameter servers."""
RARE = 1e-9
"""A probability below which nothing is added."""


@dataclass(frozen=True, kw_only=True)
class Queue:
    """One link or server. sources: senders that share it; arrivals_per_s: of all of them; service_s: of one arrival."""

    name: str
    arrivals: Arrivals
    sources: int
    arrivals_per_s: float
    service_s: float
    others: float = 0.0
    """Utilisation of the link by traffic of others, in frames of `frame_s` seconds."""
    frame_s: float = 0.0

    def __post_init__(self) -> None:
        if self.sources < 1 or self.arrivals_per_s < 0 or self.service_s <= 0 or not 0 <= self.others < 1:
            raise UserError(
                f"{self.name}: {self.sources} sources, {self.arrivals_per_s:g} arrivals a second of {self.service_s:g} s, others "
                f"{self.others:g}: give at least 1 source, rates of 0 or more, a service above 0 s and others below 1"
            )

    @property
    def stretched_s(self) -> float:
        """Of a service beside the traffic of others."""
        return self.service_s / (1 - self.others)

    @property
    def utilisation(self) -> float:
        """rho, without that of others; at 1 and above the queue grows without end."""
        return self.arrivals_per_s * self.stretched_s

    @property
    def waiting_s(self) -> float:
        """W_q, infinite where the queue grows without end."""
        rho, s = self.utilisation, self.stretched_s
        if rho >= 1:
            return inf
        behind_frames_s = self.others * self.frame_s / (2 * (1 - self.others))
        return (
            behind_frames_s
            + {
                "M/M/1": lambda: rho * s / (1 - rho),
                "M/D/1": lambda: rho * s / (2 * (1 - rho)),
                "nD/D/1": lambda: s * periodic_waiting(self.sources, self.sources / rho if rho else inf),
                "incast": lambda: (self.sources - 1) * s / 2,
            }[self.arrivals]()
        )

    @property
    def number_waiting(self) -> float:
        """L_q: arrivals, not seconds."""
        return self.arrivals_per_s * self.waiting_s

    @property
    def number(self) -> float:
        """L, with the one that is served."""
        return self.number_waiting + self.utilisation

    def as_row(self) -> dict[str, Any]:
        """Units in the keys."""
        names = ("arrivals", "sources", "arrivals_per_s", "utilisation", "waiting_s", "number_waiting", "number")
        return {"queue": self.name, "service_s": self.stretched_s} | {name: getattr(self, name) for name in names}


def periodic_waiting(sources: int, period: float) -> float:
    """W_q of nD/D/1 in services; period: D in services, above `sources`."""
    others = sources - 1
    if others == 0 or period == inf:
        return 0.0
    total = 0.0
    for service in range(others):
        x = service + (np.arange(POINTS) + 0.5) / POINTS
        k = np.arange(service + 1, others + 1)[:, None]
        part = (k - x) / period
        tail = np.where(part > 0, binom.pmf(k, others, np.clip(part, 0, 1)) * (period - others + x) / (period - k + x), 0)
        mean = float(tail.sum(axis=0).mean())
        total += mean
        if mean < RARE:
            break
    return total


def of_links(
    setting: Setting,
    transfers: Sequence[Transfer],
    step_s: float,
    carrier: Carrier = Carrier(),  # noqa: B008 (never changed)
) -> list[Queue]:
    """Two queues for each link that a step uses, fullest first: its flows all at once (incast), and at unrelated times (nD/D/1).

    An arrival is what one flow of one call puts on the link. transfers: as for `cost.predict`.
    """
    routes, sent = Routes(setting.cluster), defaultdict[Link, list[tuple[tuple[int, int], float, float]]](list)
    for source, target, size, per_step in messages(setting, transfers, carrier):
        for link in routes.between(source, target):
            sent[link].append(((source, target), size, per_step))
    bytes_of = {link: sum(size * per_step for _, size, per_step in flows) for link, flows in sent.items()}
    queues = []
    for link in sorted(bytes_of, key=lambda one: -link_seconds(one, bytes_of[one])):
        per_step = sum(count for _, _, count in sent[link])
        queues += [
            Queue(
                name=f"{link.source} -> {link.target}",
                arrivals=arrivals,
                sources=len({pair for pair, _, _ in sent[link]}),
                arrivals_per_s=per_step / step_s,
                service_s=link_seconds(link, bytes_of[link] / per_step),
                frame_s=link_seconds(link, FRAME_BYTES),
            )
            for arrivals in ("incast", "nD/D/1")
        ]
    return queues


def messages(setting: Setting, transfers: Sequence[Transfer], carrier: Carrier) -> Iterator[tuple[int, int, float, float]]:
    """(source, target, payload bytes, how many a step) of all ranks; not of evaluations."""
    layout = setting.layout
    for transfer in transfers:
        if transfer.label in (EVALUATION, PIPELINE):
            continue
        for group in layout.senders(transfer.axis):
            for a, b, size in carrier.flows(transfer, group):
                yield group[a], group[b], size, transfer.calls / transfer.every
    if setting.stages is not None:
        pipelines = setting.stages.pipelines(layout, setting.flops_per_s)
        rank_of = pipelines.rank_of
        for ranks in pipelines.groups:
            for stage, (forward, back) in enumerate(zip(pipelines.activation_bytes, pipelines.gradient_bytes, strict=True)):
                one, other = ranks[rank_of[stage]], ranks[rank_of[stage + 1]]
                yield one, other, forward, setting.micro_batches
                yield other, one, back, setting.micro_batches


def of_plan(problem: Problem, plan: Priced) -> list[Queue]:
    """`of_links` for a plan that was priced by rates. UserError for others, of which no message is known."""
    problem = problem.on_hosts(plan.hosts)
    if problem.rates is None:
        raise UserError(
            f"{problem.cluster.name}: messages are known one by one only where devices have flops_per_s in a cluster file; leave "
            "--queue out"
        )
    setting, transfers, carrier = problem.outlined(plan.candidate)
    return of_links(setting, transfers, plan.step_s, carrier)


def servers_of_plan(problem: Problem, plan: Priced) -> list[Queue]:
    """Parameter servers in the place of what replicas exchange, each behind the thinnest link of the cluster: so many that a push
    waits no more than WAITING of the time between two. UserError where no number suffices, or nothing is exchanged."""
    layout, links = plan.candidate.layout, problem.cluster.links
    if layout.replicas == 1 or not links:
        raise UserError("no replicas exchange, so there is nothing to push")
    period_s = plan.step_s * (plan.candidate.every if layout.outer > 1 else 1)
    thinnest = min(links, key=lambda link: link.bandwidth_bps.value)
    service_s = link_seconds(thinnest, problem.parameters * BITS[plan.candidate.codec] / 8)
    return servers_for(layout.replicas, period_s, service_s, WAITING * period_s)


def servers_for(workers: int, period_s: float, service_s: float, waiting_s: float, most: int = 1024) -> list[Queue]:
    """The fewest servers at which a push waits `waiting_s` or less: the queue of each, all alike.

    Each worker pushes once in period_s, a part to every server, which together serve a push in service_s as one server would in
    as many times less. UserError if `most` do not suffice.
    """
    for count in range(1, most + 1):
        rate = workers / period_s
        queue = Queue(
            name=f"server of {count}", arrivals="nD/D/1", sources=workers, arrivals_per_s=rate, service_s=service_s / count
        )
        if queue.waiting_s <= waiting_s:
            return [queue] * count
    raise UserError(
        f"{workers} workers that push every {period_s:g} s, {service_s:g} s of service a push: {most} servers still let a push "
        f"wait more than {waiting_s:g} s; push less often, or in fewer bits"
    )
