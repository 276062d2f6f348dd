"""A long run of a plan, event by event: stragglers, failures and checkpoints; and rounds of replicas that come and go.

late        each of d replicas by a normal share LATE of its passes: a step waits for the latest. The price has the mean in it
            already where it is by name (`plan.gpu.step`), so passes are drawn around it
M           hours to a failure of one of n devices: device hours / n (Poisson)
C, R        a checkpoint stops training for C, and after a failure the run is back in R; what was done since is done again
interval    sqrt(2 C M) (1 + sqrt(C / 2 M) / 3 + C / 18 M) - C                              (Daly 2006; sqrt(2 C M): Young 1974)
goodput     interval / (M e^(R / M) (e^((interval + C) / M) - 1))                           (Daly 2006)

round       peers that are there begin one; each is done after its time, unless it leaves before; the round ends when a quorum
            of those that began are done, or no more can be. Stays and absences are exponential, so a round needs no history
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, exp, expm1, sqrt

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from thinwire.plan.gpu.step import HOST_LINK_BYTES_PER_S, LATE
from thinwire.plan.price import Priced

DEVICE_HOURS = 54 * 24 * 16384 / 419
"""To a failure: Llama Team 2024 (arXiv 2407.21783), section 3.3.4: 419 unexpected interruptions in 54 days of 16,384 H100."""
BACK_S = 600.0
"""R: found, replaced, loaded. An assumption."""
STATE_BYTES = 12.0
"""Of a parameter, copied to the host's memory before training goes on; the disk is written behind it."""
SPEEDS = 0.3
"""Deviation of the logarithm of what peers take for a round. An assumption."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What came of days of a run: seconds of a step on the mean and of the slowest of 100; goodput, simulated and by the law."""

    step_s: float
    latest_s: float
    failures: int
    mtbf_s: float
    interval_s: float
    checkpoint_s: float
    goodput: float
    expected: float


def daly(checkpoint_s: float, mtbf_s: float) -> float:
    """Seconds of work between checkpoints that lose least; `mtbf_s` where checkpoints take that long."""
    c, m = checkpoint_s, mtbf_s
    return sqrt(2 * c * m) * (1 + sqrt(c / (2 * m)) / 3 + c / (18 * m)) - c if c < 2 * m else m


def expected(interval_s: float, checkpoint_s: float, back_s: float, mtbf_s: float) -> float:
    """Part of the time in which work is done that lasts."""
    return interval_s / (mtbf_s * exp(back_s / mtbf_s) * expm1((interval_s + checkpoint_s) / mtbf_s))


def simulated(interval_s: float, checkpoint_s: float, back_s: float, lives_s: NDArray[np.float64]) -> float:
    """The same, of lives between failures; what fails while it comes back comes back anew."""
    done = np.floor(np.maximum(0.0, lives_s - back_s) / (interval_s + checkpoint_s)) * interval_s
    return float(done.sum() / lives_s.sum())


def run(plan: Priced, parameters: int, days: float, device_hours: float = DEVICE_HOURS, seed: int = 0) -> Run:
    """Of a plan, for so many days; the same seed gives the same."""
    draw, layout = np.random.default_rng(seed), plan.candidate.layout
    count, replicas = layout.world_size, layout.replicas
    steps = ceil(days * 86400 / plan.step_s)
    counted = sqrt(2 * np.log(replicas)) if "bubble" in plan.terms else 0.0  # in the price
    late = LATE * (ndtri(draw.random(min(steps, 1_000_000)) ** (1 / replicas)) - counted)
    each_s = plan.step_s + late * (plan.terms["computing"] + plan.terms.get("bubble", 0.0))
    mtbf_s = device_hours * 3600 / count
    checkpoint_s = STATE_BYTES * parameters / (layout.pipe * layout.tensor * layout.expert) / HOST_LINK_BYTES_PER_S
    interval_s = daly(checkpoint_s, mtbf_s)
    lives_s = draw.exponential(mtbf_s, 1 + draw.poisson(days * 86400 / mtbf_s))
    return Run(
        step_s=float(each_s.mean()),
        latest_s=float(np.quantile(each_s, 0.99)),
        failures=len(lives_s) - 1,
        mtbf_s=mtbf_s,
        interval_s=interval_s,
        checkpoint_s=checkpoint_s,
        goodput=simulated(interval_s, checkpoint_s, BACK_S, lives_s),
        expected=expected(interval_s, checkpoint_s, BACK_S, mtbf_s),
    )


def rounds(peers: int, round_s: float, stay_s: float, away_s: float, quorum: float, seed: int = 0) -> tuple[float, float]:
    """(work that counts, of what all peers could do if they never left and none were slow; seconds of a round on the mean)."""
    draw, count = np.random.default_rng(seed), 200
    own_s = round_s * np.exp(SPEEDS * draw.standard_normal(peers))
    there = draw.random(peers) < stay_s / (stay_s + away_s)
    counted, clock_s = 0, 0.0
    for _ in range(count):
        leaves_s = np.where(there, draw.exponential(stay_s, peers), 0.0)
        ends_s = np.sort(own_s[there & (leaves_s > own_s)])
        wanted = max(1, ceil(quorum * there.sum()))
        taken = ends_s[:wanted]
        last_s = float(taken[-1]) if len(taken) >= wanted else max(own_s[there].max(initial=round_s), *taken[-1:])
        counted, clock_s = counted + len(taken), clock_s + last_s
        since_s = np.maximum(0.0, last_s - leaves_s)  # of those that were away or have left: may be back
        back = draw.random(peers) < stay_s / (stay_s + away_s) * -np.expm1(-(1 / stay_s + 1 / away_s) * since_s)
        there = (leaves_s > last_s) | back
    return counted * round_s / (peers * clock_s), clock_s / count


def best_quorum(
    peers: int, round_s: float, stay_s: float, away_s: float, tried: Sequence[float] = (1.0, 0.95, 0.9, 0.8, 0.7, 0.5)
) -> dict[float, tuple[float, float]]:
    """`rounds` by quorum, the best first."""
    found = {one: rounds(peers, round_s, stay_s, away_s, one) for one in tried}
    return dict(sorted(found.items(), key=lambda item: -item[1][0]))
