"""What runs have taught of machines: factors on seconds that the planner predicts, one file for all, and how far it is off since.

    computing   seconds of passes, beside the rates of the cluster file
    links       seconds on a link, beside its bandwidth
    calls       MESSAGE_OVERHEAD_S, once a call
    coding      seconds of coding and decoding
    optimizer   seconds of the update

A machine of which nothing is known begins with the mean of those that are known, each counting for 1 / (its variance +
BETWEEN^2), and factors of 1 for 1 / SPREAD^2 (the normal-normal model: Gelman et al., Bayesian Data Analysis, section 5.4).

Half width of the interval: the PART quantile of the errors of runs, each predicted without itself, beside those of PSEUDO, of
which the same quantile is the planner's own. So with many runs the interval holds as many as it says; an outlier counts as one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from math import exp, log
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tomli_w

from thinwire import __version__
from thinwire.cluster import Cluster, Device, Link, Quantity
from thinwire.collectives.price import MESSAGE_OVERHEAD_S
from thinwire.config.model import ModelConfig
from thinwire.config.run import RunConfig
from thinwire.errors import UserError
from thinwire.layout import Layout
from thinwire.plan import penalties
from thinwire.plan.candidates import Outline, Problem
from thinwire.plan.cost import GPU_MEMORY_BYTES_PER_S, MEMORY_BYTES_PER_S
from thinwire.tomlfile import read_toml
from thinwire.traffic import Transfer

FILE = "calibration.toml"
PART = 0.8
PSEUDO = (0.11, 0.33, 0.58, 0.89, 1.44)
"""In half widths of the planner's own interval; the quantiles of a normal at 0.1, 0.3, .. 0.9."""


class Factors(NamedTuple):
    """Of seconds of each kind; 1: as the planner has it."""

    computing: float = 1.0
    links: float = 1.0
    calls: float = 1.0
    coding: float = 1.0
    optimizer: float = 1.0

    def cluster(self, cluster: Cluster) -> Cluster:
        """As its machines have turned out: rates of devices, of their memories and of links."""

        def device(one: Device) -> Device:
            usual = MEMORY_BYTES_PER_S if one.kind == "cpu" else GPU_MEMORY_BYTES_PER_S
            memory = one.memory_bytes_per_s or Quantity(usual, "usual")
            rate = _slower(one.flops_per_s, self.computing) if one.flops_per_s else None
            return replace(one, flops_per_s=rate, memory_bytes_per_s=_slower(memory, self.optimizer))

        def link(one: Link) -> Link:
            return replace(one, bandwidth_bps=_slower(one.bandwidth_bps, self.links))

        hosts = tuple(replace(host, devices=tuple(device(one) for one in host.devices)) for host in cluster.hosts)
        return replace(cluster, hosts=hosts, links=tuple(link(one) for one in cluster.links))

    def outline(self, outline: Outline) -> Outline:
        """The same, with calls and coding as they have turned out."""

        def outlined(config: RunConfig, shape: ModelConfig, layout: Layout, cluster: Cluster, rates: tuple[float, ...]) -> Any:
            setting, transfers, carrier = outline(config, shape, layout, cluster, rates)
            return setting, [self._transfer(one) for one in transfers], carrier

        return outlined

    def _transfer(self, one: Transfer) -> Transfer:
        return replace(one, work_s=one.work_s * self.coding + MESSAGE_OVERHEAD_S * (self.calls - 1))


SPREAD = Factors(computing=0.15, links=0.15, calls=0.7, coding=0.5, optimizer=0.7)
"""Deviations of the logarithms of the factors before anything is measured."""
NOTHING = Factors(computing=0.0, links=0.0, calls=0.0, coding=0.0, optimizer=0.0)
"""Logarithms of factors of 1."""
BETWEEN = Factors(computing=0.10, links=0.05, calls=0.4, coding=0.3, optimizer=0.4)
"""Of one machine from another."""


