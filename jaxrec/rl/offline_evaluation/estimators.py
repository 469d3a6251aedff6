"""Estimators of a policy's value from another policy's log.

Each returns terms, not a number: a value is the sum over parts of sum(numerator) / sum(denominator), and what resamples
rows, pairs two policies on the same rows or adds rows up by user needs the rows. For single actions the weights are
`importance_weights` [rows] and rewards [rows]; for slates `slate_weights` [rows, slots] and rewards [rows, slots] (each
slot's, discounted as it counts, 0 where the slot is empty). Slots of slates assume the cascade: a slot's reward depends
on the slots above it, not on those below.
"""

from typing import NamedTuple

import numpy as np

from jaxrec.rl.offline_evaluation.weights import Weights, as_columns


class Terms(NamedTuple):
    """Both [rows, parts] float64."""

    numerator: np.ndarray
    denominator: np.ndarray

    def value(self) -> float:
        """Raises ValueError where the rows weigh nothing together."""
        totals = self.denominator.sum(axis=0)
        if not (totals > 0).all():
            raise ValueError("the rows have no weight: the new policy does nothing that was logged")
        return float(np.sum(self.numerator.sum(axis=0) / totals))

    def minus(self, other: "Terms") -> "Terms":
        """The difference of the two values on the same rows."""
        return Terms(
            np.concatenate([self.numerator, -other.numerator], axis=1),
            np.concatenate([self.denominator, other.denominator], axis=1),
        )


def on_policy(rewards: np.ndarray) -> Terms:
    """What was earned in the log: the mean of rewards [rows], or of their sums over slots [rows, slots]."""
    return _mean(_columns(rewards).sum(axis=1))


def ips(weights: Weights, rewards: np.ndarray) -> Terms:
    """Inverse propensity scoring, mean(w r): Horvitz & Thompson 1952. No bias but that of a cap.

    For slates RIPS without its normalization: mean(sum_k w_k r_k) (McInerney et al. 2020).
    """
    return _mean(np.sum(_columns(weights.value) * _columns(rewards), axis=1))


def snips(weights: Weights, rewards: np.ndarray) -> Terms:
    """Self-normalized: sum(w r) / sum(w) (Swaminathan & Joachims 2015). For slates RIPS as McInerney et al. 2020 define
    it (arXiv:2007.12986): each slot's weights are normalized over the log, sum_k (sum w_k r_k / sum w_k).

    Bounded by the rewards, and exact for a constant reward; a bias of order 1 / rows.
    """
    return Terms(_columns(weights.value) * _columns(rewards), _columns(weights.value))


def doubly_robust(weights: Weights, rewards: np.ndarray, q_logged: np.ndarray, q_new: np.ndarray) -> Terms:
    """mean(q_new + w (r - q_logged)): Dudík et al. 2014, "Doubly Robust Policy Evaluation and Optimization".

    q_logged [rows] is a model's reward of what was logged, q_new [rows] its mean over what the new policy would do; no
    bias if either the propensities or the model are right, so the model must not be fitted on these rows' rewards.
    For slates all are [rows, slots], and it is Cascade-DR (Kiyohara et al. 2022, arXiv:2202.01562; Jiang & Li 2016):
    mean(sum_k w_k (r_k - q_logged_k) + w_(k-1) q_new_k), where q_k may look ahead to the rewards of all slots from k
    on, and q_new_k is its mean over the new policy's slot k after the logged slots 1..k-1.
    """
    correction, model = _doubly_robust_parts(weights, rewards, q_logged, q_new)
    return _mean((correction + model).sum(axis=1))


def self_normalized_doubly_robust(
    weights: Weights, rewards: np.ndarray, q_logged: np.ndarray, q_new: np.ndarray
) -> Terms:
    """mean(q_new) + sum(w (r - q_logged)) / sum(w); for slates each slot's w_k and w_(k-1) are normalized likewise
    (weighted doubly robust: Thomas & Brunskill 2016)."""
    correction, model = _doubly_robust_parts(weights, rewards, q_logged, q_new)
    value, before = _columns(weights.value), _before(weights)
    return Terms(np.concatenate([model, correction], axis=1), np.concatenate([before, value], axis=1))


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
    return doubly_robust(kept, rewards, q_logged, q_new)


def _doubly_robust_parts(
    weights: Weights, rewards: np.ndarray, q_logged: np.ndarray, q_new: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    correction = _columns(weights.value) * (_columns(rewards) - _columns(q_logged))
    return correction, _before(weights) * _columns(q_new)


def _before(weights: Weights) -> np.ndarray:
    """[rows, slots]: the weight of the slots above, 1 for the first."""
    value = _columns(weights.value)
    return np.concatenate([np.ones((len(value), 1)), value[:, :-1]], axis=1)


def _mean(values: np.ndarray) -> Terms:
    return Terms(values[:, None], np.ones((len(values), 1)))


def _columns(values: np.ndarray) -> np.ndarray:
    """[rows, slots] float64. Raises ValueError where a value is not finite."""
    columns = as_columns(np.asarray(values, np.float64))
    wrong = np.argwhere(~np.isfinite(columns))
    if len(wrong):
        row, slot = wrong[0]
        raise ValueError(f"row {row}, slot {slot}: {columns[row, slot]}, expected a finite number")
    return columns
