"""What runs teach of the machine that they ran on: a maximum a posteriori update of its factors (`plan.calibration`).

    theta     logarithms of the factors; prior: normal around what was known, with its deviations
    p(theta)  terms of a step, predicted anew from the run's run.toml and cluster.toml
    r         of a run: log of step measured / predicted, and measured - predicted of computing, wires and optimizer over the
              measured step, all of them / NOISE
    w         of a run: (NU + 4) / (NU + |r|^2), a multivariate Student's t (Lange, Little, Taylor 1989): the further off a run
              lies, the less it pulls
    minimise  sum w |r|^2 + |(theta - mean) / deviation|^2

by Gauss-Newton on numeric derivatives. Each run is also predicted without itself: by one such step away from it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from thinwire.cluster import Cluster, load_cluster
from thinwire.config.run import RunConfig, load_run
from thinwire.errors import UserError
from thinwire.layout import Layout
from thinwire.plan.calibration import BETWEEN, SPREAD, Calibration, Factors, Known, Machine, machine_name, software
from thinwire.plan.cost import predict, ranks_per_core
from thinwire.record import Record, Replanned, RunFolder, StepCost
from thinwire.train.outline import outline

NOISE = 0.05
NU = 4.0
ROUNDS = 15
DRIFT = 0.03
"""Deviation by which a machine may have changed until it is learnt of again."""
_STEP = 0.02

Vector = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Ran:
    """A run that has ended, as its folder tells it."""

    config: RunConfig
    layout: Layout
    cluster: Cluster
    record: Record
    measured: StepCost

    @property
    def plan(self) -> str:
        """In words."""
        kinds = [self.config.sync.kind, getattr(self.config.compress, "kind", "none")]
        return f"{self.layout}, {', '.join(kinds)}, {self.config.sync.accumulate} x {self.config.train.micro_batch}"

    def terms(self, theta: Vector) -> Vector:
        """Predicted seconds: computing, wires, optimizer."""
        factors = Factors(*np.exp(theta))
        cluster = factors.cluster(self.cluster)
        rates = cluster.declared_rates
        assert rates is not None, "see read_run"
        shape = self.config.model.shape()
        setting, transfers, carrier = factors.outline(outline)(self.config, shape, self.layout, cluster, rates)
        if self.record.paced:
            setting = replace(setting, ranks_per_core=ranks_per_core(self.layout.world_size))
        found = predict(setting, transfers, carrier=carrier)
        return np.array([found.compute_s, found.exposed_s + found.waiting_s, found.optimizer_s])

    def left(self, terms: Vector) -> Vector:
        """r of the top."""
        one = self.measured
        seen = np.array([one.compute_s, one.exposed_s + one.waiting_s, one.optimizer_s])
        return np.array([np.log(one.step_s / terms.sum()), *((seen - terms) / one.step_s)]) / NOISE


def read_run(path: Path) -> Ran:
    """UserError, in one line, for a folder that teaches nothing."""
    folder = RunFolder.open(path)
    measured = folder.measured()
    if measured is None or not measured.step_s > 0:
        raise UserError(f"{path} has no measured.json: a run that has not ended teaches nothing")
    if not folder.has("cluster.toml"):
        raise UserError(f"{path} has no cluster.toml: name the cluster in cluster.file, or train with --plan auto, and run again")
    config, cluster, record = load_run(path / "run.toml", []), load_cluster(str(path / "cluster.toml")), folder.record()
    config.task.only_language_model("learning from runs")
    if cluster.declared_rates is None:
        raise UserError(f"{path}: {cluster.name} has no flops_per_s for all devices, so no plan of it could be calibrated")
    if config.sync.by_speed:
        raise UserError(
            f"{path}: sync.assign = 'by_speed' gave ranks other micro-batches as it went; learn from runs with 'equal'"
        )
    if any(isinstance(event, Replanned) for event in folder.events()):
        raise UserError(f"{path}: its plan changed while it trained (train.replan); learn from runs whose plan stayed")
    layout = config.layout.resolve(record.world_size, rare=config.sync.rare)
    ran = Ran(config=config, layout=layout, cluster=cluster, record=record, measured=measured)
    ran.terms(np.zeros(len(SPREAD)))  # what cannot be predicted says so here
    return ran


def learn(calibration: Calibration, runs: Sequence[Ran]) -> Calibration:
    """With what these teach, run by run only once, whatever is given."""
    for name, soft in dict.fromkeys(_machine(one) for one in runs):
        mine = [one for one in runs if _machine(one) == (name, soft)]
        before = calibration.of(mine[0].cluster, soft) or Machine(name=name)
        own = before.runs if before.software == soft else ()
        known = {(run.started, run.plan) for run in own}
        mine = [one for one in mine if (one.record.started, one.plan) not in known]
        wider = np.minimum(SPREAD, np.hypot(before.deviation, DRIFT if before.software == soft else np.array(BETWEEN)))
        if mine:
            before = replace(before, software=soft, runs=own, deviation=Factors(*wider.tolist()))
            calibration = calibration.with_machine(update(before, mine))
    return calibration


def update(machine: Machine, runs: Sequence[Ran]) -> Machine:
    """The machine after runs on it."""
    mean, precision = np.array(machine.mean), np.diag(1 / np.array(machine.deviation) ** 2)
    theta = mean.copy()
    for _ in range(ROUNDS):
        left, slope = _around(runs, theta)
        weight = (NU + left.shape[1]) / (NU + (left**2).sum(1))
        matrix = np.einsum("r,rik,ril->kl", weight, slope, slope) + precision
        pull = np.einsum("r,rik,ri->k", weight, slope, left)
        step = np.clip(np.linalg.solve(matrix, pull + precision @ (mean - theta)), -0.5, 0.5)
        theta = theta + step
        if np.abs(step).max() < 1e-3:
            break
    known = []
    for number, run in enumerate(runs):
        w, one = weight[number], slope[number]
        without = theta - np.linalg.solve(matrix - w * one.T @ one, w * one.T @ left[number])
        known.append(
            Known(
                started=run.record.started,
                plan=run.plan,
                measured_s=run.measured.step_s,
                uncalibrated_s=float(run.terms(np.zeros(len(theta))).sum()),
                held_out_s=float(run.terms(without).sum()),
            )
        )
    deviation = np.sqrt(np.diag(np.linalg.inv(matrix)))
    return replace(machine, mean=Factors(*theta.tolist()), deviation=Factors(*deviation.tolist()), runs=(*machine.runs, *known))


def _around(runs: Sequence[Ran], theta: Vector) -> tuple[Vector, Vector]:
    """r of each run, and how predictions of what it is made of change with theta."""
    steps = _STEP * np.eye(len(theta))
    left = np.array([run.left(run.terms(theta)) for run in runs])
    moved = np.array([[run.left(run.terms(theta + step)) for step in steps] for run in runs])
    return left, (left[:, :, None] - moved.transpose(0, 2, 1)) / _STEP


def _machine(run: Ran) -> tuple[str, str]:
    return machine_name(run.cluster), software(run.record.torch or "", run.record.thinwire)
