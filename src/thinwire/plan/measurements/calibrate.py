"""A maximum a posteriori update of the model's factors from a few measured rows, or from many tables.

    theta      logarithms of the factors; prior: normal around a mean, deviations SPREAD
    u_k        of each of several tables: what its machine with its software takes longer than the model has it; prior: normal
               around 0, deviation BETWEEN. So a table teaches what all have in common, and a machine far off teaches it little
    r_i        log measured - log predicted(theta) - u of its table
    w_i        1 up to HUBER NOISE, beyond it falling as 1 / |r_i| (Huber 1964): what lies far off pulls no harder for that
    minimise   sum w_i r_i^2 / NOISE^2 + sum ((theta - mean) / SPREAD)^2 + sum (u / BETWEEN)^2

by Gauss-Newton on numeric derivatives, the weights anew in each round.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import exp

import numpy as np
from numpy.typing import NDArray

from thinwire.plan.gpu.step import Factors, Terms, seconds

SPREAD = Factors(products=0.10, memory=0.25, host=0.5, intra=0.35, inter=0.6, latency=0.7, torch=0.10, rest=0.20)
"""Deviations of the logarithms of the factors before anything is measured."""
COMMON = SPREAD._replace(products=0.05, rest=0.03)
"""Of what many machines have in common, beside BETWEEN of each: of some values, those with the least error on tables left out."""
NOISE = 0.05
"""Deviation of the logarithm of a measured step: releases of one library differ so much on one configuration."""
BETWEEN = 0.10
HUBER = 1.5
ROUNDS = 8
_STEP = 0.02

Vector = NDArray[np.float64]


def factors(theta: Vector) -> Factors:
    """From logarithms."""
    return Factors(*(exp(value) for value in theta))


def update(
    terms: Terms,
    measured: Sequence[float] | Vector,
    mean: Vector | None = None,
    table: Sequence[int] | None = None,
) -> Vector:
    """Logarithms of the factors after steps of `terms` (columns) took `measured` seconds, from a prior around `mean`.

    table: the number of each row's table, where they are of several machines; None: of one, which the factors then describe.
    """
    mean = np.zeros(len(SPREAD)) if mean is None else mean
    target, count = np.log(np.asarray(measured)), len(mean)
    member = np.zeros((len(target), 0)) if table is None else np.eye(max(table) + 1)[list(table)]
    spread = SPREAD if table is None else COMMON
    prior = np.array([1 / one**2 for one in spread] + [1 / BETWEEN**2] * member.shape[1])
    apart = prior.copy()
    start = np.concatenate([mean, np.zeros(member.shape[1])])
    found = start.copy()
    for _ in range(ROUNDS):
        theta = found[:count]
        now = np.log(seconds(terms, factors(theta)))
        moved = (np.log(seconds(terms, factors(theta + step))) for step in _STEP * np.eye(count))
        slope = np.concatenate([np.stack([(one - now) / _STEP for one in moved], axis=1), member], axis=1)
        left = target - now - member @ found[count:]
        trusted = 1 / (1 + (found[count:] / BETWEEN) ** 2)
        apart[count:] = prior[count:] * trusted
        weight = np.minimum(1.0, HUBER * NOISE / np.maximum(np.abs(left), 1e-12)) / NOISE**2
        weight *= member @ trusted if len(trusted) else 1.0
        matrix = slope.T @ (slope * weight[:, None]) + np.diag(apart)
        found = found + np.clip(np.linalg.solve(matrix, slope.T @ (weight * left) + apart * (start - found)), -0.7, 0.7)
    return found[:count]
