"""Rewards of recommended items, as named terms.

A recommended item is judged by the event that really came next: did it hit, how close are its genres, how well is it
rated. Each term lies in 0..1. A new term is a function here, a field of `RewardTerms` and one of `RewardWeights`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrec.config import RewardWeights

SHRINKAGE = 10.0  # an item's mean rating counts as much as the global one from this many ratings on


class RewardTables(NamedTuple):
    """What the terms look up per item, row 0 being padding: `genre_directions` [items + 1, genres] float32 (unit
    vectors, or zero), `item_ratings` [items + 1] float32 (shrunk mean of the unit ratings in training)."""

    genre_directions: jax.Array
    item_ratings: jax.Array


class RewardTerms(NamedTuple):
    """Each [..., k] float32 in 0..1. The names are those of `RewardWeights`."""

    hit: jax.Array
    genre: jax.Array
    rating: jax.Array


def reward_terms(
    recommended: jax.Array, target: jax.Array, target_rating: jax.Array, tables: RewardTables
) -> RewardTerms:
    """The terms of recommended [..., k] int32, for target [...] int32 and its logged unit rating [...] float32."""
    hit = hit_term(recommended, target)
    return RewardTerms(
        hit=hit,
        genre=genre_term(recommended, target, tables.genre_directions),
        rating=rating_term(hit, target_rating, tables.item_ratings[recommended]),
    )


def hit_term(recommended: jax.Array, target: jax.Array) -> jax.Array:
    """1 where the recommended item is the actual one."""
    return (recommended == target[..., None]).astype(jnp.float32)


def genre_term(recommended: jax.Array, target: jax.Array, genre_directions: jax.Array) -> jax.Array:
    """Cosine of the two binary genre vectors; 0 where either item has no genre."""
    return jnp.sum(genre_directions[recommended] * genre_directions[target][..., None, :], axis=-1)


def rating_term(hit: jax.Array, target_rating: jax.Array, recommended_ratings: jax.Array) -> jax.Array:
    """The logged rating [...] where the item is the target, else what the item is rated on average [..., k].

    A term that gave every item the target's rating would not depend on the action, and the baseline would cancel it.
    """
    return jnp.where(hit > 0, target_rating[..., None], recommended_ratings)


def total_reward(terms: RewardTerms, weights: RewardWeights) -> jax.Array:
    """[..., k]: the weighted sum of the terms."""
    return weights.hit * terms.hit + weights.genre * terms.genre + weights.rating * terms.rating


def discounts(k: int) -> np.ndarray:
    """[k] float32: DCG's 1 / log2(rank + 1), scaled to sum 1: a slate's reward is a mean of its items' rewards."""
    gains = 1.0 / np.log2(np.arange(2, k + 2))
    return (gains / gains.sum()).astype(np.float32)


def genre_directions(genre_matrix: np.ndarray) -> np.ndarray:
    """Rows of the binary [items + 1, genres] matrix scaled to length 1; rows without genres stay zero."""
    lengths = np.linalg.norm(genre_matrix, axis=1, keepdims=True)
    return (genre_matrix / np.maximum(lengths, 1.0)).astype(np.float32)


def shrunk_item_ratings(items: np.ndarray, unit_ratings: np.ndarray, item_count: int) -> np.ndarray:
    """[item_count + 1] float32: (sum of the item's ratings + SHRINKAGE * global mean) / (count + SHRINKAGE).

    `items` [events] int32 and `unit_ratings` [events] float32 of the training events; missing ratings (below 0) do not
    count. Without any rating every item gets 0.5, so that the rating term says nothing.
    """
    rated = unit_ratings >= 0
    items, unit_ratings = items[rated], unit_ratings[rated].astype(np.float64)
    global_mean = unit_ratings.mean() if len(unit_ratings) else 0.5
    counts = np.bincount(items, minlength=item_count + 1)
    sums = np.bincount(items, weights=unit_ratings, minlength=item_count + 1)
    return ((sums + SHRINKAGE * global_mean) / (counts + SHRINKAGE)).astype(np.float32)
