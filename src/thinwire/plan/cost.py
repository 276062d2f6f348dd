"""Seconds of a step from Cluster, Workload and Transfers: computing, exposed communication, waiting, optimizer.

compute_s    flops of the rank's micro-batches / its flops_per_s (what a training step achieves, not the peak)
waiting_s    until the last rank has computed:  max over ranks compute_s - compute_s of this rank
exposed_s    the wire works on the transfers in the order in which they become ready, one after the other;
             what remains when the slowest rank has computed everything is exposed
optimizer_s  bytes that the update touches / memory rate of the rank's device
outer_s      the same of the outer step, where replicas exchange rarely; it is exposed
             these and coding (work) take as many times as long as there are ranks a core, where they share cores: in a lab, whose
             hosts are one machine. Passes do not: they are paced

ready_k = max over ranks of (compute_s - window_k / flops_per_s)
end_k   = max(ready_k, end_{k-1}) + calls * (price + work_k)
exposed = max(0, end_last - max compute_s)
          + sum over transfers for which passes stand still (`in_passes`) of calls * max(0, price + work - window)
          + sum over events every H > 1 steps of max(0, end of their last transfer as above - the end of compute) / H,
            and no less than all of them take, less the steps beside which they are sent
          + outer_s

Passes of ranks that share out the states are simulated too (`sharded`); by how much they take longer than computing is exposed.
Groups of ranks that share matrices, sequences, experts or states, and of their replicas, make each call at the same time: a link
carries what all of them send.

In a pipeline the passes of a step are simulated (`pipeline`), with the wires as they are and with idle ones, and as much longer
as what they stand still for:

waiting_s    until the step would be over on idle wires: the bubble of the schedule, and slower stages
exposed_s    by how much later it is over, and what is sent when all passes are over
"""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from thinwire.cluster import Cluster, Link
from thinwire.cluster.graph import Routes
from thinwire.collectives.price import Carrier, link_seconds
from thinwire.config.optimizer import EIGHT_BIT
from thinwire.errors import UserError
from thinwire.layout import Layout
from thinwire.plan.pipeline import Ran, Simulated, Stages, simulate
from thinwire.plan.sharded import ShardedPasses
from thinwire.traffic import EVALUATION, PIPELINE, REPLICAS, Transfer
from thinwire.units import show
from thinwire.workload import Workload

MEMORY_BYTES_PER_S = 4e9
"""Where it is not known, of one core updating weights: read and written, four arrays at once."""
CODING_PASSES = 16
"""As which what is computed for moments in 8 bits counts, measured on one core: as long as so many reads of the parameters."""
HOST_PASS_S = 0.6e-3
"""Scheduling, coding and handing over what a pass sends: measured 0.5 to 0.95 ms in seven pipelines of the lab."""
GPU_MEMORY_BYTES_PER_S = 1e12
"""Of a GPU where it is not known: about what one with GDDR6X has, and a third of one with HBM3."""
NATIVE = Carrier()


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a prediction is made for. flops_per_s: by rank, what a training step achieves there; rates_are: how they are known.

    kind: of the devices on which ranks run, where that is known; else as the cluster says. micro_batches: of a step and replica;
    where they differ that is their mean, and `assignment` has those of each replica. stages: where layout.pipe is used; workload
    is then of the part of the model that the predicted rank has. sharded: where layout.shard is. tensor_flops: of a micro-batch,
    by place on the tensor axis, where ranks on it have uneven parts. outer_bytes: that outer steps touch, for each step.
    ranks_per_core: above 1 in a lab.
    """

    cluster: Cluster
    layout: Layout
    workload: Workload
    micro_batches: int
    flops_per_s: tuple[float, ...]
    rates_are: str = "declared"
    optimizer: str = "adamw"
    assignment: tuple[int, ...] = ()
    kind: str = ""
    stages: Stages | None = None
    sharded: ShardedPasses | None = None
    tensor_flops: tuple[float, ...] = ()
    outer_bytes: float = 0.0
    ranks_per_core: float = 1.0

    @property
    def crowd(self) -> float:
        """So many times as long takes what all ranks do at once and is not paced."""
        return max(1.0, self.ranks_per_core)

    @property
    def pass_s(self) -> float:
        """Of a pipeline's pass on the host, which on a device it hides under computing."""
        kind = self.kind or self.cluster.device_of(0).kind
        return self.crowd * HOST_PASS_S if kind == "cpu" else 0.0

    @property
    def compute_s(self) -> tuple[float, ...]:
        """Of a step, by rank."""
        counts = self.assignment or (self.micro_batches,) * self.layout.replicas
        flops = self.tensor_flops or (self.workload.flops_per_microbatch,) * self.layout.tensor
        return tuple(
            counts[self.layout.replica(rank)] * flops[self.layout.coordinates(rank)["tensor"]] / rate
            for rank, rate in enumerate(self.flops_per_s)
        )

    def optimizer_s(self, rank: int) -> float:
        """Gradients and weights are read, weights and state read and written."""
        touched = 3 * self.workload.stored_bytes + 2 * self.workload.optimizer_bytes(self.optimizer)
        if self.optimizer == EIGHT_BIT:
            touched += CODING_PASSES * self.workload.stored_bytes
        return self.touching_s(touched, rank)

    def touching_s(self, touched_bytes: float, rank: int) -> float:
        """Of so many bytes of the rank's device, read or written by all ranks at once."""
        return self.crowd * touched_bytes / self.memory_rate(rank)[0]

    def memory_rate(self, rank: int) -> tuple[float, str]:
        """Bytes a second, read or written, of the rank's device; and how it is known, if that should be said."""
        device = self.cluster.device_of(rank)
        kind = self.kind or device.kind
        known = device.memory_bytes_per_s if (kind == "cpu") == (device.kind == "cpu") else None
        if known is not None:
            return known.value, f"memory rate: {known.source}"
        if kind == "cpu":
            return MEMORY_BYTES_PER_S, ""
        taken = show(GPU_MEMORY_BYTES_PER_S, "B/s")
        return GPU_MEMORY_BYTES_PER_S, f"memory rate: taken as {taken}, the cluster file has no memory_bytes_per_s of {kind}"


