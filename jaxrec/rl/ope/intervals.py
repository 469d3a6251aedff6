"""Bootstrap intervals of estimated policy values.

Whole groups of rows (users) are resampled, and a policy and what it is compared with are resampled together, because
they share rows. The interval is the studentized one (bootstrap-t: Efron & Tibshirani 1993, "An Introduction to the
Bootstrap", section 12.5): sums of weights are skewed to the right, and where few rows carry them the percentile
interval covers the truth less often than it says (bench/rl_estimators.md). Where the weights have heavy tails this
interval is too narrow as well, since the log lacks the rows of the tail. It is therefore widened by how uncertain its
variance is (bench/rl_coverage.md).
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy.special import stdtrit

from jaxrec.evaluation.bootstrap import draw_counts, group_sums
from jaxrec.rl.ope.estimators import Terms

OPE_SAMPLES = 2000
ROUNDING = 1e-12  # of the size of the terms: spread below it is that of sums in floating point


@dataclasses.dataclass(frozen=True)
class Interval:
    """An estimate, its interval at the level that was asked for, and its standard error over groups."""

    value: float
    low: float
    high: float
    standard_error: float


class Replicates(NamedTuple):
    """An estimate and its bootstrap samples.

    Attributes:
        value: the estimate.
        standard_error: of the estimate, over groups, linearized.
        influence: [groups] float64, what each group adds to the error of the estimate, linearized.
        values: [samples] float64, the estimate of each bootstrap sample.
        standard_errors: [samples] float64, likewise.
    """

    value: float
    standard_error: float
    influence: np.ndarray
    values: np.ndarray
    standard_errors: np.ndarray


IntervalMethod = Callable[[Replicates, float], tuple[float, float]]


def studentized(replicates: Replicates, level: float) -> tuple[float, float]:
    """value - t* standard_error, with t* the quantiles of (value* - value) / standard_error*, widened.

    Second-order accurate, for skewed means too (Hall 1988, "Theoretical Comparison of Bootstrap Confidence Intervals").
    Where resamples have no spread left t* is infinite, and so may be a bound: the log is then too small to tell.

    Both t* are multiplied by the ratio of two quantiles of Student's t, with `degrees_of_freedom` and with one less
    than there are groups: 1 without heavy tails, 1.01 to 1.3 with them. Resamples repeat the rows of the log, so that
    they do not know the tail of the weights that the log lacks. The factor brings the coverage nearer to the level, not
    always up to it (bench/rl_coverage.md).

    Args:
        replicates: the estimate and its bootstrap samples.
        level: of confidence, in 0..1.

    Returns:
        (low, high).
    """
    errors = replicates.values - replicates.value
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.where(errors == 0, 0.0, errors / replicates.standard_errors)
    low, high = np.quantile(t, (1 - level) / 2, method="lower"), np.quantile(t, (1 + level) / 2, method="higher")
    if replicates.standard_error == 0:
        return replicates.value, replicates.value
    quantile = (1 + level) / 2
    counted, freedom = len(replicates.influence) - 1, degrees_of_freedom(replicates.influence)
    wider = stdtrit(freedom, quantile) / stdtrit(counted, quantile) * replicates.standard_error
    return replicates.value - high * wider, replicates.value - low * wider


def degrees_of_freedom(influence: np.ndarray) -> float:
    """Those of a chi-squared variable that is as uncertain as the variance of these values.

    The variance of a sample variance s^2 of n values with the excess kurtosis g is s^4 (2 / (n - 1) + g / n). That of
    s^2 chi^2 / m is 2 s^4 / m. So m = 2 / (2 / (n - 1) + g / n) (O'Neill 2014, "Some Useful Moment Results in Sampling
    Problems", section 3). A negative g counts as 0.

    Args:
        influence: [groups] float64 with mean 0, at least two, not all 0.

    Returns:
        m, at most n - 1.

    Examples:
        >>> degrees_of_freedom(np.array([-1.0, 1.0, -1.0, 1.0]))  # no tails
        3.0
        >>> round(degrees_of_freedom(np.array([9.0] + [-1.0] * 9)), 4)  # g = 10 * 6570 / 90^2 - 3 = 5.1111
        2.7273
    """
    count = len(influence)
    squares = np.square(influence / np.max(np.abs(influence)))
    excess = max(count * np.sum(np.square(squares)) / np.square(np.sum(squares)) - 3, 0.0)
    return float(2 / (2 / (count - 1) + excess / count))


def interval(
    terms: Terms,
    groups: np.ndarray | None = None,
    level: float = 0.95,
    samples: int = OPE_SAMPLES,
    seed: int = 0,
    method: IntervalMethod = studentized,
) -> Interval:
    """The value of the terms with its bootstrap interval.

    Args:
        terms: [rows, parts].
        groups: [rows] labels of whose row it is; None: each row is a group.
        level: of confidence, in 0..1.
        samples: bootstrap samples.
        seed: of the samples.
        method: turns the samples into bounds.

    Returns:
        The interval, which holds the value; a bound that the samples do not tell is infinite.

    Raises:
        ValueError: There are fewer than two groups, or the weights of the rows sum to 0.

    Examples:
        >>> from jaxrec.rl.ope.estimators import on_policy
        >>> interval(on_policy(np.full(20, 0.25)))  # no spread
        Interval(value=0.25, low=0.25, high=0.25, standard_error=0.0)
    """
    return interval_of(replicates(terms, groups, samples, seed), level, method)


def interval_of(drawn: Replicates, level: float = 0.95, method: IntervalMethod = studentized) -> Interval:
    """`interval` of bootstrap samples that are there already, for instance for several methods."""
    low, high = method(drawn, level)
    low = min(float(low), drawn.value) if np.isfinite(low) else -np.inf
    high = max(float(high), drawn.value) if np.isfinite(high) else np.inf
    return Interval(drawn.value, low, high, drawn.standard_error)


def replicates(terms: Terms, groups: np.ndarray | None, samples: int, seed: int) -> Replicates:
    """Bootstrap samples of the terms; those in which a denominator sums to 0 have no value and are left out.

    Args:
        terms: [rows, parts].
        groups: [rows] labels of whose row it is; None: each row is a group.
        samples: how many are drawn.
        seed: of the samples.

    Returns:
        The estimate with its samples.

    Raises:
        ValueError: There are fewer than two groups, or the weights of the rows sum to 0.

    Examples:
        >>> from jaxrec.rl.ope.estimators import on_policy
        >>> drawn = replicates(on_policy(np.array([0.0, 1.0])), None, samples=10, seed=0)
        >>> drawn.value, round(drawn.standard_error, 4)  # of a mean: sqrt(1/2) / sqrt(2)
        (0.5, 0.5)
    """
    value = terms.value()
    numerator, denominator = (group_sums(part, groups) for part in (terms.numerator, terms.denominator))
    count = len(numerator)
    if count < 2:
        raise ValueError(f"{count} group(s) of rows, expected at least 2 to tell how sure the estimate is")
    correction = count / (count - 1)
    scale = 1 / denominator.sum(axis=0)
    rounding = ROUNDING * float(np.abs(numerator).sum(axis=0) @ scale)
    influence = numerator @ scale - denominator @ (numerator.sum(axis=0) * scale**2)
    values, standard_errors = [], []
    for times in draw_counts(count, samples, seed):
        sums, totals = times @ numerator, times @ denominator
        kept = (totals > 0).all(axis=1)
        sums, scales = sums[kept], 1 / totals[kept]
        errors = scales @ numerator.T - (sums * scales**2) @ denominator.T
        drawn = np.sum(sums * scales, axis=1)
        values.append(np.where(np.abs(drawn - value) <= rounding, value, drawn))
        standard_errors.append(_spread(np.sqrt(correction * np.sum(times[kept] * errors**2, axis=1)), rounding))
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
