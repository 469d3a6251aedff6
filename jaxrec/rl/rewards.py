"""Rewards of recommended items, as named terms.

A recommended item is judged by the event that really came next: did it hit, how close are its genres, how well is it
rated, by itself and beside what the user mostly gives; and by itself: how novel is it, how unlike the items above it.
Each term lies in 0..1. A new term is a function here, a field of `RewardTerms` and one of `RewardWeights`.
"""

from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxrec.data.prepared import PreparedData
from jaxrec.rl.config import RewardWeights

SHRINKAGE = 10.0  # an item's (or a user's) mean rating counts as much as the global one from this many ratings on
Values = TypeVar("Values", jax.Array, np.ndarray)


class RewardTables(NamedTuple):
    """What the terms look up per item, row 0 being padding: `genre_directions` [items + 1, genres] float32 (unit
    vectors, or zero), `item_ratings` [items + 1] float32 (shrunk mean of the unit ratings in training; row 0: the mean
    of all), `item_centred` [items + 1] float32 (the same of the centred ratings), `item_novelty` [items + 1] float32.
    """

    genre_directions: jax.Array
    item_ratings: jax.Array
    item_centred: jax.Array
    item_novelty: jax.Array


class RewardTerms(NamedTuple):
    """Each [..., k] float32 in 0..1. The names are those of `RewardWeights`."""

    hit: jax.Array
    genre: jax.Array
    rating: jax.Array
    centred_rating: jax.Array
    novelty: jax.Array
    diversity: jax.Array


def reward_terms(
    recommended: jax.Array, target: jax.Array, target_rating: jax.Array, user_mean: jax.Array, tables: RewardTables
) -> RewardTerms:
    """The terms of recommended [..., k] int32, for target [...] int32 (0: nothing was taken), its logged unit rating
    [...] float32 and the mean of the user's ratings before it [...] float32."""
    hit = hit_term(recommended, target)
    return RewardTerms(
        hit=hit,
        genre=genre_term(recommended, target, tables.genre_directions),
        rating=rating_term(hit, target_rating, tables.item_ratings[recommended]),
        centred_rating=rating_term(hit, centred(target_rating, user_mean), tables.item_centred[recommended]),
        novelty=tables.item_novelty[recommended],
        diversity=diversity_term(recommended, tables.genre_directions),
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


def centred(rating: Values, user_mean: Values) -> Values:
    """Unit ratings beside the user's mean, in 0..1: 0.5 where they are equal."""
    return 0.5 + (rating - user_mean) / 2


def diversity_term(recommended: jax.Array, genre_directions: jax.Array) -> jax.Array:
    """1 - the mean genre cosine to the items above (Ziegler et al. 2005, "Improving Recommendation Lists", section 3.3,
    slot by slot); 1 for the first slot. Items without genres are unlike all."""
    directions = genre_directions[recommended]
    above = jnp.cumsum(directions, axis=-2) - directions
    slots = jnp.maximum(jnp.arange(recommended.shape[-1]), 1)
    return 1.0 - jnp.sum(directions * above, axis=-1) / slots


def total_reward(terms: RewardTerms, weights: RewardWeights) -> jax.Array:
    """[..., k]: the weighted sum of the terms."""
    return sum((getattr(weights, name) * term for name, term in terms._asdict().items()), jnp.zeros(()))


def discounts(k: int) -> np.ndarray:
    """[k] float32: DCG's 1 / log2(rank + 1), scaled to sum 1: a slate's reward is a mean of its items' rewards."""
    gains = 1.0 / np.log2(np.arange(2, k + 2))
    return (gains / gains.sum()).astype(np.float32)


def slot_discounts(where: Values) -> Values:
    """[rows, k] float32: `discounts` of each row's own slate, whose slots hold items from the first on (`where` [rows,
    k] bool), and 0 after it: a wide slate beside others leaves what these earn as it is."""
    gains = where.astype(np.float32) * (1.0 / np.log2(np.arange(2, where.shape[1] + 2))).astype(np.float32)
    return gains / gains.sum(axis=1, keepdims=True).clip(np.float32(1e-12))


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


def running_user_means(offsets: np.ndarray, unit_ratings: np.ndarray, global_mean: float) -> np.ndarray:
    """[events] float32: the mean of the user's ratings before each event, shrunk as items' are; what comes later does
    not enter. `offsets` [users + 1] int64, `unit_ratings` [events] float32 (missing ones, below 0, do not count)."""
    rated = unit_ratings >= 0
    totals = np.concatenate([[0.0], np.cumsum(np.where(rated, unit_ratings, 0.0), dtype=np.float64)])
    counts = np.concatenate([[0], np.cumsum(rated)])
    first = np.repeat(offsets[:-1], np.diff(offsets))
    total, count = totals[:-1] - totals[first], counts[:-1] - counts[first]
    return ((total + SHRINKAGE * global_mean) / (count + SHRINKAGE)).astype(np.float32)


def novelties(counts: np.ndarray, users: int) -> np.ndarray:
    """[items + 1] float32: -log2 of the share of users who took the item (Vargas and Castells 2011, "Rank and Relevance
    in Novelty and Diversity Metrics", section 3.1), as a share of what an item that nobody took has; 0: all took it.

    `counts` [items + 1]: training events per item; `users`: how many trained. Both count one more, so that a share is
    never 0.
    """
    shares = np.minimum((counts + 1.0) / (users + 1.0), 1.0)
    return (np.log2(shares) / -np.log2(users + 1.0)).astype(np.float32)


def reward_tables(data: PreparedData) -> RewardTables:
    """The tables of prepared data, fitted on its training events."""
    items, unit_ratings, count = data.histories.items, data.unit_ratings(), len(data.catalog)
    rows = data.split.train_rows(data.histories)
    item_ratings = shrunk_item_ratings(items[rows], unit_ratings[rows], count)
    means = running_user_means(data.histories.offsets, unit_ratings, float(item_ratings[0]))
    distance = np.where(unit_ratings >= 0, centred(unit_ratings, means) - 0.5, 0.0)[rows]
    rated = np.bincount(items[rows], weights=unit_ratings[rows] >= 0, minlength=count + 1)
    of_items = np.bincount(items[rows], weights=distance, minlength=count + 1)
    users = int((data.split.train_counts > 0).sum())
    return RewardTables(
        jnp.asarray(genre_directions(data.catalog.genre_matrix())),
        jnp.asarray(item_ratings),
        jnp.asarray(0.5 + of_items / (rated + SHRINKAGE), jnp.float32),
        jnp.asarray(novelties(data.train_popularity(), users)),
    )
