"""Another plan while a run trains: what can change without a restart, where links or ranks turn out otherwise than predicted.

    measured    seconds of a step between two reports: of computing, by rank, and of exchange that is seen
    off         one of them is more than OFF times what is predicted, or as much less, and by more than LEAST of a step, in two
                looks in a row; each is over whole periods of the exchange
    believed    from then on: ranks at the rates at which they computed, and all links so many times slower, or faster, as makes
                the exchange take what it took. Which of them it is does not show in one step
    chosen      of the plans that differ in codes, in periods and in who has how many micro-batches the soonest at the same loss,
                by the planner's prices (`plan.price`), if the present one takes FASTER times as long

    collectives where they are chosen (`collectives.kind`), all ranks choose anew when the plan changes, and where it stays but
                the exchange is off: by price on the links as believed, or by measuring. Other plans are priced with what the run
                has chosen so far, and gloo's own for the rest

Rank 0 looks. Its choice goes along with the summary of the next report, so that all ranks change in the same step. What codes owe
is owed on (`Synchroniser.switch`).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from math import sqrt
from typing import Any, NamedTuple

import torch.distributed as dist

from thinwire.cluster import Cluster, Quantity
from thinwire.collectives.price import Carrier
from thinwire.collectives.tuned.tuner import Chosen, Tuner
from thinwire.config.model import ModelConfig
from thinwire.config.run import CollectivesSection, RunConfig
from thinwire.errors import UserError
from thinwire.plan.calibration import Factors
from thinwire.plan.candidates import CODECS, EVERY, RARE_CODECS, Candidate, Problem, config_of
from thinwire.plan.cost import Prediction, predict
from thinwire.plan.price import Priced, price
from thinwire.train.assign import Assignment, assign
from thinwire.train.outline import outline
from thinwire.train.setup import choose_carrier
from thinwire.units import show

OFF, LEAST, FASTER = 1.5, 0.05, 1.1
MOST = 256.0
"""Times by which links may turn out slower, or faster."""


class Choice(NamedTuple):
    """by_speed: whether ranks have as many micro-batches as their speed allows, else all as many."""

    plan: Candidate
    by_speed: bool


class Collectives(NamedTuple):
    """That are chosen, and the groups that do, by axis."""

    tuner: Tuner
    groups: Mapping[str, dist.ProcessGroup]


class Replanner:
    """On each rank of a run of whole replicas, made of the same arguments; `look` is for rank 0."""

    def __init__(
        self,
        config: RunConfig,
        shape: ModelConfig,
        cluster: Cluster,
        rates: Sequence[float],
        crowd: float,
        collectives: Collectives | None = None,
    ) -> None:
        """cluster: with the numbers of the ranks; rates: by rank; crowd: ranks a core; collectives: None for gloo's own.
        UserError where links are not known."""
        if not cluster.links:
            raise UserError("train.replan = true compares exchanges with what links carry; name the cluster in cluster.file")
        train, sync, compress = config.train, config.sync, config.compress
        layout = config.laid_out(cluster.world_size)
        changes = {"layout": config.layout.model_copy(update={"map": "ranks"}), "collectives": CollectivesSection()}
        given = config.model_copy(update=changes)
        content = given.model_dump(exclude_defaults=True)
        sparse = sync.kind == "sparseloco"
        kept = {f"{section}.{key}" for section in ("sync", "compress") for key in content.get(section, {})}
        kept -= {"sync.every"} if sparse else {"sync.every", "compress.kind"}
        now = Candidate(
            layout=layout,
            micro_batch=train.micro_batch,
            accumulate=sync.accumulate,
            sync=sync.kind,
            every=getattr(sync, "every", 1),
            overlap=getattr(sync, "overlap", 0),
            codec="topk" if sparse else compress.kind,
        )
        self._problem = Problem(
            cluster=_rated(cluster, rates),
            config=given,
            shape=shape,
            batch=now.sequences,
            tokens=float(train.steps * now.sequences * train.sequence),
            kept=frozenset(kept | {"layout.map"}),
            outline=outline,
            ranks_per_core=crowd,
        )
        codecs = dict.fromkeys((now.codec, *(() if sparse else RARE_CODECS if sync.rare else CODECS)))
        periods = dict.fromkeys((now.every, *(EVERY if sync.rare else ())))
        speeds = (False, True) if sync.kind == "every_step" and sync.accumulate > 1 else (False,)
        self.choices = [
            Choice(replace(now, every=every, codec=codec), by_speed)
            for every, codec, by_speed in product(periods, codecs, speeds)
        ]
        self.choice, self.why = self.choices[0], ""
        self._collectives = collectives
        self._steps, self._exchange_s, self._off = 0, 0.0, 0

    @property
    def config(self) -> RunConfig:
        """Of the present choice; of it `sync` and `compress` are the run's."""
        return config_of(self.choice.plan, self._problem)

    @property
    def changes(self) -> dict[str, Any]:
        """Of keys of run.toml, as `config.run.changed` takes them."""
        changes = {"compress": self.config.compress.model_dump(exclude_none=True)}
        return changes | ({"sync.every": self.choice.plan.every} if self.config.sync.rare else {})

    def assignment(self, before: Assignment, compute_s: Sequence[float]) -> Assignment:
        """Of the present choice. compute_s: by rank, of a step with `before`."""
        return self._counts(self.choice, [seconds / count for seconds, count in zip(compute_s, before, strict=True)])

    def look(self, steps: int, compute_s: Sequence[float], exchange_s: float, assignment: Assignment) -> int:
        """After so many more steps: the number in `choices`, from 1 on, of what all should change to; 0: nothing."""
        self._steps, self._exchange_s = self._steps + steps, self._exchange_s + steps * exchange_s
        if self._steps % self.choice.plan.every:
            return 0
        exchange_s, self._steps, self._exchange_s = self._exchange_s / self._steps, 0, 0.0
        now = self.prediction(assignment)
        seconds = ((max(compute_s), now.compute_s + now.waiting_s, "computing"), (exchange_s, now.exposed_s, "exchange"))
        far = [one for one in seconds if _far(*one[:2]) and abs(one[0] - one[1]) > LEAST * now.step_s]
        self._off = self._off + 1 if far else 0
        if self._off < 2:
            return 0
        self._off, each_s = 0, [seconds / count for seconds, count in zip(compute_s, assignment, strict=True)]
        self._believe(compute_s, exchange_s, assignment)
        prices = dict(self._prices(each_s))
        present, best = prices[self.choices.index(self.choice)], min(prices, key=lambda number: prices[number].time_s)
        self.why = ", ".join(f"{what} {show(took_s, 's')} a step, predicted {show(said_s, 's')}" for took_s, said_s, what in far)
        if present.time_s >= FASTER * prices[best].time_s:
            self.why += f"; a step of {show(prices[best].step_s, 's')} in place of {show(present.step_s, 's')}, predicted"
            return best + 1
        if self._collectives is None or all(what == "computing" for *_, what in far):
            return 0
        self.why += "; collectives are chosen anew"
        return self.choices.index(self.choice) + 1

    def take(self, number: int) -> None:
        """What `look` has chosen on rank 0."""
        self.choice = self.choices[number - 1]
        self._steps, self._exchange_s = 0, 0.0

    def choose(self) -> None:
        """Collectives anew for the links as rank 0 believes them, of all that the present choice sends. Collective."""
        if self._collectives is not None:
            self._collectives.tuner.again(self._problem.cluster)
            _, transfers, _ = self._problem.outlined(self.choice.plan)
            choose_carrier(self._collectives.tuner, self._problem.cluster, self._collectives.groups, transfers)

    def prediction(self, assignment: Assignment) -> Prediction:
        """Of the present choice, with what is believed."""
        setting, transfers, _ = self._problem.outlined(self.choice.plan)
        crowd = self._problem.ranks_per_core
        setting = replace(setting, assignment=assignment, ranks_per_core=crowd, rates_are="measured while training")
        return predict(setting, transfers, carrier=self._carrier(self._problem), routes=self._problem.routes)

    def _carrier(self, problem: Problem) -> Carrier:
        """As the groups have decided, on the links of the problem."""
        return Carrier() if self._collectives is None else Chosen(self._collectives.tuner, problem.cluster)

    def _prices(self, each_s: Sequence[float]) -> Iterator[tuple[int, Priced]]:
        """By number. each_s: seconds of a micro-batch by rank."""
        assert self._problem.rates is not None
        for number, choice in enumerate(self.choices):
            counts = self._counts(choice, each_s)
            rates = [rate * choice.plan.accumulate / count for rate, count in zip(self._problem.rates, counts, strict=True)]
            problem = replace(self._problem, cluster=_rated(self._problem.cluster, rates)) if choice.by_speed else self._problem
            try:
                yield number, price(choice.plan, problem, self._carrier(problem))
            except UserError:
                continue  # such as a period no longer than the overlap

    def _counts(self, choice: Choice, each_s: Sequence[float]) -> Assignment:
        equal = (choice.plan.accumulate,) * len(each_s)
        return assign(sum(equal), each_s) if choice.by_speed else equal

    def _believe(self, compute_s: Sequence[float], exchange_s: float, assignment: Assignment) -> None:
        setting, _, _ = self._problem.outlined(self.choice.plan)
        said_s = replace(setting, assignment=assignment).compute_s
        turned = [rate * said / took for rate, said, took in zip(setting.flops_per_s, said_s, compute_s, strict=True)]
        before = replace(self._problem, cluster=_rated(self._problem.cluster, turned))
        least, most = 1 / MOST, MOST
        while most > 1.01 * least:
            times = sqrt(least * most)
            self._problem = replace(before, cluster=Factors(links=times).cluster(before.cluster))
            least, most = (times, most) if self.prediction(assignment).exposed_s < exchange_s else (least, times)


def _far(took_s: float, said_s: float) -> bool:
    return not 1 / OFF < took_s / max(said_s, 1e-9) < OFF


def _rated(cluster: Cluster, rates: Sequence[float]) -> Cluster:
    """With these flops a second, by rank."""
    by_name = dict(zip(cluster.ranks, rates, strict=True))
    hosts = [
        replace(host, devices=tuple(replace(one, flops_per_s=Quantity(by_name[one.name], "measured")) for one in host.devices))
        for host in cluster.hosts
    ]
    return replace(cluster, hosts=tuple(hosts))
