"""Decides from a log whether a new policy may replace the one that was logged, and says why."""

import dataclasses
import functools

import numpy as np

from jaxrec.rl.ope.estimators import Terms
from jaxrec.rl.ope.intervals import Interval, interval
from jaxrec.rl.ope.weights import Weights, as_columns, effective_sample_size, group_sums, over_slots

MINIMUM_EFFECTIVE = 100.0
MEAN_WEIGHT_ERRORS = 4.0  # standard errors by which the mean weight may differ from 1
REFUSED = "the logged policy stays in use"


@dataclasses.dataclass(frozen=True)
class Decision:
    """`used`: whether the new policy may be used, and `reason` why, a sentence with the figures.

    `new`, `logged`, `gain`: the values of the new policy and of what was logged, and their paired difference;
    `gain_at_worst`: the gain where what the log never did earns the least (`Terms.at_worst`). None where the log does
    not allow to tell, and bounds may be infinite. `effective_sample_size` in groups, and the
    `minimum_effective` asked for; `mean_weight`: of the slot where it is furthest from 1; `clipped_share` of the
    weights; `rows` and `groups` judged.
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
    weights: Weights,
    groups: np.ndarray | None = None,
    discounts: np.ndarray | None = None,
    minimum_effective: float = MINIMUM_EFFECTIVE,
    least_gain: float = 0.0,
    level: float = 0.95,
    seed: int = 0,
) -> Decision:
    """Whether a new policy may replace the logged one, judged on rows that it was not trained on.

    `new` and `logged` are terms of the same rows (say, `snips(...)` and `on_policy(...)`), `weights` those that `new`
    was made with, uncapped and over whole slates, `groups` [rows] the users, `discounts` [slots] what each slot's
    reward counts (for the effective sample size alone). It is refused

    - when there are fewer than two groups;
    - when the effective sample size, of uncapped weights and in groups, is below `minimum_effective`: the log has too
      little of what the new policy would do, and intervals are not to be trusted there (bench/rl_estimators.md);
    - when the terms have a bias (weights that were capped, limited by a lookback, or switched to a model): no interval
      knows of it, and what is cut away is where the new policy differs most;
    - when the mean uncapped weight is more than MEAN_WEIGHT_ERRORS standard errors from 1, which it is in expectation
      where the logged policy may do all that the new one does: the propensities are not those of the policy that made
      the log, or it never did some of it;
    - unless the interval of the paired gain lies wholly above `least_gain`, and does so too where what the log never
      did earns the least reward that was seen: a mean weight near 1 of a small log does not rule out that it lacks much
      of what the new policy does. Doubly robust terms that are not normalized take the model's word for that instead.

    Raises ValueError where rows, groups or discounts do not fit each other.
    """
    rows = len(new.numerator)
    if not rows == len(logged.numerator) == len(weights.log):
        raise ValueError(
            f"terms of {rows} rows (new) and {len(logged.numerator)} (logged), weights of {len(weights.log)}, "
            "expected the same rows"
        )
    count = rows if groups is None else len(np.unique(groups))
    sizes = np.atleast_1d(effective_sample_size(weights, groups))
    size = over_slots(sizes, discounts)
    mean, errors = _mean_weight(weights, groups)
    about = f"{rows} decisions of {count} users" if groups is not None else f"{rows} decisions"

    decision = functools.partial(
        Decision,
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
    elif not size >= minimum_effective:  # nor where it is none
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
    worth, before, gain, at_worst = (
        interval(terms, groups, level, seed=seed)
        for terms in (new, logged, new.minus(logged), new.at_worst().minus(logged))
    )
    figures = (
        f"{shown(worth)} against {shown(before)} logged, a gain of {shown(gain)} with {level:.0%} confidence over "
        f"{about} (effective sample size {size:.1f}, {weights.clipped_share:.1%} of the weights clipped)"
    )
    judged = worth, before, gain, at_worst
    if not _above(gain, least_gain):
        reason = f"{REFUSED}: a gain above {least_gain:g} is not shown, the new one is worth {figures}"
        return decision(False, reason, *judged)
    if not _above(at_worst, least_gain):
        reason = (
            f"{REFUSED}: the log may lack what the new policy does (mean weight {mean:.3f}), and where that earns the "
            f"least the gain is {shown(at_worst)}, not above {least_gain:g}; otherwise it is worth {figures}"
        )
        return decision(False, reason, *judged)
    return decision(True, f"the new policy may be used: it is worth {figures}", *judged)


def _above(gain: Interval, least: float) -> bool:
    return bool(np.isfinite(gain.low)) and gain.low > least


def _mean_weight(weights: Weights, groups: np.ndarray | None) -> tuple[float, float]:
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


def shown(estimate: Interval) -> str:
    """The estimate and its interval, for a sentence."""
    return f"{estimate.value:.4f} ({estimate.low:.4f} to {estimate.high:.4f})"
