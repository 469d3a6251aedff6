"""Importance weights of logged decisions."""

from typing import NamedTuple

import numpy as np

from jaxrec.rl.ope.columns import check_shape

MAX_LOG = 700.0  # exp of more is no float64


class ImportanceWeights(NamedTuple):
    """Weights of decisions [rows], or of slots [rows, slots].

    Attributes:
        log: float64, the logarithm of the uncapped weight; -inf where the new policy never does what was logged.
        value: float64, the weight, capped.
        clipped: bool, where the cap was reached.
        lookback: how many slots the product was limited to; None if it goes over all.
    """

    log: np.ndarray
    value: np.ndarray
    clipped: np.ndarray
    lookback: int | None = None

    @property
    def clipped_share(self) -> float:
        """The share of the weights that reached the cap."""
        return float(self.clipped.mean()) if self.clipped.size else 0.0

    @property
    def bias(self) -> str:
        """Why these weights are not the ratio of the policies; empty if they are."""
        if self.clipped.any():
            return f"{self.clipped_share:.1%} of the weights are capped"
        return "" if self.lookback is None else f"the weights look back over {self.lookback} slot(s) of the slate"


def importance_weights(
    logprob_new: np.ndarray, logprob_logged: np.ndarray, cap: float | None = None
) -> ImportanceWeights:
    """π_new(a|x) / π_logged(a|x) of logged actions.

    Args:
        logprob_new: [rows], nats; -inf where the new policy never does what was logged.
        logprob_logged: [rows], nats, finite.
        cap: the largest weight, above 0; None for no cap.

    Returns:
        Weights [rows].

    Raises:
        ValueError: A shape does not fit, a logged probability is 0, a log-probability is NaN or above 0, or the cap is
            not above 0.

    Examples:
        >>> importance_weights(np.log([0.5, 0.2]), np.log([0.25, 0.4])).value.round(4)
        array([2. , 0.5])
    """
    new, logged = _checked(logprob_new, logprob_logged)
    check_shape("log-probabilities", new, (None,), "[rows]")
    return _weights(new - logged, cap)


def slate_weights(
    logprob_new: np.ndarray,
    logprob_logged: np.ndarray,
    where: np.ndarray | None = None,
    cap: float | None = None,
    lookback: int | None = None,
) -> ImportanceWeights:
    """Weights of logged slates: slot k's is the product of the ratios of slots 1..k.

    A lookback lowers the variance, and adds a bias where a slot's reward depends on slots further up. McInerney et al.
    2020, "Counterfactual Evaluation of Slate Recommendations with Sequential Reward Interactions" (arXiv:2007.12986),
    choose it by effective sample size; here it is the caller's.

    Args:
        logprob_new: [rows, slots], nats, of each slot given the slots before it; -inf where the new policy never does
            what was logged.
        logprob_logged: [rows, slots], nats, likewise, finite.
        where: [rows, slots] bool, the slots that hold an item; the others leave the product as it is. None: all.
        cap: the largest product, above 0; None for no cap.
        lookback: how many slots the product is limited to, k included; None: all.

    Returns:
        Weights [rows, slots].

    Raises:
        ValueError: A shape does not fit, a logged probability is 0, a log-probability is NaN or above 0, the cap is not
            above 0, or the lookback is below 1.

    Examples:
        >>> ratios = np.array([[2.0, 3.0, 0.5]])
        >>> slate_weights(np.log(0.1 * ratios), np.log([[0.1, 0.1, 0.1]])).value.round(4)
        array([[2., 6., 3.]])
    """
    where = np.ones(np.shape(logprob_new), bool) if where is None else np.asarray(where, bool)
    check_shape("where", where, np.shape(logprob_new), f"{np.shape(logprob_new)} as the log-probabilities")
    new, logged = _checked(np.where(where, logprob_new, 0.0), np.where(where, logprob_logged, 0.0))
    check_shape("log-probabilities", new, (None, None), "[rows, slots]")
    ratio = new - logged
    if lookback is None:
        return _weights(np.cumsum(ratio, axis=1), cap)
    if lookback < 1:
        raise ValueError(f"lookback is {lookback}, expected at least 1 slot")
    padded = np.concatenate([np.zeros((len(ratio), lookback - 1)), ratio], axis=1)
    windows = np.lib.stride_tricks.sliding_window_view(padded, lookback, axis=1)
    limited = _weights(windows.sum(axis=-1), cap)
    return limited if lookback >= ratio.shape[1] else limited._replace(lookback=lookback)


def _weights(log: np.ndarray, cap: float | None) -> ImportanceWeights:
    if cap is not None and not cap > 0:
        raise ValueError(f"the cap of the weights is {cap}, expected above 0")
    limit = MAX_LOG if cap is None else min(float(np.log(cap)), MAX_LOG)
    return ImportanceWeights(log, np.exp(np.minimum(log, limit)), log > limit)


def _checked(logprob_new: np.ndarray, logprob_logged: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both as float64. Raises ValueError where they cannot be log-probabilities of the same decisions."""
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
