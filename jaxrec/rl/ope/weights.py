"""Importance weights of logged decisions, and how many decisions they leave."""

from typing import NamedTuple

import numpy as np

MAX_LOG = 700.0  # exp of more is no float64


class Weights(NamedTuple):
    """Of decisions [rows], or of slots [rows, slots]. `log`: the logarithm of the uncapped weight, -inf where the new
    policy never does what was logged; `value`: the weight, capped; `clipped`: where the cap was reached (bool);
    `lookback`: how many slots the product was limited to, None where it goes over all."""

    log: np.ndarray
    value: np.ndarray
    clipped: np.ndarray
    lookback: int | None = None

    @property
    def clipped_share(self) -> float:
        return float(self.clipped.mean()) if self.clipped.size else 0.0

    @property
    def bias(self) -> str:
        """What makes these weights other than the policies' ratio; empty where nothing does."""
        if self.clipped.any():
            return f"{self.clipped_share:.1%} of the weights are capped"
        return "" if self.lookback is None else f"the weights look back over {self.lookback} slot(s) of the slate"


def importance_weights(logprob_new: np.ndarray, logprob_logged: np.ndarray, cap: float | None = None) -> Weights:
    """π_new(a|x) / π_logged(a|x) of logged actions, from their log-probabilities [rows] (nats).

    Raises ValueError where a logged probability is 0, a log-probability is none, or the cap is not above 0.
    """
    new, logged = _checked(logprob_new, logprob_logged)
    return _weights(new - logged, cap)


def slate_weights(
    logprob_new: np.ndarray,
    logprob_logged: np.ndarray,
    where: np.ndarray | None = None,
    cap: float | None = None,
    lookback: int | None = None,
) -> Weights:
    """Weights [rows, slots] of logged slates: slot k's is the product of the ratios of slots 1..k.

    The log-probabilities [rows, slots] are each slot's, given the slots before it. `where`: slots that hold an item;
    the others leave the product as it is. `lookback` limits the product to that many slots, k included: less variance,
    and a bias where a slot's reward depends on slots further up (McInerney et al. 2020 choose it by effective sample
    size; here it is the caller's). `cap` holds for the product.
    """
    where = np.ones(np.shape(logprob_new), bool) if where is None else np.asarray(where, bool)
    new, logged = _checked(np.where(where, logprob_new, 0.0), np.where(where, logprob_logged, 0.0))
    ratio = new - logged
    if lookback is None:
        return _weights(np.cumsum(ratio, axis=1), cap)
    if lookback < 1:
        raise ValueError(f"lookback is {lookback}, expected at least 1 slot")
    padded = np.concatenate([np.zeros((len(ratio), lookback - 1)), ratio], axis=1)
    windows = np.lib.stride_tricks.sliding_window_view(padded, lookback, axis=1)
    limited = _weights(windows.sum(axis=-1), cap)
    return limited if lookback >= ratio.shape[1] else limited._replace(lookback=lookback)


def effective_sample_size(weights: Weights, groups: np.ndarray | None = None) -> np.ndarray:
    """(sum w)^2 / sum w^2 (Kish 1965) of the uncapped weights: a float64, or one for each slot [slots].

    A cap would make the log look richer than it is. With `groups` [rows] (say, users) the weights of a group are added
    first, since its rows are not independent. 0 where the new policy does nothing that was logged.
    """
    log = as_columns(weights.log)
    highest = np.max(log, axis=0, initial=-np.inf)
    relative = np.exp(log - np.where(np.isfinite(highest), highest, 0.0))  # what is squared must not overflow
    sums = group_sums(relative, groups)
    total, squares = sums.sum(axis=0), np.square(sums).sum(axis=0)
    size = np.divide(np.square(total), squares, out=np.zeros_like(total), where=squares > 0)
    return size.reshape(weights.log.shape[1:])


def over_slots(sizes: np.ndarray, discounts: np.ndarray | None = None) -> float:
    """One figure of the effective sample sizes [slots]: sum d_k^2 / sum (d_k^2 / size_k).

    The variance of sum_k d_k mean_k is the sum of d_k^2 / size_k times a slot's, were the slots' rewards independent;
    this is the size that each would need for the same. `discounts` [slots]: what a slot's reward counts; None: all 1.
    Raises ValueError unless there is one for each slot, none below 0 and some above it.
    """
    discounts = np.ones(len(sizes)) if discounts is None else np.asarray(discounts, np.float64)
    if discounts.shape != sizes.shape:
        raise ValueError(f"discounts of shape {discounts.shape}, expected one for each of {len(sizes)} slot(s)")
    if not (np.isfinite(discounts).all() and (discounts >= 0).all() and (discounts > 0).any()):
        raise ValueError(f"discounts {discounts.tolist()}, expected finite, at least 0 and not all of them 0")
    importance = np.square(discounts)
    if not sizes[importance > 0].all():
        return 0.0
    kept = importance > 0
    return float(importance.sum() / np.sum(importance[kept] / sizes[kept]))


def as_columns(values: np.ndarray) -> np.ndarray:
    """[rows, slots] of [rows, slots], or of [rows]: one slot."""
    return values[:, None] if values.ndim == 1 else values


def group_sums(values: np.ndarray, groups: np.ndarray | None) -> np.ndarray:
    """[groups, parts]: the sums of values [rows, parts] over the rows of each group [rows]; None: a row is a group."""
    if groups is None:
        return values
    if len(groups) != len(values):
        raise ValueError(f"{len(groups)} groups for {len(values)} rows, expected one for each")
    labels, index = np.unique(groups, return_inverse=True)
    sums = np.zeros((len(labels), values.shape[1]))
    np.add.at(sums, index, values)
    return sums


def _weights(log: np.ndarray, cap: float | None) -> Weights:
    if cap is not None and not cap > 0:
        raise ValueError(f"the cap of the weights is {cap}, expected above 0")
    limit = MAX_LOG if cap is None else min(float(np.log(cap)), MAX_LOG)
    return Weights(log, np.exp(np.minimum(log, limit)), log > limit)


def _checked(logprob_new: np.ndarray, logprob_logged: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    new, logged = np.asarray(logprob_new, np.float64), np.asarray(logprob_logged, np.float64)
    if new.shape != logged.shape:
        raise ValueError(f"log-probabilities of shapes {new.shape} (new) and {logged.shape} (logged), expected equal")
    for name, values, wrong in (
        ("new", new, np.isnan(new) | (new > 1e-6)),
        ("logged", logged, ~np.isfinite(logged) | (logged > 1e-6)),
    ):
        if wrong.any():
            place = tuple(int(i) for i in np.argwhere(wrong)[0])
            expected = "at most 0" if name == "new" else "finite and at most 0: what was logged has been possible"
            raise ValueError(f"row {place}: the {name} log-probability is {values[place]}, expected {expected}")
    return new, logged