def ranks_per_core(ranks: int) -> float:
    """Of a lab with so many, on this machine."""
    return ranks / (os.cpu_count() or 1)


@dataclass(frozen=True, kw_only=True)
class PricedTransfer:
    """A Transfer with what this rank sends for it per step, and the seconds of one event on idle wires.

    even: whether every rank of the group sends as much.
    """

    transfer: Transfer
    wire_bytes_per_step: float
    seconds: float
    even: bool


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Terms of one step in seconds, as rank `rank` sees them. step_s is their sum.

    loads: bytes that cross each link in a step, by the axis for which they do; passes: (rank, pass) of the rank's pipeline.
    """

    rank: int
    compute_s: float
    waiting_s: float
    exposed_s: float
    optimizer_s: float
    tokens_per_step: int
    transfers: tuple[PricedTransfer, ...]
    loads: Mapping[str, Mapping[Link, float]]
    assumptions: tuple[str, ...]
    passes: tuple[tuple[int, Ran], ...] = ()

    @property
    def links(self) -> dict[Link, float]:
        """Bytes that cross each link in a step."""
        return dict(sum((Counter(load) for load in self.loads.values()), Counter()))

    @property
    def step_s(self) -> float:
        return self.compute_s + self.waiting_s + self.exposed_s + self.optimizer_s

    def as_record(self) -> dict[str, Any]:
        """predicted.json of the run folder."""
        return {
            **{name: getattr(self, name) for name in ("step_s", "compute_s", "exposed_s", "waiting_s", "optimizer_s")},
            "tokens_per_s": self.tokens_per_step / self.step_s,
            "wire_bytes_per_step": sum(
                priced.wire_bytes_per_step for priced in self.transfers if priced.transfer.label != EVALUATION
            ),
            "assumptions": list(self.assumptions),
            "transfers": [
                {key: getattr(priced.transfer, key) for key in ("label", "axis", "op", "message_bytes", "calls", "every")}
                | {key: getattr(priced, key) for key in ("wire_bytes_per_step", "seconds", "even")}
                for priced in self.transfers
            ],
            "links": [
                dict(
                    source=link.source,
                    target=link.target,
                    bytes_per_step=payload,
                    busy_s=link_seconds(link, payload),
                    axes={axis: load[link] for axis, load in self.loads.items() if link in load},
                )
                for link, payload in self.links.items()
            ],
            "passes": [
                dict(zip(("kind", "stage", "micro"), ran.done, strict=True), rank=one, begin_s=ran.begin_s, end_s=ran.end_s)
                for one, ran in self.passes
            ],
        }


def predict(
    setting: Setting,
    transfers: Sequence[Transfer],
    rank: int = 0,
    carrier: Carrier = NATIVE,
    routes: Routes | None = None,
) -> Prediction:
    """What a step costs on `rank`. `transfers` in the order in which they become ready; carrier: who runs the collectives.
    routes: of the cluster, for those who ask often, since what was found once is kept there."""
    layout, routes = setting.layout, routes or Routes(setting.cluster)
    layout.check(setting.cluster.world_size)
    if len(setting.flops_per_s) != layout.world_size:
        raise UserError(f"{len(setting.flops_per_s)} compute rates for {layout.world_size} ranks; give one per rank")
    by_rank = setting.compute_s
    compute_s, slowest_s, slowest_rate = by_rank[rank], max(by_rank), min(setting.flops_per_s)
    paces = set(zip(by_rank, setting.flops_per_s, strict=True))

    priced, wire_end, still_s = [], 0.0, 0.0
    passes: tuple[tuple[int, Ran], ...] = ()
    loads: dict[str, Counter[Link]] = {}
    alike = not (setting.stages or setting.sharded or setting.tensor_flops)  # ranks of different parts have different parameters
    simulated = setting.sharded.labels if setting.sharded else set()
    if setting.sharded is not None:
        across = [one for one in transfers if one.label.endswith(f" {REPLICAS}")]
        simulated |= {one.label for one in across}
        passes_s = setting.sharded.seconds(
            slowest_rate,
            setting.micro_batches,
            lambda transfer: _call_s(transfer, setting, routes, carrier),
            across,
            meet=_meet(across, setting.sharded.gradients, layout, routes, carrier),
        )
        still_s = max(0.0, passes_s - slowest_s)
    rare_s = 0.0  # of a step's share
    uncovered_s: dict[str, tuple[float, int]] = {}  # of each event: when it is over, after computing, and every how many steps
    for number, transfer in enumerate(transfers):
        groups = layout.senders(transfer.axis)
        call = _call(transfer, layout, routes, carrier)
        seconds = (call.seconds + transfer.work_s * setting.crowd) * transfer.calls
        mine = next(group for group in groups if rank in group)
        priced.append(
            PricedTransfer(
                transfer=transfer,
                wire_bytes_per_step=call.sent[rank] * transfer.calls / transfer.every,
                seconds=seconds,
                even=len({call.sent[one] for one in mine}) == 1
                and (alike or len(groups) == 1 or (transfer.axis == "shard" and setting.stages is None))
                and transfer.label != EVALUATION,  # some replicas have a batch less
            )
        )
        in_steps = transfer.label != EVALUATION
        if transfer.label in simulated:
            pass
        elif transfer.in_passes:
            still_s += max(0.0, seconds - transfer.calls * transfer.window_flops / slowest_rate) * in_steps
        elif transfer.every == 1:
            ready_s = max(end_s - transfer.window_flops / rate for end_s, rate in paces)
            wire_end = max(ready_s, wire_end) + seconds
        elif in_steps:
            event = transfer.event or f"transfer {number}"
            ready_s = -transfer.window_flops / slowest_rate
            so_far_s, _ = uncovered_s.get(event, (ready_s, 0))
            uncovered_s[event] = max(so_far_s, ready_s) + seconds, transfer.every
            rare_s += seconds / transfer.every
        for link, payload in call.loads.items() if transfer.label != PIPELINE else ():
            loads.setdefault(transfer.axis, Counter())[link] += payload * transfer.calls / transfer.every  # type: ignore[assignment]
    waiting_s, exposed_s = slowest_s - compute_s, max(0.0, wire_end - slowest_s) + still_s
    if setting.stages is not None:
        ran, idle = _passes(setting, setting.stages, routes, carrier)
        compute_s = idle.computing_s(layout.coordinates(rank)["pipe"])
        waiting_s, exposed_s = idle.seconds - compute_s, ran.seconds - idle.seconds
        after = [one for one in priced if one.transfer.every == 1 and not one.transfer.in_passes]
        exposed_s += sum(one.seconds for one in after if one.transfer.label != PIPELINE)
        loads.setdefault("pipe", Counter()).update({link: payload for link, payload in ran.link_bytes.items() if payload})
        number, members = next((k, group) for k, group in enumerate(layout.groups("pipe")) if rank in group)
        passes = tuple((members[one.position], one) for one in ran.passes if one.group == number)
    sources = {link.bandwidth_bps.source for link in setting.cluster.links}
    return Prediction(
        rank=rank,
        compute_s=compute_s,
        waiting_s=waiting_s,
        exposed_s=exposed_s
        + setting.touching_s(setting.outer_bytes, rank)
        + max(rare_s - compute_s - waiting_s, sum(max(0.0, one_s) / every for one_s, every in uncovered_s.values())),
        optimizer_s=setting.optimizer_s(rank),
        tokens_per_step=setting.workload.tokens_per_microbatch * layout.seq * setting.micro_batches * layout.replicas,
        transfers=tuple(priced),
        loads=loads,
        passes=passes,
        assumptions=(
            f"compute rate: {setting.rates_are}",
            *filter(None, [setting.memory_rate(rank)[1]]),
            f"links: {' and '.join(sorted(sources)) or 'none between the ranks, so the wire costs nothing'}",
            f"{carrier.about()}; no other traffic on the links",
        ),
    )


def _meet(some: Sequence[Transfer], others: Sequence[Transfer], layout: Layout, routes: Routes, carrier: Carrier) -> bool:
    """Whether the narrowest link of some transfers is one of the others'."""
    mine, theirs = (sum((Counter(_call(one, layout, routes, carrier).loads) for one in its), Counter()) for its in (some, others))
    return bool(mine) and max(mine, key=lambda link: link_seconds(link, mine[link])) in theirs


