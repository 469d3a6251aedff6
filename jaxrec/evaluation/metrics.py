"""Ranking metrics over the full catalogue, with bootstrap intervals. Ranks are 1-based."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxrec.models.masks import NEVER

BOOTSTRAP_SAMPLES = 1000


def exclude_items(scores: jax.Array, exclude: jax.Array) -> jax.Array:
    """scores [batch, items + 1] with NEVER at the items of `exclude` [batch, width] int32 and at padding."""
    rows = jnp.arange(scores.shape[0])[:, None]
    return scores.at[rows, exclude].set(NEVER).at[:, 0].set(NEVER)


def rank_of_target(scores: jax.Array, target: jax.Array, exclude: jax.Array) -> jax.Array:
    """[batch] int32 rank of each target among the items that are not excluded; ties count against the target.

    A target that is excluded itself (a user can meet an item twice) is never recommended: it has the last rank, as
    has a target whose score is NaN.
    """
    candidates = exclude_items(scores, exclude)
    target_score = jnp.take_along_axis(candidates, target[:, None], axis=1)
    behind = (candidates < target_score).at[:, 0].set(True).at[jnp.arange(len(target)), target].set(True)
    return 1 + jnp.sum(~behind, axis=1, dtype=jnp.int32)


def hit_rate(ranks: np.ndarray, k: int) -> np.ndarray:
    """[cases] 1.0 where the target is among the first k."""
    return (ranks <= k).astype(np.float64)


def ndcg(ranks: np.ndarray, k: int) -> np.ndarray:
    """[cases] 1 / log2(rank + 1) within the first k, else 0 (one relevant item: the ideal DCG is 1)."""
    return np.where(ranks <= k, 1.0 / np.log2(ranks + 1.0), 0.0)


def reciprocal_rank(ranks: np.ndarray) -> np.ndarray:
    """[cases] 1 / rank."""
    return 1.0 / ranks


def coverage(top: np.ndarray, item_count: int) -> float:
    """The share of the catalogue that occurs in the lists `top` [cases, k] (0 = no item left to recommend)."""
    return len(np.unique(top[top > 0])) / item_count


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over cases with its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float


def bootstrap_mean(values: np.ndarray, seed: int = 0) -> Estimate:
    """Mean of `values` [cases] with its interval."""
    return _bootstrap(lambda cases: values[cases].mean(), len(values), seed)


def bootstrap_ratio(values: np.ndarray, reference: np.ndarray, seed: int = 0) -> Estimate:
    """Mean of `values` over mean of `reference`, both [cases] and of the same cases, with the paired interval."""
    return _bootstrap(lambda cases: values[cases].mean() / max(reference[cases].mean(), 1e-12), len(values), seed)


def _bootstrap(figure: Callable[[np.ndarray], float], count: int, seed: int) -> Estimate:
    """`figure` of all cases, with the percentile interval of BOOTSTRAP_SAMPLES resamples of the cases."""
    if not count:
        raise ValueError("no cases to average")
    rng = np.random.default_rng(seed)
    samples = [figure(rng.integers(count, size=count)) for _ in range(BOOTSTRAP_SAMPLES)]
    low, high = np.quantile(samples, [0.025, 0.975])
    return Estimate(float(figure(np.arange(count))), float(low), float(high))
