"""A maximum a posteriori update of the model's factors from a few measured rows, and how sure a prediction is then.

    theta      logarithms of the factors; prior: normal around a mean, deviations SPREAD
    r_i        log measured - log predicted(theta)
    w_i        1 up to HUBER NOISE, beyond it falling as 1 / |r_i| (Huber 1964): what lies far off pulls no harder for that
    minimise   sum w_i r_i^2 / NOISE^2 + sum ((theta - mean) / SPREAD)^2

by Gauss-Newton on numeric derivatives, the weights anew in each round.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import exp

import numpy as np
from numpy.typing import NDArray

from thinwire.plan.gpu.step import Factors, Terms, seconds

SPREAD = Factors(products=0.10, memory=0.25, host=0.5, intra=0.35, inter=0.6, latency=0.7, torch=0.10, rest=0.10)
"""Deviations of the logarithms of the factors before anything is measured."""
NOISE = 0.05
"""Deviation of the logarithm of a measured step: releases of one library differ so much on one configuration."""
HUBER = 1.5
ROUNDS = 5
_STEP = 0.02

Vector = NDArray[np.float64]


def factors(theta: Vector) -> Factors:
    """From logarithms."""
    return Factors(*(exp(value) for value in theta))


def update(
    terms: Terms,
    measured: Sequence[float] | Vector,
    mean: Vector | None = None,
    weights: Sequence[float] | None = None,
) -> Vector:
    """Logarithms of the factors after steps of `terms` (columns) took `measured` seconds, from a prior around `mean`.

    weights: of the rows.
    """
    mean = np.zeros(len(SPREAD)) if mean is None else mean
    given = np.ones(len(measured)) if weights is None else np.asarray(weights)
    target = np.log(np.asarray(measured))
    prior = 1.0 / np.array(SPREAD) ** 2
    theta = mean.copy()
    for _ in range(ROUNDS):
        now = np.log(seconds(terms, factors(theta)))
        moved = (np.log(seconds(terms, factors(theta + step))) for step in _STEP * np.eye(len(theta)))
        slope = np.stack([(one - now) / _STEP for one in moved], axis=1)
        left = target - now
        weight = given * np.minimum(1.0, HUBER * NOISE / np.maximum(np.abs(left), 1e-12)) / NOISE**2
        matrix = slope.T @ (slope * weight[:, None]) + np.diag(prior)
        change = np.linalg.solve(matrix, slope.T @ (weight * left) + prior * (mean - theta))
        theta = theta + np.clip(change, -0.7, 0.7)
    return theta
