"""What a candidate costs: the one door to both models of a step, and a bound below which no candidate of its kind can be.

    rates     devices whose rates were probed or declared: `plan.cost`, on the links of the cluster file, from the run's Transfers
    by name   accelerators from data sheets: `plan.gpu`, and what replicas exchange rarely beside it. Predicted, not run

    seconds to the tokens = tokens * penalties / tokens of a step * seconds of a step

Of an exchange every H steps a step sees 1/H, less what hides under the steps of its overlap, fragment by fragment. Coding on
accelerators: CODED_BYTES a value at the memory rate, an assumption, as no device has run it.

bound:  the passes of the slowest rank at the given rates; and, where no two ranks are on one host, what must pass the card of the
        slowest in them and behind them, less what it may hide under.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from math import ceil, exp, prod
from typing import Any, NamedTuple

from thinwire.cluster import Cluster
from thinwire.cluster.graph import Routes
from thinwire.collectives.choose.call import collective_call
from thinwire.collectives.price import Carrier, link_seconds
from thinwire.collectives.synthesis.bounds import OPS, bound
from thinwire.config.compress import Coded, NoCompression
from thinwire.config.pipeline import STAGES_PER_RANK
from thinwire.errors import UserError
from thinwire.layout import Layout
from thinwire.parallel.balance import cut, shares_tied, stages_of
from thinwire.plan import penalties
from thinwire.plan.candidates import EVERY, Candidate, Problem, config_of
from thinwire.plan.cost import predict
from thinwire.plan.gpu.job import Job
from thinwire.plan.gpu.links import collective_s
from thinwire.plan.gpu.room import FITS, room
from thinwire.plan.gpu.step import Factors, Terms, bubble_part, seconds, terms
from thinwire.plan.memory import need
from thinwire.sync.front import of_rare
from thinwire.traffic import EVALUATION, Transfer
from thinwire.units import show

CODED_BYTES = 40.0
BITS = {"none": 32.0, "bf16": 16.0, "int8": 8.5, "int4": 4.6, "topk": 0.33}
"""Of a value on the wire, with scales and positions."""
LEAST_BITS = {"none": 32.0, "bf16": 16.0, "int8": 8.0, "int4": 4.0, "topk": 0.25}
LAYERS_PER_FRAGMENT = 3
PASSING = 0.8
"""Of what crosses a boundary: the rest may pass a bucket at once."""
UNEVEN = 0.9
"""A tensor rank may have so much less than another."""
CAUSAL = 0.75
"""Products may be so much less than counted: kernels skip the masked half of attention, and a fit may find devices faster."""


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


def price(candidate: Candidate, problem: Problem, carrier: Carrier | None = None) -> Priced:
    """UserError for what cannot run; Unfit for what does not fit. carrier: in place of its own, where there are rates."""
    if problem.shape.tied and candidate.layout.pipe > 1 and candidate.launched:
        coded = Coded(kind=candidate.codec) if candidate.codec in ("bf16", "int8", "int4", "topk") else NoCompression()
        shares_tied(coded, candidate.layout)
    return _by_name(candidate, problem) if problem.rates is None else _by_rates(candidate, problem, carrier)


def least_s(draft: Candidate, problem: Problem) -> float:
    """Of a step, whatever replicas exchange: no candidate is priced below it."""
    layout, train, count = draft.layout, problem.config.train, draft.accumulate
    tokens = draft.micro_batch * train.sequence * count
    flops = problem.workload.flops_per_token * tokens / (layout.pipe * layout.seq * layout.tensor)
    bubble = 1 + bubble_part(draft.schedule, STAGES_PER_RANK[draft.schedule]) * (layout.pipe - 1) / count
    if problem.rates is None:
        again = 4 / 3 if draft.recompute == "full" else 1.0
        return CAUSAL * again * flops / problem.network.device.flops_per_s["bf16"] * bubble
    bits, stream = LEAST_BITS[draft.inside], tokens * problem.shape.width / layout.seq
    sums_s = 8 * problem.shape.layers * (1 - 1 / layout.tensor) * stream / layout.pipe * _card_s(bits, problem)
    if layout.pipe == 1:
        gathers = 2 * count if problem.config.sharded.reshard == "always" else 1
        shared = _block_parameters(problem) / layout.tensor * (1 - 1 / layout.shard) * (gathers + 1)
        return max(flops / min(problem.rates) + sums_s, shared * _card_s(bits, problem))
    passes_s = (flops / max(problem.rates) + sums_s) * bubble
    shared = 2 * (1 - 1 / layout.shard) * _first_rank_parameters(problem, layout, draft.schedule)
    return max(passes_s, PASSING * stream / layout.tensor * _card_s(bits, problem)) + shared * _card_s(32.0, problem)


def least_with_exchange_s(candidate: Candidate, problem: Problem) -> float:
    """The same, with what replicas exchange."""
    layout, passes_s = candidate.layout, least_s(candidate, problem)
    if problem.rates is None or layout.expert > 1:
        return passes_s
    each = _first_rank_parameters(problem, layout, candidate.schedule) / layout.shard

    def exchange_s(ranks: int, codec: str) -> float:
        return 2 * (1 - 1 / ranks) * each * _card_s(LEAST_BITS[codec], problem)

    every_s = exchange_s(layout.of_gradients.data, candidate.codec if layout.outer == 1 else "none")
    inner_s = passes_s + every_s if layout.pipe > 1 else max(passes_s, every_s)
    if layout.outer == 1 or layout.pipe * layout.tensor * layout.seq * layout.data * layout.shard > 1:
        return inner_s
    hidden_s = min(candidate.every, candidate.overlap * _fragments(candidate, problem)) * passes_s
    return inner_s + max(0.0, exchange_s(layout.outer, candidate.codec) - hidden_s) / candidate.every


def _card_s(bits: float, problem: Problem) -> float:
    """Of a value of so many bits through the slowest card; 0 where ranks need none to reach each other."""
    return bits * problem.slowest_card_s


def _block_parameters(problem: Problem) -> int:
    return sum(one.numel for one in problem.workload.parameters if one.name.startswith("blocks."))


@lru_cache(maxsize=1024)
def _first_rank_parameters(problem: Problem, layout: Layout, schedule: str) -> float:
    """In the blocks of the first rank, at the least."""
    if layout.pipe == 1:
        return _block_parameters(problem) / layout.tensor * UNEVEN
    per_rank = STAGES_PER_RANK[schedule]
    own = stages_of(schedule, layout.pipe, per_rank, 0)
    by_rank = problem.numbered.declared_rates
    assert by_rank is not None, "only then is a bound asked for"
    slowest = [min(by_rank[group[at]] for group in layout.groups("pipe")) for at in range(layout.pipe)]
    rates = {stage: slowest[at] for at in range(layout.pipe) for stage in stages_of(schedule, layout.pipe, per_rank, at)}
    costs = problem.workload.chain_flops_per_token
    stages = cut(costs, len(rates), [rates[stage] for stage in range(len(rates))])
    blocks = sum(0 < unit < len(costs) - 1 for stage in own for unit in stages[stage])
    return _block_parameters(problem) * blocks / problem.shape.layers / layout.tensor * UNEVEN


def of_tokens(candidate: Candidate, problem: Problem) -> dict[str, float]:
    """Factors of tokens to the same loss, by name; those that are 1 are left out."""
    if not problem.penalties:
        return {}
    layout = candidate.layout
    steps = problem.tokens / (candidate.sequences * problem.config.train.sequence)
    found = {"batch": penalties.of_batch(candidate.sequences / problem.batch)}
    if layout.outer > 1:
        found["rarely"] = of_rare(candidate.sync, problem.parameters, layout.outer, candidate.every, candidate.overlap, steps)
    elif layout.replicas > 1:
        found["code"] = penalties.of_codec(candidate.codec)
    found["inside"] = penalties.of_inside(candidate.inside)
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
        "spread": problem.spread or penalties.numbers()["interval"][door],
    }


def memory_of(candidate: Candidate, problem: Problem) -> tuple[float, float]:
    """(bytes that a rank needs at the most, bytes that there are for it; 0: not known), which is the same for all periods. Unfit
    where that is too little."""
    return _memory(replace(candidate, every=EVERY[-1], overlap=1) if candidate.every > 1 else candidate, problem)


@lru_cache(maxsize=8192)
def _memory(candidate: Candidate, problem: Problem) -> tuple[float, float]:
    if problem.rates is None:
        needed, device = room(job_of(candidate, problem)).total, problem.network.device
        if needed > FITS * device.memory_bytes:
            has_bytes = device.memory_bytes
            raise Unfit(
                f"{candidate}: a rank needs {show(needed, 'B')}, and {device.name} has {show(has_bytes, 'B')}", needed / has_bytes
            )
        return needed, device.memory_bytes
    config, on_device = config_of(candidate, problem), problem.cluster.devices[0].kind != "cpu"
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


class Least(Carrier):
    """Such as no schedule can be faster than, on this cluster."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    def seconds(self, routes: Routes, transfer: Transfer, group: Sequence[int]) -> float:
        """Of one call."""
        if transfer.op not in OPS or transfer.around or len(group) == 1:
            return super().seconds(routes, transfer, group)
        call = collective_call(self._cluster, transfer.op, transfer.message_bytes, group)
        return bound(call.cluster, call.op, call.message_bytes, jointly=False).seconds


