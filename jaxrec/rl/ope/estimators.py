"""Estimators of a policy's value from another policy's log.

Each returns terms, not a number: a value is the sum over parts of sum(numerator) / sum(denominator), and what resamples
rows, pairs two policies on the same rows or adds rows up by user needs the rows. For single actions the weights are
`importance_weights` [rows] and rewards [rows]; for slates `slate_weights` [rows, slots] and rewards [rows, slots] (each
slot's, discounted as it counts, 0 where the slot is empty). Shapes must be equal: ValueError otherwise. Slots of slates
assume the cascade: a slot's reward depends on the slots above it, not on those below.
"""

from typing import NamedTuple

import numpy as np

from jaxrec.rl.ope.weights import Weights, as_columns


class Terms(NamedTuple):
    """Both [rows, parts] float64. `bias`: what makes the value another one than the policy's however long the log is;
    empty where nothing does."""

    numerator: np.ndarray
    denominator: np.ndarray
    bias: str = ""

    def value(self) -> float:
        """Raises ValueError where the rows weigh nothing together, and where the two are not [rows, parts] both."""
        if self.numerator.ndim != 2 or self.numerator.shape != self.denominator.shape:
            raise ValueError(
                f"terms of shapes {self.numerator.shape} (numerator) and {self.denominator.shape} (denominator), "
                "expected [rows, parts] both"
            )
        totals = self.denominator.sum(axis=0)
        if not (totals > 0).all():
            raise ValueError("the rows have no weight: the new policy does nothing that was logged")
        return float(np.sum(self.numerator.sum(axis=0) / totals))

    def minus(self, other: "Terms") -> "Terms":
        """The difference of the two values on the same rows. Raises ValueError where their number differs."""
        if len(self.numerator) != len(other.numerator):
            raise ValueError(f"terms of {len(self.numerator)} and of {len(other.numerator)} rows, expected the same")
        return Terms(
            np.concatenate([self.numerator, -other.numerator], axis=1),
            np.concatenate([self.denominator, other.denominator], axis=1),
            self.bias or other.bias,
        )

    def at_worst(self) -> "Terms":
        """The same where what the log never did earns the least that was seen, instead of the mean of what it did.

        Weights add up to the rows but for what the new policy does and the logged one never did. Normalizing by their
        sum takes that to be like the rest; here it gets each part's smallest ratio m: mean(numerator - m denominator)
        + m. That is IPS of the rewards above the least; terms that are not normalized stay as they are (IPS gives what
        is missing a reward of 0).
        """
        some = self.denominator > 0
        ratio = np.divide(self.numerator, self.denominator, out=np.full(self.numerator.shape, np.inf), where=some)
        least = ratio.min(axis=0, initial=np.inf)
        least = np.where(np.isfinite(least), least, 0.0)
        return Terms(self.numerator - least * (self.denominator - 1), np.ones_like(self.denominator), self.bias)


def on_policy(rewards: np.ndarray) -> Terms:
    """What was earned in the log: the mean of rewards [rows], or of their sums over slots [rows, slots]."""
    return _mean(_columns(rewards).sum(axis=1))


def ips(weights: Weights, rewards: np.ndarray) -> Terms:
    """Inverse propensity scoring, mean(w r): Horvitz & Thompson 1952. No bias but that of a cap.

    For slates RIPS without its normalization: mean(sum_k w_k r_k) (McInerney et al. 2020).
    """
    value, earned = _same_shape(weights, rewards=rewards)
    return _mean(np.sum(value * earned, axis=1), weights.bias)


def snips(weights: Weights, rewards: np.ndarray) -> Terms:
    """Self-normalized: sum(w r) / sum(w) (Swaminathan & Joachims 2015). For slates RIPS as McInerney et al. 2020 define
    it (arXiv:2007.12986): each slot's weights are normalized over the log, sum_k (sum w_k r_k / sum w_k).

    Bounded by the rewards, and exact for a constant reward; a bias of order 1 / rows.
    """
    value, earned = _same_shape(weights, rewards=rewards)
    return Terms(value * earned, value, weights.bias)


