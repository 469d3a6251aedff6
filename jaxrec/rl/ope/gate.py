"""Decides from a log whether a new policy may replace the one that was logged, and says why."""

import dataclasses
import functools

import numpy as np

from jaxrec.evaluation.bootstrap import group_sums
from jaxrec.rl.ope.columns import as_columns
from jaxrec.rl.ope.estimators import Terms
from jaxrec.rl.ope.intervals import Interval, interval
from jaxrec.rl.ope.sample_size import effective_sample_size, slate_sample_size
from jaxrec.rl.ope.weights import ImportanceWeights

MINIMUM_EFFECTIVE = 100.0
MEAN_WEIGHT_ERRORS = 4.0  # standard errors by which the mean weight may differ from 1
REFUSED = "the logged policy stays in use"


@dataclasses.dataclass(frozen=True)
class GateDecision:
    """Whether a new policy may be used, with the figures. Intervals are None if the log allows none.

    Attributes:
        used: whether the new policy may be used.
        reason: why, a sentence with the figures.
        new: the value of the new policy; bounds may be infinite, here and below.
        logged: the value of the logged policy.
        gain: the paired difference of the two.
        gain_at_worst: the gain if what the log never did earns the least reward that was seen (`Terms.at_worst`).
        effective_sample_size: of the uncapped weights, in groups.
        minimum_effective: the effective sample size that was asked for.
        mean_weight: the mean uncapped weight of the slot where it is furthest from 1.
        clipped_share: the share of the weights that reached the cap.
        rows: how many decisions were evaluated.
        groups: how many groups they belong to.
    """

    used: bool
    reason: str
    new: Interval | None
    logged: Interval | None
    gain: Interval | None
    gain_at_worst: Interval | None
    effective_sample_size: float
    minimum_effective: float
    mean_weight: float
    clipped_share: float
    rows: int
    groups: int


