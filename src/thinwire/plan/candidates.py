"""What may be planned, and all candidates of it: a layout, how replicas exchange, micro-batches, schedule.

The axes that are tried stand in one table, TRIED; data takes the ranks that they leave. What the user keeps (`Problem.kept`) is
not varied: a key keeps its value, and whatever differs from it is left out.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from math import gcd
from typing import Any

from thinwire.cluster import Cluster
from thinwire.collectives.price import Carrier
from thinwire.config.model import ModelConfig
from thinwire.config.pipeline import APART, STAGES_PER_RANK
from thinwire.config.run import RunConfig
from thinwire.errors import UserError
from thinwire.layout import Layout
from thinwire.plan.cost import Setting
from thinwire.plan.gpu.network import Network, network_of
from thinwire.tomlfile import validate
from thinwire.traffic import Transfer
from thinwire.workload import Workload

Outline = Callable[[RunConfig, ModelConfig, Layout, Cluster, tuple[float, ...]], tuple[Setting, list[Transfer], Carrier]]
"""What `thinwire train` predicts from: see `train.outline`."""
MOST_RANKS = 64
"""Above, ranks are not priced one by one."""
EVERY = (2, 10, 30, 100, 300)
CODECS = ("none", "bf16", "int8", "int4")
RARE_CODECS = ("bf16", "int4")
"""Of what is exchanged rarely, which loses nothing by it (`penalties.toml`)."""
OVERLAP = 5
SCHEDULES = ("1f1b", "interleaved", "zb1p", "zbv")
SIMULATED = ("1f1b", "zb1p", "zbv")
"""Where each is simulated, which takes time."""
RECOMPUTE = ("none", "selective", "full")
"""Tried in this order until a rank fits."""
TIMES = (1, 2, 4)
"""Of the given batch."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Problem:
    """config: the run as given; shape: its model, with the vocabulary that it gets; batch: sequences of a step, as given; tokens:
    of the run, without penalties. kept: keys of run.toml, "sync.kind", that the user has set.

    times: multiples of the batch that are tried. beyond: also what `thinwire train` cannot launch. dollars_per_hour: of a device.
    outline: for clusters whose devices have rates.
    """

    cluster: Cluster
    config: RunConfig
    shape: ModelConfig
    batch: int
    tokens: float
    kept: frozenset[str] = frozenset()
    penalties: bool = True
    beyond: bool = False
    dollars_per_hour: float = 0.0
    outline: Outline | None = None
    times: tuple[int, ...] = TIMES

    @cached_property
    def rates(self) -> tuple[float, ...] | None:
        """By rank, where ranks are priced one by one."""
        return self.cluster.declared_rates if self.cluster.world_size <= MOST_RANKS else None

    @cached_property
    def network(self) -> Network:
        """Of accelerators by name."""
        return network_of(self.cluster)

    @cached_property
    def parameters(self) -> int:
        """Of the model, without norms and learned positions."""
        shape = self.shape
        block = shape.width * (shape.qkv_width + shape.width + shape.up_width + shape.hidden)
        return shape.layers * block + shape.vocabulary * shape.width * (1 if shape.tied else 2)

    @cached_property
    def flops_per_token(self) -> float:
        """Forward and backward."""
        return Workload.of_transformer(self.shape, 1, self.config.train.sequence).flops_per_token

    @cached_property
    def content(self) -> dict[str, Any]:
        """Of `config`, without what a candidate says and the user has not."""
        whole = self.config.model_dump(exclude_defaults=True) | {"model": self.config.model.model_dump(exclude_none=True)}
        for section in ("layout", "sync", "compress", "pipeline"):
            keys = whole.pop(section, {})
            whole[section] = {key: value for key, value in keys.items() if f"{section}.{key}" in self.kept}
        return {section: keys for section, keys in whole.items() if keys}

    def on_hosts(self, count: int) -> "Problem":
        """The same, on so many of the hosts, the first with the fastest devices."""
        return replace(self, cluster=some_hosts(self.cluster, count))

    def kept_or(self, key: str, usual: Iterable[Any]) -> tuple[Any, ...]:
        """What is tried for a key."""
        section, name = key.split(".")
        return (getattr(getattr(self.config, section), name, None),) if key in self.kept else tuple(usual)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One plan. zero, sequence_parallel: as in `plan.gpu.job`, for accelerators only."""

    layout: Layout
    micro_batch: int
    accumulate: int = 1
    sync: str = "every_step"
    every: int = 1
    overlap: int = 0
    codec: str = "none"
    collectives: str = "native"
    schedule: str = "1f1b"
    zero: int = 0
    recompute: str = "none"
    sequence_parallel: bool = False

    @property
    def sequences(self) -> int:
        """Of a step."""
        return self.micro_batch * self.accumulate * self.layout.replicas

    @property
    def launched(self) -> bool:
        """Whether `thinwire train` can."""
        return self.zero == 0 and not self.sequence_parallel

    def changes(self) -> dict[str, dict[str, Any]]:
        """Sections of run.toml, and keys in them."""
        layout = self.layout
        found: dict[str, dict[str, Any]] = {
            "layout": {axis: getattr(layout, axis) for axis in ("outer", "pipe", "data", "seq", "tensor")},
            "sync": {"kind": self.sync, "accumulate": self.accumulate},
            "train": {"micro_batch": self.micro_batch},
        }
        if self.sync != "every_step":
            found["sync"]["every"] = self.every
        if self.recompute != "none":
            found["train"]["recompute"] = self.recompute
        if self.collectives != "native":
            found["collectives"] = {"kind": self.collectives}
        if self.sync == "streaming":
            found["sync"]["overlap"] = self.overlap
        if self.sync != "sparseloco":
            found["compress"] = {"kind": self.codec}
        if layout.pipe > 1:
            found["pipeline"] = {"schedule": self.schedule}
        return found

    def config(self, problem: Problem) -> RunConfig:
        """UserError for what no run.toml may hold."""
        content = dict(problem.content)
        for section, keys in self.changes().items():
            content[section] = content.get(section, {}) | keys
        return validate(RunConfig, content, "the plan")

    def __str__(self) -> str:
        parts = [str(self.layout)] if self.layout.world_size > 1 else ["one rank"]
        if self.layout.pipe > 1:
            parts.append(self.schedule)
        if self.sync != "every_step":
            tail = f", overlap {self.overlap}" if self.sync == "streaming" else ""
            parts.append(f"{self.sync} every {self.every}{tail}")
        if self.codec != "none":
            parts.append(self.codec)
        if self.collectives != "native":
            parts.append("chosen collectives")
        parts += [f"ZeRO-{self.zero}"] * (self.zero > 0) + [f"recompute {self.recompute}"] * (self.recompute != "none")
        parts += ["sequence parallel"] * self.sequence_parallel
        return f"{', '.join(parts)}, {self.accumulate} x {self.micro_batch}"


def divisors(number: int) -> list[int]:
    """Ascending."""
    return [one for one in range(1, number + 1) if number % one == 0]


def _tensor(problem: Problem, ranks: int) -> Iterable[int]:
    shape, cluster = problem.shape, problem.cluster
    inside = _inside(problem) if problem.rates is None or cluster.world_size > 16 else ranks
    return divisors(gcd(gcd(ranks, inside), gcd(shape.kv_heads, shape.hidden)))


def _inside(problem: Problem) -> int:
    return len(problem.cluster.host_of(0).devices)


def _seq(problem: Problem, ranks: int) -> Iterable[int]:
    """Inside hosts, where ranks are priced one by one."""
    sequence, inside = problem.config.train.sequence, _inside(problem) if problem.rates is not None else 1
    return [one for one in divisors(gcd(ranks, inside)) if one == 1 or sequence % (2 * one) == 0]


def _pipe(problem: Problem, ranks: int) -> Iterable[int]:
    return [one for one in divisors(ranks) if one <= problem.shape.layers]


def _outer(problem: Problem, ranks: int) -> Iterable[int]:
    hosts = len(problem.cluster.hosts)
    return divisors(gcd(ranks, hosts) if problem.rates is None else ranks)


TRIED: Mapping[str, Callable[[Problem, int], Iterable[int]]] = {"tensor": _tensor, "seq": _seq, "pipe": _pipe, "outer": _outer}
"""Degrees by axis, of the ranks that are left; the innermost first."""


def layouts(problem: Problem) -> Iterator[Layout]:
    """All of them."""
    world = problem.cluster.world_size

    def rest(axes: list[str], left: int, found: dict[str, int]) -> Iterator[Layout]:
        if not axes:
            yield Layout(**found, data=left)
            return
        for degree in TRIED[axes[0]](problem, left):
            yield from rest(axes[1:], left // degree, found | {axes[0]: degree})

    yield from rest(list(TRIED), world, {})


def exchanges(problem: Problem, layout: Layout) -> Iterator[dict[str, Any]]:
    """Ways in which the replicas of a layout may exchange."""
    if layout.outer == 1:
        kinds = problem.kept_or("compress.kind", CODECS) if layout.data > 1 else ("none",)
        yield from ({"codec": kind} for kind in kinds)
        return
    for every in problem.kept_or("sync.every", EVERY):
        for codec in problem.kept_or("compress.kind", RARE_CODECS):
            yield {"sync": "diloco", "every": every, "codec": codec}
            overlap = problem.kept_or("sync.overlap", (OVERLAP if every > OVERLAP else 1,))[0]
            if 0 < (overlap or 0) < every:
                yield {"sync": "streaming", "every": every, "overlap": overlap, "codec": codec}
        yield {"sync": "sparseloco", "every": every, "codec": "topk"}


def batches(problem: Problem, layout: Layout) -> Iterator[tuple[int, int]]:
    """(micro_batch, accumulate) for batches of about the given one and multiples."""
    found = set()
    for times in problem.times if problem.penalties else (1,):
        each = max(1, round(problem.batch * times / layout.replicas))
        if not 0.8 <= each * layout.replicas / (problem.batch * times) <= 1.25:
            continue
        if "train.micro_batch" in problem.kept:
            counts = [max(1, each // problem.config.train.micro_batch)]
        elif "sync.accumulate" in problem.kept:
            counts = [problem.config.sync.accumulate]
        elif problem.rates is None:
            counts = [each // micro for micro in (1, 2, 4, 8, 16) if each % micro == 0]
        else:
            counts = [layout.pipe * more for more in (1, 2, 4, 8)] if layout.pipe > 1 else [1, 4, 16, 64]
        found |= {(each // count, count) for count in counts if count <= each and each % count == 0}
    yield from sorted(found, reverse=True)


def drafts(problem: Problem) -> Iterator[Candidate]:
    """All candidates, but for how replicas exchange."""
    for layout in layouts(problem):
        if problem.shape.tied and layout.pipe > 1 and layout.outer > 2 and not problem.beyond:
            continue  # as `parallel.balance.shares_tied`
        tried = (
            problem.kept_or("pipeline.schedule", SCHEDULES if problem.rates is None else SIMULATED)
            if layout.pipe > 1
            else ("1f1b",)
        )
        schedules = [name for name in tried if layout.pipe * STAGES_PER_RANK[name] <= problem.shape.layers]
        for (micro, count), schedule in product(batches(problem, layout), schedules):
            for savings in _savings(problem, layout, schedule):
                yield Candidate(layout=layout, micro_batch=micro, accumulate=count, schedule=schedule, **savings)


def variants(problem: Problem, draft: Candidate) -> Iterator[Candidate]:
    """Of a draft, all that keep what the user keeps; whether they can run and fit is for `price`."""
    kept = {key: problem.kept_or(key, ())[0] for key in problem.kept}
    for exchange in exchanges(problem, draft.layout):
        one = replace(draft, **exchange)
        if _keeps(one, kept):
            yield one


def _savings(problem: Problem, layout: Layout, schedule: str) -> Iterator[dict[str, Any]]:
    """What saves memory. Beyond `thinwire train`, what costs nothing is always done."""
    kinds = problem.kept_or("train.recompute", RECOMPUTE)
    if not problem.beyond or problem.rates is not None:
        yield from ({"recompute": kind} for kind in kinds if kind == "none" or (schedule not in APART and layout.seq == 1))
        return
    sharded = (3, 1) if layout.pipe == 1 and layout.data > 1 else (1,) if layout.data > 1 else (0,)
    for zero, recompute in product(sharded, kinds):
        yield {"zero": zero, "recompute": recompute, "sequence_parallel": layout.tensor > 1}


def _keeps(one: Candidate, kept: Mapping[str, Any]) -> bool:
    if not kept:
        return True
    changes = one.changes()
    for key, value in kept.items():
        section, name = key.split(".")
        if name in changes.get(section, {}) and changes[section][name] != value and not (section == "layout" and value == 0):
            return False
    return True


def some_hosts(cluster: Cluster, count: int) -> Cluster:
    """Those with the fastest devices, with all links between them. UserError for more than there are."""
    if not 1 <= count <= len(cluster.hosts):
        raise UserError(f"{cluster.name} has {len(cluster.hosts)} hosts, not {count}")
    if count == len(cluster.hosts):
        return cluster

    def speed(index: int) -> float:
        return min(device.flops_per_s.value if device.flops_per_s else 0.0 for device in cluster.hosts[index].devices)

    taken = sorted(sorted(range(len(cluster.hosts)), key=lambda index: -speed(index))[:count])
    hosts = tuple(cluster.hosts[index] for index in taken)
    names = {host.name for host in hosts} | {switch.name for switch in cluster.switches}
    names |= {device.name for host in hosts for device in host.devices}
    return Cluster(
        name=cluster.name,
        hosts=hosts,
        switches=cluster.switches,
        links=tuple(link for link in cluster.links if link.source in names and link.target in names),
        ranks=tuple(rank for rank in cluster.ranks if rank in names),
    )
