"""Ranking metrics over the full catalogue. Ranks are 1-based; MISS is the rank of what cannot be recommended."""

import chex
import jax
import jax.numpy as jnp
import numpy as np

from jaxrec.models.masks import NEVER, exclude_items

MISS = np.iinfo(np.int32).max
"""The rank of a target that cannot be recommended: a miss for every k."""


def rank_of_target(scores: jax.Array, target: jax.Array, exclude: jax.Array) -> jax.Array:
    """Ranks of the targets among the items that are not excluded; ties count against the target.

    Args:
        scores: [batch, items + 1] float32; column 0 is padding.
        target: [batch] int32.
        exclude: [batch, width] int32, items that are not recommended (0 = nothing).

    Returns:
        [batch] int32, from 1. MISS where the target can never be recommended: it is excluded itself (a user can meet an
        item twice), it is unknown (0), or its score is NaN.
    """
    chex.assert_rank([scores, target, exclude], [2, 1, 2])
    candidates = exclude_items(scores, exclude)
    target_score = jnp.take_along_axis(candidates, target[:, None], axis=1)
    behind = (candidates < target_score).at[:, 0].set(True).at[jnp.arange(len(target)), target].set(True)
    rank = 1 + jnp.sum(~behind, axis=1, dtype=jnp.int32)
    return jnp.where(target_score[:, 0] > NEVER, rank, MISS)


def hit_rate(ranks: np.ndarray, k: int) -> np.ndarray:
    """Hit rate at k of each case: 1.0 where the target is among the first k. [...] int -> [...] float64.

    Examples:
        >>> hit_rate(np.array([1, 10, 11, MISS]), 10)
        array([1., 1., 0., 0.])
    """
    return (ranks <= k).astype(np.float64)


def ndcg(ranks: np.ndarray, k: int) -> np.ndarray:
    """NDCG at k of each case, which has one relevant item, so that the ideal DCG is 1. [...] int -> [...] float64.

    1 / log2(rank + 1) within the first k, else 0 (the discount of Burges et al. 2005).

    >>> ndcg(np.array([1, 3, 11, MISS]), 10)
    array([1. , 0.5, 0. , 0. ])
    """
    return np.where(ranks <= k, 1.0 / np.log2(ranks + 1.0), 0.0)


def reciprocal_rank(ranks: np.ndarray) -> np.ndarray:
    """1 / rank of each case; 0 for a MISS. [...] int -> [...] float64.

    Examples:
        >>> reciprocal_rank(np.array([1, 2, 10, MISS]))
        array([1. , 0.5, 0.1, 0. ])
    """
    return np.where(ranks == MISS, 0.0, 1.0 / ranks)


def coverage(top: np.ndarray, item_count: int) -> float:
    """The share of the catalogue's `item_count` items that occurs in the lists `top` [cases, k] (0 = no item left).

    >>> coverage(np.array([[1, 2], [2, 0]]), item_count=8)
    0.25
    """
    return len(np.unique(top[top > 0])) / item_count