@dataclass(frozen=True)
class _Call:
    """One call of a transfer, in all its groups at once: seconds in the slowest one, without its work; bytes sent by each rank;
    bytes on each link."""

    seconds: float
    sent: Mapping[int, int]
    loads: Mapping[Link, float]


def _call_s(transfer: Transfer, setting: Setting, routes: Routes, carrier: Carrier) -> float:
    return _call(transfer, setting.layout, routes, carrier).seconds + transfer.work_s * setting.crowd


def _call(transfer: Transfer, layout: Layout, routes: Routes, carrier: Carrier) -> _Call:
    key = carrier, layout, transfer.axis, transfer.op, transfer.message_bytes, transfer.item_bytes, transfer.around
    if (found := routes.known.get(key)) is None:
        found = routes.known[key] = _worked_out(transfer, layout, routes, carrier)
    return found


def _worked_out(transfer: Transfer, layout: Layout, routes: Routes, carrier: Carrier) -> _Call:
    seconds, sent, loads = 0.0, Counter[int](), Counter[Link]()
    by_stage: dict[int, list[Counter[Link]]] = {}
    for group in layout.senders(transfer.axis):
        seconds = max(seconds, carrier.seconds(routes, transfer, group))
        placed = [(group[a], group[b], size) for a, b, size in carrier.flows(transfer, group)]
        for source, _, size in placed:
            sent[source] += size
        by_stage.setdefault(layout.coordinates(group[0])["pipe"], []).append(routes.load(placed))
        loads.update(by_stage[layout.coordinates(group[0])["pipe"]][-1])
    if layout.tensor * layout.seq * layout.expert * layout.shard > 1:
        together_s = max(_busy_s(sum(each, Counter())) for each in by_stage.values())
        seconds += together_s - max(_busy_s(load) for each in by_stage.values() for load in each)
    return _Call(seconds, sent, loads)


