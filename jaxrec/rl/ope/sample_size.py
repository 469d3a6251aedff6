"""How many decisions importance weights leave."""

import numpy as np

from jaxrec.evaluation.bootstrap import group_sums
from jaxrec.rl.ope.columns import as_columns, check_shape
from jaxrec.rl.ope.weights import ImportanceWeights


def effective_sample_size(weights: ImportanceWeights, groups: np.ndarray | None = None) -> np.ndarray:
    """(sum w)^2 / sum w^2 (Kish 1965) of the uncapped weights: a cap would make the log look richer than it is.

    Args:
        weights: [rows], or [rows, slots].
        groups: [rows] labels, say the users. Their rows are not independent, so the weights of a group are added
            first, and the size counts groups. None: each row is a group.

    Returns:
        [] float64, or [slots]; 0 if the new policy does nothing that was logged.

    Raises:
        ValueError: There is not one group for each row.

    Examples:
        >>> from jaxrec.rl.ope.weights import importance_weights
        >>> weights = importance_weights(np.log([0.4, 0.2, 0.2]), np.log([0.4, 0.4, 0.4]))  # 1, 1/2, 1/2
        >>> round(float(effective_sample_size(weights)), 4)  # 2^2 / (1 + 1/4 + 1/4)
        2.6667
    """
    log = as_columns(weights.log)
    highest = np.max(log, axis=0, initial=-np.inf)
    relative = np.exp(log - np.where(np.isfinite(highest), highest, 0.0))  # what is squared must not overflow
    sums = group_sums(relative, groups)
    total, squares = sums.sum(axis=0), np.square(sums).sum(axis=0)
    size = np.divide(np.square(total), squares, out=np.zeros_like(total), where=squares > 0)
    return size.reshape(weights.log.shape[1:])


def slate_sample_size(sizes: np.ndarray, discounts: np.ndarray | None = None) -> float:
    """One effective sample size of a slate's slots: sum d_k^2 / sum (d_k^2 / size_k).

    If the slots' rewards were independent, the variance of sum_k d_k mean_k would be the sum of d_k^2 / size_k times
    that of a slot. This is the size that each slot would need for the same variance.

    Args:
        sizes: [slots], `effective_sample_size` of each slot.
        discounts: [slots], what a slot's reward counts, at least 0 and not all 0; None: all 1.

    Returns:
        The size; 0 if that of a slot which counts is 0.

    Raises:
        ValueError: There is not one discount for each slot, one is negative or not finite, or all are 0.

    Examples:
        >>> round(slate_sample_size(np.array([100.0, 10.0]), np.array([2.0, 1.0])), 4)  # 5 / (4 / 100 + 1 / 10)
        35.7143
    """
    discounts = np.ones(len(sizes)) if discounts is None else np.asarray(discounts, np.float64)
    check_shape("discounts", discounts, sizes.shape, f"one for each of {len(sizes)} slot(s)")
    if not (np.isfinite(discounts).all() and (discounts >= 0).all() and (discounts > 0).any()):
        raise ValueError(f"discounts {discounts.tolist()}, expected finite, at least 0 and not all of them 0")
    importance = np.square(discounts)
    kept = importance > 0
    if not sizes[kept].all():
        return 0.0
    return float(importance.sum() / np.sum(importance[kept] / sizes[kept]))
