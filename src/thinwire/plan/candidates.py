"""What may be planned, and all candidates of it: a layout, how replicas exchange, micro-batches, schedule.

What the user keeps (`Problem.kept`) is not varied: a key keeps its value, and whatever differs from it is left out.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import product
from math import gcd
from typing import Any

from thinwire.cluster import Cluster
from thinwire.cluster.graph import Routes
from thinwire.cluster.order import along_links, in_order, some_hosts
from thinwire.collectives.price import Carrier
from thinwire.config.model import ModelConfig
from thinwire.config.pipeline import APART, STAGES_PER_RANK
from thinwire.config.run import RunConfig
from thinwire.errors import UserError
from thinwire.layout import AXES, Layout
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
INSIDE = ("none", "bf16", "int8")
"""Of what ranks of a replica send each other within passes: sums of tensor ranks, what stages hand on, weights and gradients of
shards."""
INSIDE_KEYS = ("tensor.sums", "pipeline.activations", "pipeline.gradients", "sharded.weights", "sharded.gradients")
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
    outline: for clusters whose devices have rates. spread: half width of intervals, in logarithms; 0: as usual. ranks_per_core:
    where they share cores, in a lab.
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
    spread: float = 0.0
    ranks_per_core: float = 1.0

    @cached_property
    def rates(self) -> tuple[float, ...] | None:
        """By rank, where ranks are priced one by one."""
        return self.cluster.declared_rates if self.cluster.world_size <= MOST_RANKS else None

    @cached_property
    def numbered(self) -> Cluster:
        """The cluster whose ranks have the numbers that a run gives them."""
        if "layout.map" in self.kept and self.config.layout.map != "links":
            return self.cluster
        return in_order(self.cluster, along_links(self.cluster))

    @cached_property
    def routes(self) -> Routes:
        """Of `numbered`, with what is priced on them."""
        return Routes(self.numbered)

    @cached_property
    def slowest_card_s(self) -> float:
        """For a bit; 0 where hosts have several ranks, or there is nothing to send."""
        nodes = {self.cluster.node_of(rank) for rank in range(self.cluster.world_size)}
        if len(nodes) < max(2, self.cluster.world_size):
            return 0.0
        leaving = [max(one.bandwidth_bps.value for one in self.cluster.links if one.source == node) for node in nodes]
        native = self.config.collectives.kind == "native"  # others may give slow cards less to do
        return 1 / (min if native else max)(leaving)

    @cached_property
    def network(self) -> Network:
        """Of accelerators by name."""
        return network_of(self.cluster)

    @cached_property
    def workload(self) -> Workload:
        """Of one sequence."""
        return Workload.of_transformer(self.shape, 1, self.config.train.sequence)

    @cached_property
    def parameters(self) -> int:
        """Of the model."""
        return self.workload.num_parameters

    @cached_property
    def content(self) -> dict[str, Any]:
        """Of `config`, without what a candidate says and the user has not."""
        whole = self.config.model_dump(exclude_defaults=True) | {"model": self.config.model.model_dump(exclude_none=True)}
        for section in ("layout", "sync", "compress", "pipeline", "tensor", "sharded"):
            keys = whole.pop(section, {})
            whole[section] = {key: value for key, value in keys.items() if f"{section}.{key}" in self.kept}
        return {section: keys for section, keys in whole.items() if keys}

    def on_hosts(self, count: int) -> "Problem":
        """The same, on so many of the hosts, the first with the fastest devices."""
        return replace(self, cluster=some_hosts(self.cluster, count))

    def outlined(self, plan: "Candidate") -> tuple[Setting, list[Transfer], Carrier]:
        """What a run of it computes and sends, where there are rates. UserError for what no run can do."""
        assert self.rates is not None and self.outline is not None, "somebody tells what a run sends"
        return self.outline(config_of(plan, self), self.shape, plan.layout, self.cluster, self.rates)

    def kept_or(self, key: str, usual: Iterable[Any]) -> tuple[Any, ...]:
        """What is tried for a key."""
        section, name = key.split(".")
        return (getattr(getattr(self.config, section), name, None),) if key in self.kept else tuple(usual)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One plan. inside: the code of what is sent within passes; zero, sequence_parallel: as in `plan.gpu.job`, for accelerators
    only."""

    layout: Layout
    micro_batch: int
    accumulate: int = 1
    sync: str = "every_step"
    every: int = 1
    overlap: int = 0
    codec: str = "none"
    inside: str = "none"
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
            "layout": {axis: getattr(layout, axis) for axis in AXES},
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
        for key in INSIDE_KEYS if self.inside != "none" else ():
            section, name = key.split(".")
            if _sends(layout, section):
                found.setdefault(section, {})[name] = self.inside
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
        parts += [f"{self.inside} inside"] * (self.inside != "none")
        if self.collectives != "native":
            parts.append("chosen collectives")
        parts += [f"ZeRO-{self.zero}"] * (self.zero > 0) + [f"recompute {self.recompute}"] * (self.recompute != "none")
        parts += ["sequence parallel"] * self.sequence_parallel
        return f"{', '.join(parts)}, {self.accumulate} x {self.micro_batch}"