def _busy_s(load: Counter[Link]) -> float:
    return max((link_seconds(link, size) for link, size in load.items()), default=0.0)


def _passes(setting: Setting, stages: Stages, routes: Routes, carrier: Carrier) -> tuple[Simulated, Simulated]:
    """As they are, and on idle wires."""
    layout, flops_per_s = setting.layout, setting.flops_per_s
    key = stages, layout, flops_per_s, carrier, setting.crowd
    if (found := routes.known.get(key)) is None:
        slowest = min(flops_per_s)
        sums_s = {
            done: sum(one.calls * max(0.0, _call_s(one, setting, routes, carrier) - one.window_flops / slowest) for one in sent)
            for done, sent in stages.in_passes.items()
        }
        pass_s = setting.pass_s
        ran = simulate(stages.pipelines(layout, flops_per_s, sums_s=sums_s, pass_s=pass_s), routes)
        alone = stages.pipelines(layout, flops_per_s, idle_wires=True, pass_s=pass_s)
        alike = tuple(map(tuple, alone.orders)), tuple(alone.seconds.items())
        if alike not in routes.known:
            routes.known[alike] = simulate(replace(alone, groups=alone.groups[:1]), routes)  # all take as long
        found = routes.known[key] = ran, routes.known[alike]
    return found
