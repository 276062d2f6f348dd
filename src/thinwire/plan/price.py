"""What a candidate costs: the one door to both models of a step, and a bound below which no candidate of its kind can be.

    rates     devices whose rates were probed or declared: `plan.cost`, on the links of the cluster file, from the run's Transfers
    by name   accelerators from data sheets: `plan.gpu`, and what replicas exchange rarely beside it. Predicted, not run

    seconds to the tokens = tokens * penalties / tokens of a step * seconds of a step

Of an exchange every H steps a step sees 1/H, less what hides under the steps of its overlap, fragment by fragment. Coding on
accelerators: CODED_BYTES a value at the memory rate, an assumption, as no device has run it.

bound:  the passes of the slowest rank at the given rates; or all that must cross the fastest link, where that takes longer than
        what it may hide under.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from math import ceil, exp, prod
from typing import Any, NamedTuple

from thinwire.collectives.price import link_seconds
from thinwire.config.compress import Coded, NoCompression
from thinwire.config.run import RunConfig
from thinwire.errors import UserError
from thinwire.parallel.balance import shares_tied
from thinwire.plan import penalties
from thinwire.plan.candidates import Candidate, Problem
from thinwire.plan.cost import predict
from thinwire.plan.gpu.job import Job
from thinwire.plan.gpu.links import collective_s
from thinwire.plan.gpu.room import room
from thinwire.plan.gpu.step import Factors, Terms, seconds, terms
from thinwire.plan.memory import need
from thinwire.traffic import EVALUATION
from thinwire.units import show

FITS = 0.97
"""Part of a device's memory under which a predicted peak is said to fit; of a host's too."""
CODED_BYTES = 40.0
BITS = {"none": 32.0, "bf16": 16.0, "int8": 8.5, "int4": 4.6, "topk": 0.33}
"""Of a value on the wire, with scales and positions."""
LEAST_BITS = {"none": 32.0, "bf16": 16.0, "int8": 8.0, "int4": 4.0, "topk": 0.25}
LAYERS_PER_FRAGMENT = 3
CAUSAL = 0.75
"""Products may be so much less than counted: kernels skip the masked half of attention, and a fit may find devices faster."""
NAMES = {"zb1p": "zb-1p"}


class Unfit(UserError):
    """A candidate that needs `times` the memory that there is."""

    def __init__(self, text: str, times: float) -> None:
        super().__init__(text)
        self.times = times


@dataclass(frozen=True, kw_only=True)
class Priced:
    """terms: seconds of a step by name, whose sum is step_s. memory_bytes: of a rank, of room_bytes (0: not known). penalties:
    factors of tokens, by name. busiest: the link that is busy longest in a step, and its seconds. wire_bytes: sent by a rank in a
    step. spread: of the logarithm of step_s."""

    candidate: Candidate
    hosts: int
    terms: Mapping[str, float]
    memory_bytes: float
    room_bytes: float
    penalties: Mapping[str, float]
    tokens_per_step: int
    wire_bytes: float
    busiest: tuple[str, float]
    tokens: float
    dollars_per_s: float
    spread: float

    @property
    def step_s(self) -> float:
        """Predicted."""
        return sum(self.terms.values())

    @property
    def time_s(self) -> float:
        """To the tokens that the run needs with these penalties."""
        return self.tokens * prod(self.penalties.values()) / self.tokens_per_step * self.step_s

    @property
    def interval_s(self) -> tuple[float, float]:
        """Of step_s, meant to hold 80 % of measured ones."""
        return self.step_s * exp(-self.spread), self.step_s * exp(self.spread)

    @property
    def dollars(self) -> float:
        """Of the whole run, where prices are given."""
        return self.time_s * self.dollars_per_s


def price(candidate: Candidate, problem: Problem) -> Priced:
    """UserError for what cannot run; Unfit for what does not fit."""
    if problem.shape.tied and candidate.layout.pipe > 1 and candidate.launched:
        coded = Coded(kind=candidate.codec) if candidate.codec in ("bf16", "int8", "int4", "topk") else NoCompression()
        shares_tied(coded, candidate.layout)
    return _by_name(candidate, problem) if problem.rates is None else _by_rates(candidate, problem)


def least_s(draft: Candidate, problem: Problem) -> float:
    """Of a step, whatever replicas exchange: no candidate is priced below it."""
    layout, train = draft.layout, problem.config.train
    flops = (
        problem.flops_per_token
        * draft.micro_batch
        * draft.accumulate
        * train.sequence
        / (layout.pipe * layout.seq * layout.tensor)
    )
    part = {"1f1b": 1.0, "interleaved": 0.5, "zb1p": 1 / 3}.get(draft.schedule, 0.0)
    bubble = 1 + part * (layout.pipe - 1) / draft.accumulate
    if problem.rates is None:
        again = 4 / 3 if draft.recompute == "full" else 1.0
        return CAUSAL * again * flops / problem.network.device.flops_per_s["bf16"] * bubble
    if layout.pipe == 1:
        return flops / min(problem.rates)
    return flops / max(problem.rates) * (bubble if draft.schedule == "1f1b" else 1.0)


def least_with_exchange_s(candidate: Candidate, problem: Problem) -> float:
    """The same, with what replicas exchange: no less than crosses the fastest link, where no two ranks are on one host."""
    layout, compute_s = candidate.layout, least_s(candidate, problem)
    if problem.rates is None:
        return compute_s
    fastest_bps = max((link.bandwidth_bps.value for link in problem.cluster.links), default=0.0)
    alone = all(len(host.devices) == 1 for host in problem.cluster.hosts)
    if not fastest_bps or not alone or layout.replicas < layout.world_size or layout.replicas == 1:
        return compute_s
    passing_s = 2 * (1 - 1 / layout.replicas) * problem.parameters * LEAST_BITS[candidate.codec] / fastest_bps
    if layout.outer == 1:
        return max(compute_s, passing_s)
    if layout.data > 1:
        return compute_s
    hidden_s = min(candidate.every, candidate.overlap * _fragments(candidate, problem)) * compute_s
    return compute_s + max(0.0, passing_s - hidden_s) / candidate.every


def of_tokens(candidate: Candidate, problem: Problem) -> dict[str, float]:
    """Factors of tokens to the same loss, by name; those that are 1 are left out."""
    if not problem.penalties:
        return {}
    layout = candidate.layout
    steps = problem.tokens / (candidate.sequences * problem.config.train.sequence)
    found = {"batch": penalties.of_batch(candidate.sequences / problem.batch)}
    if layout.outer > 1:
        every = candidate.every
        found["rarely"] = penalties.of_rare(problem.parameters, layout.outer, every, candidate.overlap, steps)
    elif layout.data > 1:
        found["code"] = penalties.of_codec(candidate.codec)
    return {name: factor for name, factor in found.items() if abs(factor - 1) > 1e-9}


@cache
def factors() -> Factors:
    """Of all tables."""
    return Factors(**penalties.numbers()["factors"])


def _fragments(candidate: Candidate, problem: Problem) -> int:
    return ceil(problem.shape.layers / LAYERS_PER_FRAGMENT) + 1 if candidate.sync == "streaming" else 1


def _common(candidate: Candidate, problem: Problem, door: str) -> dict[str, Any]:
    return {
        "candidate": candidate,
        "hosts": len(problem.cluster.hosts),
        "penalties": of_tokens(candidate, problem),
        "tokens_per_step": candidate.sequences * problem.config.train.sequence,
        "tokens": problem.tokens,
        "dollars_per_s": problem.dollars_per_hour * problem.cluster.world_size / 3600,
        "spread": penalties.numbers()["interval"][door],
    }


@lru_cache(maxsize=1024)
def memory_of(candidate: Candidate, problem: Problem) -> tuple[float, float]:
    """(bytes that a rank needs at the most, bytes that there are for it; 0: not known). Unfit where that is too little."""
    if problem.rates is None:
        needed, device = room(job_of(candidate, problem)).total, problem.network.device
        if needed > FITS * device.memory_bytes:
            has_bytes = device.memory_bytes
            raise Unfit(
                f"{candidate}: a rank needs {show(needed, 'B')}, and {device.name} has {show(has_bytes, 'B')}", needed / has_bytes
            )
        return needed, device.memory_bytes
    config, on_device = _config(candidate, problem), problem.cluster.devices[0].kind != "cpu"
    casts = on_device and config.train.dtype == "auto"
    needed_by = need(config, problem.shape, candidate.layout, casts=casts, on_device=on_device)
    least = 0.0
    for host in problem.cluster.hosts:
        sizes = [device.memory_bytes.value for device in host.devices if device.memory_bytes]
        if len(sizes) == len(host.devices):
            each = needed_by.training_bytes if on_device else needed_by.host_bytes(len(sizes)) / len(sizes)
            has = min(sizes) if on_device else sum(sizes) / len(sizes)
            least = min(least or has, has)
            if each > FITS * has:
                text = f"{candidate}: a rank needs {show(each, 'B')} on {host.name}, which has {show(has, 'B')} for each"
                raise Unfit(text, each / has)
    return float(needed_by.training_bytes if on_device else needed_by.rank_bytes), least


@lru_cache(maxsize=1024)
def _config(candidate: Candidate, problem: Problem) -> RunConfig:
    return candidate.config(problem)


def _by_rates(candidate: Candidate, problem: Problem) -> Priced:
    assert problem.rates is not None and problem.outline is not None, "somebody tells what a run sends"
    needed, room_bytes = memory_of(candidate, problem)
    config, layout = _config(candidate, problem), candidate.layout
    setting, transfers, carrier = problem.outline(config, problem.shape, layout, problem.cluster, problem.rates)
    found = predict(setting, transfers, carrier=carrier)
    busiest = max(found.links.items(), key=lambda one: link_seconds(*one), default=None)
    return Priced(
        **_common(candidate, problem, "rates"),
        terms={
            "computing": found.compute_s,
            "waiting": found.waiting_s,
            "exchange": found.exposed_s,
            "optimizer": found.optimizer_s,
        },
        memory_bytes=needed,
        room_bytes=room_bytes,
        wire_bytes=sum(one.wire_bytes_per_step for one in found.transfers if one.transfer.label != EVALUATION),
        busiest=(f"{busiest[0].source} -> {busiest[0].target}", link_seconds(*busiest)) if busiest else ("", 0.0),
    )


@lru_cache(maxsize=4096)
def job_of(candidate: Candidate, problem: Problem) -> Job:
    """Of one replica among those that exchange rarely."""
    network, shape, layout = problem.network, problem.shape, candidate.layout
    return Job(
        layers=shape.layers,
        width=shape.width,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        hidden=shape.hidden,
        gated=shape.mlp == "swiglu",
        tied=shape.tied,
        vocabulary=shape.vocabulary,
        sequence=problem.config.train.sequence,
        precision="bf16",
        device=network.device,
        per_host=network.per_host,
        devices=network.devices,
        intra_bytes_per_s=network.intra_bytes_per_s,
        inter_bytes_per_s=network.inter_bytes_per_s,
        data=layout.data,
        tensor=layout.tensor,
        pipe=layout.pipe,
        interleave=2 if candidate.schedule in ("interleaved", "zbv") else 1,
        zero=candidate.zero,
        sequence_parallel=candidate.sequence_parallel,
        micro_batch=candidate.micro_batch,
        global_batch=candidate.micro_batch * candidate.accumulate * layout.data,
        schedule=NAMES.get(candidate.schedule, candidate.schedule),
        recompute=candidate.recompute,
        wide_gradients=True,
        outer=layout.outer,
        site_devices=network.site_devices,
        site_bytes_per_s=network.site_bytes_per_s,
        latency_s=network.latency_s,
        site_latency_s=network.site_latency_s,
    )


class _Base(NamedTuple):
    """Of a job, whatever replicas exchange. terms, whole_s: with gradients exchanged as they are; filled_s: computing alone."""

    terms: Terms
    filled_s: float
    bubble_s: float
    inside_s: float
    whole_s: float


@lru_cache(maxsize=200_000)
def _base(job: Job) -> _Base:
    x, once = factors(), terms(job)
    if job.pipe > 1 and job.zero == 0:  # as `thinwire train` does
        once = once._replace(behind=1.0)
    computing = x._replace(inter=0.0, latency=0.0, intra=0.0)
    inside = float(seconds(once, x._replace(inter=0.0, latency=0.0)))
    alone = float(seconds(once, computing))
    filled = float(seconds(once._replace(bubble=0.0), computing)) if job.pipe > 1 else alone
    return _Base(once, filled, alone - filled, inside - alone, float(seconds(once, x)))


def draft_s(draft: Candidate, problem: Problem) -> float:
    """As `least_s`, nearer: for accelerators of all that is no exchange between hosts. Unfit for what does not fit there."""
    if problem.rates is not None:
        return least_s(draft, problem)
    memory_of(draft, problem)
    base = _base(job_of(draft, problem))
    return base.filled_s + base.bubble_s


def _by_name(candidate: Candidate, problem: Problem) -> Priced:
    needed, room_bytes = memory_of(candidate, problem)
    job, x, ratio = job_of(candidate, problem), factors(), BITS[candidate.codec] / 32
    base, memory_s = _base(job), x.memory / job.device.memory_bytes_per_s
    once, coding_s, whole = base.terms, 0.0, base.whole_s
    if candidate.layout.outer == 1 and candidate.codec != "none":
        once = once._replace(data_inter=once.data_inter * ratio, data_intra=once.data_intra * ratio)
        coding_s, whole = CODED_BYTES * job.local_parameters * memory_s, float(seconds(once, x))
    inside = base.filled_s + base.bubble_s + base.inside_s
    found = {
        "computing": base.filled_s,
        "bubble": base.bubble_s,
        "inside hosts": base.inside_s,
        "between hosts": max(0.0, whole - inside),
        "coding": coding_s,
    }
    wire_s, sent = once.data_inter * x.inter, once.data_inter * job.inter_bytes_per_s if once.data_inter else 0.0
    axis = "data"
    if job.outer > 1:
        local = job.local_parameters / (job.data if job.zero == 3 else 1)
        gathers = candidate.codec == "topk"  # what others have chosen cannot be added up on the way
        size = 4 * local * ratio * (job.outer if gathers else 1)
        event = collective_s(job, "outer", size, reduces=not gathers)
        event_s = event.intra * x.intra + event.inter * x.inter + event.latency * x.latency
        beside = min(candidate.every, _fragments(candidate, problem) * candidate.overlap)  # steps: one wire serves all fragments
        seen_s = max(0.0, event_s - beside * whole)
        found["rare exchange"] = seen_s / candidate.every
        found["coding"] = CODED_BYTES * local * memory_s / candidate.every
        rare_s = event.inter * x.inter / candidate.every
        sent += (1 if gathers else 2) * (job.outer - 1) / job.outer * size / candidate.every
        axis, wire_s = max(("data", wire_s), ("outer", rare_s), key=lambda one: one[1])
    return Priced(
        **_common(candidate, problem, "by_name"),
        terms=found,
        memory_bytes=needed,
        room_bytes=room_bytes,
        wire_bytes=sent,
        busiest=(_tier(job, axis), wire_s) if wire_s else ("", 0.0),
    )


def _tier(job: Job, axis: str) -> str:
    if job.at_site(axis):
        return f"uplinks of sites ({show(8 * job.site_bytes_per_s * job.site_devices, 'bit/s')})"
    return f"cards of hosts ({show(8 * job.inter_bytes_per_s * job.per_host, 'bit/s')})"
