"""Estimators of a policy's value from another policy's log.

Each returns terms, not a number: a value is the sum over parts of sum(numerator) / sum(denominator). The rows are
needed to resample them, to pair two policies on the same rows, and to add rows up by user.

For single actions the weights are `importance_weights` [rows] and rewards [rows]. For slates they are `slate_weights`
[rows, slots] and rewards [rows, slots]: each slot's reward, discounted as it counts, 0 where the slot is empty. Slots
of slates assume the cascade: a slot's reward depends on the slots above it, not on those below.
"""

from typing import NamedTuple

import numpy as np

from jaxrec.rl.ope.columns import as_columns, check_shape, finite_columns
from jaxrec.rl.ope.weights import ImportanceWeights


class Terms(NamedTuple):
    """What an estimate is the sum of.

    Attributes:
        numerator: [rows, parts] float64.
        denominator: [rows, parts] float64.
        bias: why the value is not the policy's however long the log is; empty if nothing biases it.
    """

    numerator: np.ndarray
    denominator: np.ndarray
    bias: str = ""

    def value(self) -> float:
        """The estimate: the sum over parts of sum(numerator) / sum(denominator).

        Raises:
            ValueError: The weights of the rows sum to 0, or the two are not both [rows, parts].
        """
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
        """Terms of the difference of the two values on the same rows. Raises ValueError if their number differs."""
        if len(self.numerator) != len(other.numerator):
            raise ValueError(f"terms of {len(self.numerator)} and of {len(other.numerator)} rows, expected the same")
        return Terms(
            np.concatenate([self.numerator, -other.numerator], axis=1),
            np.concatenate([self.denominator, other.denominator], axis=1),
            self.bias or other.bias,
        )

    def at_worst(self) -> "Terms":
        """Pessimistic terms: what the logged policy never did is assumed to earn the least that was seen, not the mean.

        In expectation the weights sum to the number of rows, less the share of the new policy that the logged one never
        does. Normalizing by their sum assumes that this share earns the mean. Here it earns each part's smallest ratio
        m: mean(numerator - m denominator) + m, which is inverse propensity scoring of the rewards above the least.
        Terms that are not normalized stay as they are.
        """
        some = self.denominator > 0
        ratio = np.divide(self.numerator, self.denominator, out=np.full(self.numerator.shape, np.inf), where=some)
        least = ratio.min(axis=0, initial=np.inf)
        least = np.where(np.isfinite(least), least, 0.0)
        return Terms(self.numerator - least * (self.denominator - 1), np.ones_like(self.denominator), self.bias)


def on_policy(rewards: np.ndarray) -> Terms:
    """What the logged policy earned: the mean of rewards [rows], or of their sums over slots [rows, slots].

    Examples:
        >>> round(on_policy(np.array([1.0, 1.0, 0.0])).value(), 4)
        0.6667
    """
    return _mean(finite_columns(rewards).sum(axis=1))


def snips(weights: ImportanceWeights, rewards: np.ndarray) -> Terms:
    """Self-normalized inverse propensity scoring: sum(w r) / sum(w).

    Swaminathan & Joachims 2015, "The Self-Normalized Estimator for Counterfactual Learning". For slates it is RIPS of
    McInerney et al. 2020 (arXiv:2007.12986): each slot's weights are normalized over the log, sum_k (sum w_k r_k / sum
    w_k). Bounded by the rewards, and exact for a constant reward; its bias is of order 1 / rows.

    Args:
        weights: [rows], or [rows, slots].
        rewards: as the weights.

    Returns:
        Terms with one part for each slot.

    Raises:
        ValueError: The shapes differ, or a reward is not finite.

    Examples:
        >>> from jaxrec.rl.ope.weights import importance_weights
        >>> weights = importance_weights(np.log([0.5, 0.2, 0.8]), np.log([0.25, 0.4, 0.2]))  # 2, 1/2, 4
        >>> round(snips(weights, np.array([1.0, 1.0, 0.0])).value(), 4)  # (2 + 1/2) / (2 + 1/2 + 4)
        0.3846
    """
    value, earned = _same_shape(weights, rewards=rewards)
    return Terms(value * earned, value, weights.bias)


