"""Estimators and intervals that the benchmarks compare with those of `jaxrec.rl.ope`."""

import numpy as np
from scipy.special import ndtr, ndtri

from jaxrec.rl.ope.columns import check_shape
from jaxrec.rl.ope.estimators import Terms, doubly_robust, snips
from jaxrec.rl.ope.intervals import Replicates
from jaxrec.rl.ope.weights import ImportanceWeights


def ips(weights: ImportanceWeights, rewards: np.ndarray) -> Terms:
    """Inverse propensity scoring, mean(w r): Horvitz & Thompson 1952. No bias but that of a cap.

    For slates RIPS without its normalization: mean(sum_k w_k r_k) (McInerney et al. 2020). Arguments as `snips`.
    """
    earned = snips(weights, rewards).numerator.sum(axis=1, keepdims=True)
    return Terms(earned, np.ones_like(earned), weights.bias)


def switch_doubly_robust(
    weights: ImportanceWeights, rewards: np.ndarray, q_logged: np.ndarray, q_new: np.ndarray, threshold: float
) -> Terms:
    """mean(q_new + w (r - q_logged) [w <= threshold]): SWITCH-DR of Wang et al. 2017 (arXiv:1612.01205).

    Where the uncapped weight is above the threshold the model's reward counts. For single actions, all [rows].
    """
    check_shape("weights", weights.log, (None,), "[rows]: switching is defined for one action")
    trusted = weights.log <= (np.log(threshold) if threshold > 0 else -np.inf)
    kept = weights._replace(value=np.where(trusted, weights.value, 0.0))
    terms = doubly_robust(kept, rewards, q_logged, q_new)
    switched = f"{1 - trusted.mean():.1%} of the weights are switched to the model" if not trusted.all() else ""
    return terms._replace(bias=switched or weights.bias)


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
