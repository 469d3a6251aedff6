"""Bootstrap intervals of estimated policy values.

Whole groups of rows (users) are drawn with replacement, because rows of one user depend on each other; a policy and
what it is compared with are drawn together, because they share rows. The interval that is used is the studentized one
(bootstrap-t: Efron & Tibshirani 1993, section 12.5): sums of weights are skewed to the right, and where few rows carry
them the percentile interval covers the truth less often than it says (bench/rl_estimators.md).
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy.special import ndtr, ndtri

from jaxrec.rl.ope.estimators import Terms
from jaxrec.rl.ope.weights import group_sums

SAMPLES = 2000
CHUNK = 100_000  # draws that are held in memory at a time; they fit a core's cache, which halves the time
ROUNDING = 1e-12  # of the size of the terms: spread below it is that of sums in floating point


@dataclasses.dataclass(frozen=True)
class Interval:
    """An estimate, its interval at the level that was asked for, and its standard error over groups."""

    value: float
    low: float
    high: float
    standard_error: float


class Replicates(NamedTuple):
    """`value` and `standard_error` of the sample, and of each bootstrap sample ([samples]); `influence` [groups]: what
    each group adds to the error of the value (linearized)."""

    value: float
    standard_error: float
    influence: np.ndarray
    values: np.ndarray
    standard_errors: np.ndarray


Method = Callable[[Replicates, float], tuple[float, float]]


def studentized(replicates: Replicates, level: float) -> tuple[float, float]:
    """value - t* standard_error, with t* the quantiles of (value* - value) / standard_error*.

    Second-order accurate, for skewed means too (Hall 1988). Where resamples have no spread left t* is infinite, and so
    may be a bound: the log is then too small to tell.
    """
    errors = replicates.values - replicates.value
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.where(errors == 0, 0.0, errors / replicates.standard_errors)
    low, high = np.quantile(t, (1 - level) / 2, method="lower"), np.quantile(t, (1 + level) / 2, method="higher")
    if replicates.standard_error == 0:
        return replicates.value, replicates.value
    return replicates.value - high * replicates.standard_error, replicates.value - low * replicates.standard_error


def percentile(replicates: Replicates, level: float) -> tuple[float, float]:
    """The quantiles of the bootstrap values (Efron & Tibshirani 1993, section 13.3)."""
    low, high = np.quantile(replicates.values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def bias_corrected_accelerated(replicates: Replicates, level: float) -> tuple[float, float]:
    """BCa (Efron & Tibshirani 1993, equation 14.10), its acceleration from the influence of each group."""
    below = np.mean(replicates.values < replicates.value) + np.mean(replicates.values == replicates.value) / 2
    squares = np.sum(replicates.influence**2)
    if squares == 0 or below in (0.0, 1.0):
        return percentile(replicates, level)
    acceleration = np.sum(replicates.influence**3) / (6 * squares**1.5)
    bias, z = ndtri(below), ndtri(np.array([(1 - level) / 2, (1 + level) / 2]))
    low, high = np.quantile(replicates.values, ndtr(bias + (bias + z) / (1 - acceleration * (bias + z))))
    return float(low), float(high)


def interval(
    terms: Terms,
    groups: np.ndarray | None = None,
    level: float = 0.95,
    samples: int = SAMPLES,
    seed: int = 0,
    method: Method = studentized,
) -> Interval:
    """The value of the terms with its bootstrap interval; `groups` [rows]: whose row it is (None: each its own).

    The interval holds the value; a bound that the resamples do not tell is infinite.
    Raises ValueError for fewer than two groups, and where the rows have no weight.
    """
    return interval_of(replicates(terms, groups, samples, seed), level, method)


def interval_of(drawn: Replicates, level: float = 0.95, method: Method = studentized) -> Interval:
    """`interval` from replicates that are there already, say for several methods."""
    low, high = method(drawn, level)
    low = min(float(low), drawn.value) if np.isfinite(low) else -np.inf
    high = max(float(high), drawn.value) if np.isfinite(high) else np.inf
    return Interval(drawn.value, low, high, drawn.standard_error)


def replicates(terms: Terms, groups: np.ndarray | None, samples: int, seed: int) -> Replicates:
    """The bootstrap of the terms. Samples in which a denominator is 0 have no value and are left out."""
    value = terms.value()
    numerator, denominator = (group_sums(part, groups) for part in (terms.numerator, terms.denominator))
    count = len(numerator)
    if count < 2:
        raise ValueError(f"{count} group(s) of rows, expected at least 2 to tell how sure the estimate is")
    correction = count / (count - 1)
    scale = 1 / denominator.sum(axis=0)
    rounding = ROUNDING * float(np.abs(numerator).sum(axis=0) @ scale)
    influence = numerator @ scale - denominator @ (numerator.sum(axis=0) * scale**2)
    rng = np.random.default_rng(seed)
    values, standard_errors = [], []
    chunk = max(1, CHUNK // count)
    for start in range(0, samples, chunk):
        size = min(chunk, samples - start)
        draws = rng.integers(count, size=(size, count)) + count * np.arange(size)[:, None]
        times = np.bincount(draws.ravel(), minlength=size * count).reshape(size, count).astype(np.float64)
        sums, totals = times @ numerator, times @ denominator
        kept = (totals > 0).all(axis=1)
        times, sums, scales = times[kept], sums[kept], 1 / totals[kept]
        errors = scales @ numerator.T - (sums * scales**2) @ denominator.T
        drawn = np.sum(sums * scales, axis=1)
        values.append(np.where(np.abs(drawn - value) <= rounding, value, drawn))
        standard_errors.append(_spread(np.sqrt(correction * np.sum(times * errors**2, axis=1)), rounding))
    if not sum(len(part) for part in values):
        raise ValueError("no bootstrap sample has any weight: the new policy does next to nothing that was logged")
    return Replicates(
        value,
        float(_spread(np.sqrt(correction * np.sum(influence**2)), rounding)),
        influence,
        np.concatenate(values),
        np.concatenate(standard_errors),
    )


def _spread(standard_errors: np.ndarray, rounding: float) -> np.ndarray:
    return np.where(standard_errors <= rounding, 0.0, standard_errors)
