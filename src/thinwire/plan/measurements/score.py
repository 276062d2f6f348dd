"""How well the model predicts a table: uncalibrated, from five rows, without a model's rows; beside a model that knows nothing.

uncalibrated      factors from the reference tables only, without any that has a row in common with the one that is scored
5 rows            a maximum a posteriori update from five rows of the table, scored on its others; mean of DRAWS seeded draws
leave group out   an update from all rows of other models, scored on the model left out
null              one rate of flops a table, for each row that of all others (the mean of logarithms)
regret            among rows that differ in layout only (model, sequence, batch, devices): measured seconds of the one predicted
                  fastest over those of the fastest, less one; mean over such sets
coverage          part of rows whose measured seconds lie within the interval that is meant to hold INTERVAL of them: the quantile
                  of the reference tables' absolute errors, each table for as much
coverage_5rows    the same after five rows, of the others: with the quantile of what five rows left of errors in reference tables
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from math import exp, log
from random import Random
from statistics import fmean
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from thinwire.plan.gpu.job import Job
from thinwire.plan.gpu.room import FITS, room
from thinwire.plan.gpu.step import columns, seconds, terms
from thinwire.plan.measurements.calibrate import SPREAD, Vector, factors, update
from thinwire.plan.measurements.table import Measured, Table

DRAWS = 20
FEW = 5
INTERVAL = 0.8
UNKNOWN = 0.3
"""Half width of the interval where there is no reference table, in logarithms."""


class Prepared:
    """A table, with the terms of its timed rows as columns."""

    def __init__(self, table: Table) -> None:
        self.table, self.name = table, table.name
        self.timed = table.timed
        self.terms = [terms(row.job) for row in self.timed]
        self.measured = np.array([row.seconds for row in self.timed], dtype=np.float64)
        self.keys = {row.key for row in self.timed}

    def after(self, theta: Vector, indices: Sequence[int]) -> Vector:
        """Logarithms of the factors after these rows, from a prior around theta."""
        return update(columns([self.terms[index] for index in indices]), self.measured[list(indices)], theta)

    def predicted(self, theta: Vector) -> Vector:
        """Seconds of each row."""
        found: Vector = seconds(columns(self.terms), factors(theta))
        return found


class Known:
    """Reference tables, and what several of them say together."""

    def __init__(self, tables: Sequence[Table]) -> None:
        self.tables = [Prepared(table) for table in tables if table.timed]
        self._few: dict[tuple[str, frozenset[object]], Vector] = {}

    def _others(self, scored: Prepared) -> list[Prepared]:
        """Those that share no row with it."""
        return [one for one in self.tables if one.name != scored.name and not one.keys & scored.keys]

    def after_few(self, prepared: Prepared) -> Vector:
        """Logarithms of predicted over measured after FEW rows, of the others, in each of DRAWS draws; empty for fewer rows."""
        key = prepared.name, frozenset(prepared.keys)
        if key not in self._few:
            theta, count = self.prior(prepared)[0], len(prepared.terms)
            found: list[Vector] = []
            for draw in range(DRAWS if count >= FEW + 2 else 0):
                taken = sorted(Random(f"{prepared.name} {draw}").sample(range(count), FEW))
                logs = np.log(prepared.predicted(prepared.after(theta, taken)) / prepared.measured)
                found.append(np.delete(logs, taken))
            self._few[key] = np.concatenate([np.zeros(0), *found])
        return self._few[key]

    def half_after_few(self, scored: Prepared) -> float:
        """Half width of the interval after FEW rows."""
        errors = [np.abs(one) for one in map(self.after_few, self._others(scored)) if len(one)]
        return _quantile(errors) if errors else UNKNOWN

    def prior(self, scored: Prepared) -> tuple[Vector, float]:
        """(logarithms of factors, half width of the interval in logarithms) from all tables that share no row with `scored`."""
        others = self._others(scored)
        if not others:
            return np.zeros(len(SPREAD)), UNKNOWN
        measured = np.concatenate([one.measured for one in others])
        together = columns([row for one in others for row in one.terms])
        theta = update(together, measured, table=[number for number, one in enumerate(others) for _ in one.terms])
        errors = np.abs(np.log(seconds(together, factors(theta)) / measured))
        return theta, _quantile(np.split(errors, np.cumsum([len(one.terms) for one in others])[:-1]))


def _quantile(errors: Sequence[Vector]) -> float:
    """Below which INTERVAL of errors lie, those of each table for as much."""
    share = np.concatenate([np.full(len(one), 1 / len(one) / len(errors)) for one in errors])
    together = np.concatenate(errors)
    order = np.argsort(together)
    return float(together[order][np.searchsorted(np.cumsum(share[order]), INTERVAL)])


def score(prepared: Prepared, known: Known) -> tuple[dict[str, Any], Vector]:
    """Of a table with timed rows, and the predicted seconds of each of them, uncalibrated.

    Errors are in percent of the measured, None where the table does not allow the question. model_rate: each row with the rate
    that the others of its model have; memory: error of the peak; oom: found of those that did not fit, and how many of those that
    ran were refused.
    """
    theta, half = known.prior(prepared)
    predicted = prepared.predicted(theta)
    measured = prepared.measured
    errors = _percent(predicted, measured)
    fits = [(row, room(row.job)) for row in prepared.table.rows]
    peaks = [100 * abs(need.total / row.memory_bytes - 1) for row, need in fits if row.memory_bytes]
    refused = {row.number: need.total > FITS * row.job.device.memory_bytes for row, need in fits}
    wrong = sum(refused[row.number] for row, _ in fits if row.oom is False)
    few = known.after_few(prepared)
    did_not = [row.number for row, _ in fits if row.oom]
    result = dict(
        table=prepared.name,
        rows=len(errors),
        mape_uncalibrated=float(errors.mean()),
        median=float(np.median(errors)),
        max=float(errors.max()),
        null_mape=null_mape(prepared.timed),
        mape_5rows=100 * float(np.abs(np.exp(few) - 1).mean()) if len(few) else None,
        mape_leave_group_out=_groups(prepared, theta),
        model_rate=_one_rate(prepared, predicted),
        spearman=spearman(predicted, measured),
        regret=_regret(prepared.timed, predicted),
        coverage=float((np.abs(np.log(predicted / measured)) <= half).mean()),
        coverage_5rows=float((np.abs(few) <= known.half_after_few(prepared)).mean()) if len(few) else None,
        memory=fmean(peaks) if peaks else None,
        oom=f"{sum(refused[number] for number in did_not)}/{len(did_not)}, {wrong} false",
    )
    return result, predicted


def flops(job: Job) -> float:
    """Of a step, forward and backward, nothing computed again: (6 N_m + 12 L h s) a token."""
    products = job.layers * (job.layer_parameters[0] + job.layer_parameters[1] * job.experts_per_token / job.experts)
    products += job.embedding_parameters
    return (6 * products + 12 * job.layers * job.width * job.sequence) * job.sequence * job.global_batch


def null_mape(rows: Sequence[Measured]) -> float | None:
    """Percent, of one rate for all rows but the one that it predicts."""
    if len(rows) < 2:
        return None
    rates = [log(flops(row.job) / ((row.seconds or 0) * row.job.devices)) for row in rows]
    total, count = sum(rates), len(rates)
    # predicted / measured seconds = own rate / rate of the others
    return 100 * fmean(abs(exp(rate - (total - rate) / (count - 1)) - 1) for rate in rates)


def spearman(one: Sequence[float] | Vector, other: Sequence[float] | Vector) -> float | None:
    """Rank correlation; equal values share the mean of their ranks. None for fewer than three, or where all are equal."""
    if len(one) < 3 or len(set(one)) == 1 or len(set(other)) == 1:
        return None
    return float(spearmanr(one, other).statistic)


def _percent(predicted: Vector, measured: Vector) -> Vector:
    return 100 * np.abs(predicted / measured - 1)


def _groups(prepared: Prepared, theta: Vector) -> float | None:
    groups = _sets(prepared.timed, lambda row: row.group)
    if len(groups) < 2:
        return None
    errors: list[float] = []
    for inside in groups:
        others = [index for index in range(len(prepared.terms)) if index not in set(inside)]
        errors += _percent(prepared.predicted(prepared.after(theta, others)), prepared.measured)[inside].tolist()
    return fmean(errors)


def _one_rate(prepared: Prepared, predicted: Vector) -> float | None:
    """Percent, each row with the rate that all others of its model have on the mean."""
    logs = np.log(predicted / prepared.measured)
    errors = []
    for indices in _sets(prepared.timed, lambda row: row.group):
        own, count = logs[indices], len(indices)
        if count > 1:
            errors += (100 * np.abs(np.exp(own - (own.sum() - own) / (count - 1)) - 1)).tolist()
    return fmean(errors) if errors else None


def _regret(rows: Sequence[Measured], predicted: Vector) -> float | None:
    """Percent."""
    sets = _sets(rows, lambda row: (row.group, row.job.layers, row.job.sequence, row.job.global_batch, row.job.devices))
    found = []
    for indices in sets:
        if len(indices) > 1:
            chosen = min(indices, key=lambda index: predicted[index])
            found.append(100 * ((rows[chosen].seconds or 0) / min(rows[index].seconds or 0 for index in indices) - 1))
    return fmean(found) if found else None


def _sets(rows: Sequence[Measured], key: Callable[[Measured], object]) -> list[list[int]]:
    found: dict[object, list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        found[key(row)].append(index)
    return list(found.values())