@dataclass(frozen=True, kw_only=True)
class Known:
    """One run that was learnt from. uncalibrated_s, held_out_s: of a step, without what this run taught."""

    started: str
    plan: str
    measured_s: float
    uncalibrated_s: float
    held_out_s: float

    @property
    def error(self) -> float:
        """Logarithm of measured over predicted, of a run that was not learnt from."""
        return log(self.measured_s / self.held_out_s)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What is known of one, with its software. mean, deviation: of the logarithms of the factors; knobs: by name, those that have
    won trials."""

    name: str
    software: str = ""
    mean: Factors = NOTHING
    deviation: Factors = SPREAD
    runs: tuple[Known, ...] = ()
    knobs: Mapping[str, int] = field(default_factory=dict)

    @property
    def factors(self) -> Factors:
        """Of seconds."""
        return Factors(*(exp(one) for one in self.mean))

    @property
    def half_width(self) -> float:
        """Of the interval that is meant to hold PART of measured steps, in logarithms."""
        return half_width([run.error for run in self.runs])

    @property
    def covered(self) -> float:
        """Part of its runs that lay within the interval which all others make."""
        errors = [run.error for run in self.runs]
        inside = [abs(one) <= half_width(errors[:number] + errors[number + 1 :]) for number, one in enumerate(errors)]
        return sum(inside) / max(1, len(inside))

    def about(self) -> str:
        """In a line."""
        named = ", ".join(f"{name} x {one:.3g}" for name, one in self.factors._asdict().items())
        if not self.runs:
            return f"of machines like {self.name}: {named}"
        missed = np.median([abs(run.measured_s / run.held_out_s - 1) for run in self.runs])
        before = np.median([abs(run.measured_s / run.uncalibrated_s - 1) for run in self.runs])
        return (
            f"{self.name}, {self.software}: {named}; {len(self.runs)} runs, each predicted without itself, were {missed:.1%} off "
            f"on the median, uncalibrated {before:.1%}; intervals of {PART:.0%} held {self.covered:.0%} of them"
        )


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """All machines of a file."""

    machines: tuple[Machine, ...] = field(default=())

    def of(self, cluster: Cluster, software: str) -> Machine | None:
        """What is known of a cluster: by its own runs, best with this software; else by all others. None where nothing is."""
        name = machine_name(cluster)
        own = [one for one in self.machines if one.name == name]
        exact = [one for one in own if one.software == software]
        return (exact or own or [self.common(name)])[-1] if self.machines else None

    def common(self, name: str) -> Machine:
        """Of a machine that has no runs yet."""
        means, variances = [], []
        for index, spread in enumerate(SPREAD):
            weights = [1 / (one.deviation[index] ** 2 + BETWEEN[index] ** 2) for one in self.machines]
            precision = 1 / spread**2 + sum(weights)
            means.append(sum(w * one.mean[index] for w, one in zip(weights, self.machines, strict=True)) / precision)
            variances.append(min(spread**2, 1 / precision + BETWEEN[index] ** 2))
        return Machine(name=name, mean=Factors(*means), deviation=Factors(*(one**0.5 for one in variances)))

    def with_machine(self, machine: Machine) -> "Calibration":
        """In the place of what was known of it."""
        key = machine.name, machine.software
        return Calibration(machines=(*(one for one in self.machines if (one.name, one.software) != key), machine))

    def applied(self, problem: Problem) -> tuple[Problem, str]:
        """The problem as the planner should see it, and what was taken, in a line; "" where nothing is known or used."""
        machine = self.of(problem.cluster, software())
        if machine is None or problem.rates is None or problem.outline is None:
            return problem, ""
        factors = machine.factors
        found = replace(
            problem,
            cluster=factors.cluster(problem.cluster),
            outline=factors.outline(problem.outline),
            spread=machine.half_width,
        )
        return found, f"calibrated by {machine.about()}"


def half_width(errors: Sequence[float]) -> float:
    """See the top."""
    usual = penalties.numbers()["interval"]["rates"]
    return float(np.quantile([*(usual * one for one in PSEUDO), *(abs(one) for one in errors)], PART))


def machine_name(cluster: Cluster) -> str:
    """Of which machine a run teaches."""
    kinds = " and ".join(sorted({device.kind for device in cluster.devices}))
    return f"{cluster.name}: {len(cluster.hosts)} hosts, {cluster.world_size} x {kinds}"


def software(torch: str = "", thinwire: str = __version__) -> str:
    """Versions; of torch the one that is installed."""
    return f"thinwire {thinwire}, torch {(torch or version('torch')).partition('+')[0]}"


def read(path: Path) -> Calibration:
    """What the file knows; nothing where there is none. UserError for one that is broken."""
    if not path.is_file():
        return Calibration()
    try:
        return Calibration(machines=tuple(_machine(one) for one in read_toml(path).get("machine", [])))
    except (TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path} cannot be read ({type(error).__name__}: {error}); remove it to begin anew") from None


def write(calibration: Calibration, path: Path) -> None:
    """UserError where the system refuses."""
    machines = [
        {
            "name": one.name,
            "software": one.software,
            "mean": one.mean._asdict(),
            "deviation": one.deviation._asdict(),
            "knobs": dict(one.knobs),
            "run": [vars(run) for run in one.runs],
        }
        for one in calibration.machines
    ]
    head = "# Written by thinwire plan --learn. mean, deviation: of the logarithms of factors on predicted seconds.\n\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(head + tomli_w.dumps({"machine": machines}), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None


def _machine(one: Mapping[str, Any]) -> Machine:
    factors = {name: Factors(**one[name]) for name in ("mean", "deviation")}
    runs = tuple(Known(**run) for run in one["run"])
    return Machine(name=one["name"], software=one["software"], runs=runs, knobs=one.get("knobs", {}), **factors)


def _slower(quantity: Quantity, factor: float) -> Quantity:
    if factor == 1:
        return quantity
    return Quantity(quantity.value / factor, source=f"{quantity.source}, learnt from runs")