def doubly_robust(weights: Weights, rewards: np.ndarray, q_logged: np.ndarray, q_new: np.ndarray) -> Terms:
    """mean(q_new + w (r - q_logged)): Dudík et al. 2014, "Doubly Robust Policy Evaluation and Optimization".

    q_logged [rows] is a model's reward of what was logged, q_new [rows] its mean over what the new policy would do; no
    bias if either the propensities or the model are right, so the model must not be fitted on these rows' rewards.
    For slates all are [rows, slots], and it is Cascade-DR (Kiyohara et al. 2022, arXiv:2202.01562; Jiang & Li 2016):
    mean(sum_k w_k (r_k - q_logged_k) + w_(k-1) q_new_k), where q_k may look ahead to the rewards of all slots from k
    on, and q_new_k is its mean over the new policy's slot k after the logged slots 1..k-1. The slots' terms cancel for
    whole products only: capped weights, or those of a lookback, raise ValueError for slates.
    """
    correction, model = _doubly_robust_parts(weights, rewards, q_logged, q_new)
    return _mean((correction + model).sum(axis=1), weights.bias)


def self_normalized_doubly_robust(
    weights: Weights, rewards: np.ndarray, q_logged: np.ndarray, q_new: np.ndarray
) -> Terms:
    """mean(q_new) + sum(w (r - q_logged)) / sum(w); for slates each slot's w_k and w_(k-1) are normalized likewise
    (weighted doubly robust: Thomas & Brunskill 2016)."""
    correction, model = _doubly_robust_parts(weights, rewards, q_logged, q_new)
    value, before = _columns(weights.value), _before(weights)
    return Terms(np.concatenate([model, correction], axis=1), np.concatenate([before, value], axis=1), weights.bias)


def switch_doubly_robust(
    weights: Weights, rewards: np.ndarray, q_logged: np.ndarray, q_new: np.ndarray, threshold: float
) -> Terms:
    """mean(q_new + w (r - q_logged) [w <= threshold]): SWITCH-DR of Wang et al. 2017 (arXiv:1612.01205).

    Where the uncapped weight is above the threshold the model's word is taken. For single actions, all [rows].
    """
    if weights.log.ndim != 1:
        raise ValueError(f"weights of shape {weights.log.shape}, expected [rows]: switching is defined for one action")
    trusted = weights.log <= (np.log(threshold) if threshold > 0 else -np.inf)
    kept = Weights(weights.log, np.where(trusted, weights.value, 0.0), weights.clipped)
    terms = doubly_robust(kept, rewards, q_logged, q_new)
    switched = f"{1 - trusted.mean():.1%} of the weights are switched to the model" if not trusted.all() else ""
    return terms._replace(bias=switched or weights.bias)


def _doubly_robust_parts(
    weights: Weights, rewards: np.ndarray, q_logged: np.ndarray, q_new: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    value, earned, logged, new = _same_shape(weights, rewards=rewards, q_logged=q_logged, q_new=q_new)
    if value.shape[1] > 1 and weights.bias:
        raise ValueError(f"{weights.bias}, expected uncapped weights over whole slates for their doubly robust value")
    return value * (earned - logged), _before(weights) * new


def _before(weights: Weights) -> np.ndarray:
    """[rows, slots]: the weight of the slots above, 1 for the first."""
    value = _columns(weights.value)
    return np.concatenate([np.ones((len(value), 1)), value[:, :-1]], axis=1)


def _mean(values: np.ndarray, bias: str = "") -> Terms:
    return Terms(values[:, None], np.ones((len(values), 1)), bias)


def _same_shape(weights: Weights, **others: np.ndarray) -> list[np.ndarray]:
    """Columns of the weights and of the others. Raises ValueError where a shape is not that of the weights."""
    for name, values in others.items():
        if np.shape(values) != weights.value.shape:
            raise ValueError(f"{name} of shape {np.shape(values)}, expected {weights.value.shape} as the weights")
    return [_columns(values) for values in (weights.value, *others.values())]


def _columns(values: np.ndarray) -> np.ndarray:
    """[rows, slots] float64. Raises ValueError where a value is not finite."""
    columns = as_columns(np.asarray(values, np.float64))
    wrong = np.argwhere(~np.isfinite(columns))
    if len(wrong):
        row, slot = wrong[0]
        raise ValueError(f"row {row}, slot {slot}: {columns[row, slot]}, expected a finite number")
    return columns