def gate(
    new: Terms,
    logged: Terms,
    weights: ImportanceWeights,
    groups: np.ndarray | None = None,
    discounts: np.ndarray | None = None,
    minimum_effective: float = MINIMUM_EFFECTIVE,
    least_gain: float = 0.0,
    level: float = 0.95,
    seed: int = 0,
) -> GateDecision:
    """Whether a new policy may replace the logged one, evaluated on rows that it was not trained on.

    The new policy is refused

    - if there are fewer than two groups;
    - if the effective sample size is below `minimum_effective`: the log has too little of what the new policy would do,
      and intervals are not reliable there (bench/rl_estimators.md);
    - if the terms have a bias (weights that were capped, limited by a lookback, or switched to a model): intervals do
      not cover it, and what is cut away is where the new policy differs most;
    - if the mean uncapped weight is more than MEAN_WEIGHT_ERRORS standard errors from 1. Its expectation is 1 if the
      logged policy may do all that the new one does. Otherwise the propensities are not those of the policy that made
      the log, or it never did some of what the new policy does;
    - unless the interval of the paired gain lies above `least_gain`, both as estimated and if what the log never did
      earns the least reward that was seen. In a small log a mean weight near 1 does not rule out that much of what the
      new policy does is missing. Doubly robust terms that are not normalized rely on the model there instead.

    Args:
        new: terms of the new policy, say `snips(...)`.
        logged: terms of the logged policy on the same rows, say `on_policy(...)`.
        weights: those that `new` was made with, uncapped and over whole slates.
        groups: [rows] labels of the users; None: each row is a group.
        discounts: [slots], what each slot's reward counts; for the effective sample size alone.
        minimum_effective: the effective sample size to ask for, in groups.
        least_gain: the gain to exceed, in units of the reward.
        level: of confidence of the intervals, in 0..1.
        seed: of the bootstrap.

    Returns:
        The decision with its reason.

    Raises:
        ValueError: Rows, groups or discounts do not fit each other.
    """
    rows = len(new.numerator)
    if not rows == len(logged.numerator) == len(weights.log):
        raise ValueError(
            f"terms of {rows} rows (new) and {len(logged.numerator)} (logged), weights of {len(weights.log)}, "
            "expected the same rows"
        )
    count = rows if groups is None else len(np.unique(groups))
    size = slate_sample_size(np.atleast_1d(effective_sample_size(weights, groups)), discounts)
    mean, errors = _mean_weight(weights, groups)
    about = f"{rows} decisions of {count} users" if groups is not None else f"{rows} decisions"
    decision = functools.partial(
        GateDecision,
        effective_sample_size=size,
        minimum_effective=minimum_effective,
        mean_weight=mean,
        clipped_share=weights.clipped_share,
        rows=rows,
        groups=count,
    )

    refusal = ""
    if count < 2:
        refusal = f"the log has {about}, expected at least two to tell a gain from chance"
    elif not size >= minimum_effective:  # also refuses a NaN
        refusal = (
            f"the effective sample size is {size:.1f} of {about}, expected at least {minimum_effective:g}; "
            "the log has too little of what the new policy would do"
        )
    elif bias := weights.bias or new.bias or logged.bias:
        refusal = f"{bias}; only uncapped weights over whole slates can show a gain"
    elif not errors <= MEAN_WEIGHT_ERRORS:
        refusal = (
            f"the mean weight over {about} is {mean:.3f}, {errors:.1f} standard errors from 1; "
            "the propensities are not those of the policy that made the log, or it never does what the new one may do"
        )
    if refusal:
        return decision(False, f"{REFUSED}: {refusal}", None, None, None, None)

    worth, before, gain, at_worst = intervals = tuple(
        interval(terms, groups, level, seed=seed)
        for terms in (new, logged, new.minus(logged), new.at_worst().minus(logged))
    )
    figures = (
        f"{format_interval(worth)} against {format_interval(before)} logged, a gain of {format_interval(gain)} with "
        f"{level:.0%} confidence over {about} (effective sample size {size:.1f}, {weights.clipped_share:.1%} of the "
        "weights clipped)"
    )
    if not _above(gain, least_gain):
        reason = f"{REFUSED}: a gain above {least_gain:g} is not shown, the new one is worth {figures}"
    elif not _above(at_worst, least_gain):
        reason = (
            f"{REFUSED}: the log may lack what the new policy does (mean weight {mean:.3f}), and where that earns the "
            f"least the gain is {format_interval(at_worst)}, not above {least_gain:g}; otherwise it is worth {figures}"
        )
    else:
        return decision(True, f"the new policy may be used: it is worth {figures}", *intervals)
    return decision(False, reason, *intervals)


def format_interval(estimate: Interval) -> str:
    """The estimate and its interval, for a sentence.

    Examples:
        >>> format_interval(Interval(0.25, 0.2, 0.3, 0.025))
        '0.2500 (0.2000 to 0.3000)'
    """
    return f"{estimate.value:.4f} ({estimate.low:.4f} to {estimate.high:.4f})"


def _above(gain: Interval, least: float) -> bool:
    return bool(np.isfinite(gain.low)) and gain.low > least


def _mean_weight(weights: ImportanceWeights, groups: np.ndarray | None) -> tuple[float, float]:
    """The mean uncapped weight of the slot where it is furthest from 1, and how many standard errors that is."""
    log = as_columns(weights.log)
    if not len(log):
        return 0.0, 0.0
    off = group_sums(np.exp(np.minimum(log, 300.0)) - 1.0, groups)
    count = len(off)
    errors = np.sqrt(np.sum((off - off.mean(axis=0)) ** 2, axis=0) * count / max(count - 1, 1))
    total = np.abs(off.sum(axis=0))
    distance = np.divide(total, errors, out=np.where(total > 1e-9 * len(log), np.inf, 0.0), where=errors > 0)
    slot = int(np.argmax(distance))
    return float(1 + off[:, slot].sum() / len(log)), float(distance[slot])