def doubly_robust(weights: ImportanceWeights, rewards: np.ndarray, q_logged: np.ndarray, q_new: np.ndarray) -> Terms:
    """mean(q_new + w (r - q_logged)): Dudík et al. 2014, "Doubly Robust Policy Evaluation and Optimization".

    No bias if either the propensities or the model of the rewards is right, so the model must not be fitted on these
    rows' rewards. For slates it is Cascade-DR (Kiyohara et al. 2022, arXiv:2202.01562; Jiang & Li 2016): mean(sum_k w_k
    (r_k - q_logged_k) + w_(k-1) q_new_k). There q_k may look ahead to the rewards of all slots from k on, and q_new_k
    is its mean over the new policy's slot k after the logged slots 1..k-1.

    Args:
        weights: [rows], or [rows, slots].
        rewards: as the weights.
        q_logged: as the weights, the model's reward of what was logged.
        q_new: as the weights, the model's mean reward over what the new policy would do.

    Returns:
        Terms with one part.

    Raises:
        ValueError: The shapes differ, a number is not finite, or the weights of slates are capped or limited by a
            lookback: the slots' terms cancel for whole products only.

    Examples:
        >>> from jaxrec.rl.ope.weights import importance_weights
        >>> weights = importance_weights(np.log([0.5, 0.2]), np.log([0.25, 0.4]))  # 2, 1/2
        >>> terms = doubly_robust(weights, np.array([1.0, 1.0]), np.array([0.8, 0.4]), np.array([0.6, 0.7]))
        >>> round(terms.value(), 4)  # ((0.6 + 2 * 0.2) + (0.7 + 0.5 * 0.6)) / 2
        1.0
    """
    correction, model = _doubly_robust_parts(weights, rewards, q_logged, q_new)
    return _mean((correction + model).sum(axis=1), weights.bias)


def self_normalized_doubly_robust(
    weights: ImportanceWeights, rewards: np.ndarray, q_logged: np.ndarray, q_new: np.ndarray
) -> Terms:
    """mean(q_new) + sum(w (r - q_logged)) / sum(w); for slates each slot's w_k and w_(k-1) are normalized likewise.

    Weighted doubly robust: Thomas & Brunskill 2016, "Data-Efficient Off-Policy Policy Evaluation for Reinforcement
    Learning". Arguments and errors are those of `doubly_robust`.

    Returns:
        Terms with two parts for each slot.
    """
    correction, model = _doubly_robust_parts(weights, rewards, q_logged, q_new)
    value, above = as_columns(weights.value), _weights_above(weights)
    return Terms(np.concatenate([model, correction], axis=1), np.concatenate([above, value], axis=1), weights.bias)


def _doubly_robust_parts(
    weights: ImportanceWeights, rewards: np.ndarray, q_logged: np.ndarray, q_new: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """[rows, slots] each: the weighted corrections of the model, and the model's part."""
    value, earned, logged, new = _same_shape(weights, rewards=rewards, q_logged=q_logged, q_new=q_new)
    if value.shape[1] > 1 and weights.bias:
        raise ValueError(f"{weights.bias}, expected uncapped weights over whole slates for their doubly robust value")
    return value * (earned - logged), _weights_above(weights) * new


def _weights_above(weights: ImportanceWeights) -> np.ndarray:
    """[rows, slots]: the weight of the slots above, 1 for the first."""
    value = as_columns(weights.value)
    return np.concatenate([np.ones((len(value), 1)), value[:, :-1]], axis=1)


def _mean(values: np.ndarray, bias: str = "") -> Terms:
    return Terms(values[:, None], np.ones((len(values), 1)), bias)


def _same_shape(weights: ImportanceWeights, **others: np.ndarray) -> list[np.ndarray]:
    """Columns of the weights and of the others, which must have the shape of the weights."""
    for name, values in others.items():
        check_shape(name, values, weights.value.shape, f"{weights.value.shape} as the weights")
    return [finite_columns(values) for values in (weights.value, *others.values())]