def _by_rates(candidate: Candidate, problem: Problem, carrier: Carrier | None) -> Priced:
    needed, room_bytes = memory_of(candidate, problem)
    setting, transfers, own = problem.outlined(candidate)
    setting = replace(setting, ranks_per_core=problem.ranks_per_core)
    found = predict(setting, transfers, carrier=carrier or own, routes=problem.routes)
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
    shape, layout = problem.shape, candidate.layout
    alike = ("layers", "width", "heads", "kv_heads", "hidden", "tied")
    return Job(
        **vars(problem.network),
        **{name: getattr(shape, name) for name in alike},
        gated=shape.mlp == "swiglu",
        vocabulary=shape.vocabulary,
        sequence=problem.config.train.sequence,
        experts=max(1, shape.experts),
        experts_per_token=shape.experts_per_token if shape.experts else 1,
        precision="bf16",
        data=layout.data,
        tensor=layout.tensor,
        pipe=layout.pipe,
        interleave=STAGES_PER_RANK[candidate.schedule],
        zero=candidate.zero,
        sequence_parallel=candidate.sequence_parallel,
        micro_batch=candidate.micro_batch,
        global_batch=candidate.micro_batch * candidate.accumulate * layout.data,
        schedule=candidate.schedule,
        recompute=candidate.recompute,
        wide_gradients=True,
        outer=layout.outer,
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
        once = once._replace(data=once.data._replace(inter=once.data.inter * ratio, intra=once.data.intra * ratio))
        coding_s, whole = CODED_BYTES * job.local_parameters * memory_s, float(seconds(once, x))
    inside = base.filled_s + base.bubble_s + base.inside_s
    found = {
        "computing": base.filled_s,
        "bubble": base.bubble_s,
        "inside hosts": base.inside_s,
        "between hosts": max(0.0, whole - inside),
        "coding": coding_s,
    }
    axis, wire_s, sent = "data", once.data.inter * x.inter, once.data.inter and once.data.inter * job.inter_bytes_per_s
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