@lru_cache(maxsize=8192)
def config_of(plan: Candidate, problem: Problem) -> RunConfig:
    """`Candidate.config`, once."""
    return plan.config(problem)


def _sends(layout: Layout, section: str) -> bool:
    """Whether what that section is about is sent within passes."""
    axis = {"tensor": layout.tensor, "pipeline": layout.pipe, "sharded": layout.shard if layout.pipe == 1 else 1}
    return axis[section] > 1


def divisors(number: int) -> list[int]:
    """Ascending."""
    return [one for one in range(1, number + 1) if number % one == 0]


def layouts(problem: Problem) -> Iterator[Layout]:
    """All that may be in a run.toml."""
    shape, world, by_rates = problem.shape, problem.cluster.world_size, problem.rates is not None
    inside = len(problem.cluster.host_of(0).devices)
    most = {
        "tensor": gcd(shape.kv_heads, shape.hidden, world if by_rates and world <= 16 else inside),
        "seq": inside if by_rates else 1,
        "expert": max(1, shape.experts) if by_rates else 1,
        "pipe": world,
        "outer": world if by_rates else len(problem.cluster.hosts),
        "shard": world if by_rates else 1,
    }
    """By axis, of what a degree is a divisor; data takes the ranks that they leave."""

    def suits(axis: str, degree: int) -> bool:
        if axis == "seq":
            return degree == 1 or problem.config.train.sequence % (2 * degree) == 0
        return axis != "pipe" or degree <= shape.layers

    def rest(axes: list[str], left: int, found: dict[str, int]) -> Iterator[Layout]:
        if not axes:
            yield Layout(**found, data=left)
            return
        for degree in divisors(gcd(left, most[axes[0]])):
            if suits(axes[0], degree):
                yield from rest(axes[1:], left // degree, found | {axes[0]: degree})

    for layout in rest(list(most), world, {}):
        if problem.rates is None or _allowed(layout, problem):
            yield layout


def _allowed(layout: Layout, problem: Problem) -> bool:
    """However replicas exchange."""
    content = {section: keys for section, keys in problem.content.items() if section not in ("sync", "compress")}
    degrees = {axis: getattr(layout, axis) for axis in AXES}
    try:
        validate(RunConfig, content | {"layout": content.get("layout", {}) | degrees}, "the plan")
    except UserError:
        return False
    return True


def exchanges(problem: Problem, layout: Layout) -> Iterator[dict[str, Any]]:
    """Ways in which the replicas of a layout may exchange."""
    if layout.outer == 1:
        kinds = problem.kept_or("compress.kind", CODECS) if layout.of_gradients.data * layout.expert > 1 else ("none",)
        yield from ({"codec": kind} for kind in kinds)
        return
    for every in problem.kept_or("sync.every", EVERY):
        for codec in problem.kept_or("compress.kind", RARE_CODECS if layout.expert == 1 else ("none",)):
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
            for savings, inside in product(_savings(problem, layout, schedule), _inside_codes(problem, layout)):
                yield Candidate(layout=layout, micro_batch=micro, accumulate=count, schedule=schedule, inside=inside, **savings)


def variants(problem: Problem, draft: Candidate) -> Iterator[Candidate]:
    """Of a draft, all that keep what the user keeps; whether they can run and fit is for `price`."""
    kept = {key: problem.kept_or(key, ())[0] for key in problem.kept}
    for exchange in exchanges(problem, draft.layout):
        one = replace(draft, **exchange)
        if _keeps(one, kept):
            yield one


def _inside_codes(problem: Problem, layout: Layout) -> Iterable[str]:
    sends = any(_sends(layout, section) for section in ("tensor", "pipeline", "sharded"))
    return INSIDE if sends and problem.rates is not None and not problem.kept & set(INSIDE_KEYS) else ("none",)


def _savings(problem: Problem, layout: Layout, schedule: str) -> Iterator[dict[str, Any]]:
    """What saves memory. Beyond `thinwire train`, what costs nothing is always done."""
    kinds = problem.kept_or("train.recompute", RECOMPUTE)
    if not problem.beyond or problem.rates is not None:
        yield from ({"recompute": kind} for kind in kinds if kind == "none" or schedule not in APART)
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
