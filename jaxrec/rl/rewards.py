"""Rewards of recommended items, as named terms.

A recommended item is compared with the event that really came next: whether it is that item, how close its genres are,
and how well it is rated, absolutely and relative to the user's mean. Two more terms are its own: how novel it is, and
how unlike the items above it. Each term lies in 0..1. A new term is a function here, a field of `RewardTerms` and one
of `RewardWeights`.
"""

from typing import NamedTuple, TypeVar

import chex
import jax
import jax.numpy as jnp
import numpy as np

from jaxrec.rl.config import RewardWeights

Values = TypeVar("Values", jax.Array, np.ndarray)


class RewardTables(NamedTuple):
    """What the terms look up per item (`jaxrec.rl.reward_tables` fits them); row 0 is padding.

    Attributes:
        genre_directions: [items + 1, genres] float32, unit vectors, or zero for items without genres.
        item_ratings: [items + 1] float32, shrunk mean of the unit ratings in training; row 0: the mean of all.
        item_centred: [items + 1] float32, shrunk mean of the centred ratings in training.
        item_novelty: [items + 1] float32, in 0..1.
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


def slate_reward_terms(
    recommended: jax.Array, target: jax.Array, target_rating: jax.Array, user_mean: jax.Array, tables: RewardTables
) -> RewardTerms:
    """The terms of recommended items, each by itself.

    Args:
        recommended: [..., k] int32 items, best first. It may have more leading axes than the target.
        target: [...] int32, the item that came next; 0 if there was none.
        target_rating: [...] float32, its logged unit rating.
        user_mean: [...] float32, the mean of the user's unit ratings before it.
        tables: what the terms look up.

    Returns:
        The terms, each [..., k].
    """
    chex.assert_equal_shape([target, target_rating, user_mean])
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
    """[..., k] float32: 1 where the recommended item [..., k] is the target [...].

    Examples:
        >>> hit_term(jnp.array([7, 5]), jnp.array(5)).tolist()
        [0.0, 1.0]
    """
    return (recommended == target[..., None]).astype(jnp.float32)


def genre_term(recommended: jax.Array, target: jax.Array, genre_directions: jax.Array) -> jax.Array:
    """[..., k] float32: cosine of the binary genre vectors of recommended [..., k] and target [...] items.

    0 where either item has no genre.

    Examples:
        >>> directions = jnp.array([[0.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
        >>> [round(cosine, 4) for cosine in genre_term(jnp.array([1, 2]), jnp.array(2), directions).tolist()]
        [0.8, 1.0]
    """
    return jnp.sum(genre_directions[recommended] * genre_directions[target][..., None, :], axis=-1)


def rating_term(hit: jax.Array, target_rating: jax.Array, recommended_ratings: jax.Array) -> jax.Array:
    """[..., k] float32: the logged rating [...] where the item is the target, else its mean rating [..., k].

    A term that gave every item the target's rating would not depend on the action, and the baseline would cancel it.

    Examples:
        >>> rating_term(jnp.array([0.0, 1.0]), jnp.array(1.0), jnp.array([0.25, 0.5])).tolist()
        [0.25, 1.0]
    """
    return jnp.where(hit > 0, target_rating[..., None], recommended_ratings)


def centred(rating: Values, user_mean: Values) -> Values:
    """[...]: unit ratings relative to the user's mean, in 0..1; 0.5 where they are equal.

    Examples:
        >>> centred(np.array([1.0, 0.6]), np.array([0.6, 0.6])).tolist()
        [0.7, 0.5]
    """
    return 0.5 + (rating - user_mean) / 2


def diversity_term(recommended: jax.Array, genre_directions: jax.Array) -> jax.Array:
    """[..., k] float32: 1 - the mean genre cosine to the items above; 1 for the first slot.

    Ziegler et al. 2005, "Improving Recommendation Lists Through Topic Diversification", section 3.3, slot by slot.
    Items without genres are unlike all.

    Examples:
        >>> diversity_term(jnp.array([1, 1, 2]), jnp.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])).tolist()
        [1.0, 0.0, 1.0]
    """
    directions = genre_directions[recommended]
    above = jnp.cumsum(directions, axis=-2) - directions
    slots = jnp.maximum(jnp.arange(recommended.shape[-1]), 1)
    return 1.0 - jnp.sum(directions * above, axis=-1) / slots


def total_reward(terms: RewardTerms, weights: RewardWeights) -> jax.Array:
    """[..., k] float32: the weighted sum of the terms."""
    return sum((getattr(weights, name) * term for name, term in terms._asdict().items()), jnp.zeros(()))


def rank_discounts(k: int) -> np.ndarray:
    """[k] float32: DCG's 1 / log2(rank + 1), scaled to sum 1, so that a slate's reward is a mean of its items'.

    Examples:
        >>> [round(float(each), 4) for each in rank_discounts(3)]  # 1, 0.6309 and 0.5, over 2.1309
        [0.4693, 0.2961, 0.2346]
    """
    gains = _dcg_gains(k)
    return (gains / gains.sum()).astype(np.float32)


def slot_discounts(where: Values) -> Values:
    """`rank_discounts` of each row's own slate: a wide slate beside others does not change their discounts.

    Args:
        where: [rows, k] bool, the slots that hold an item, from the first on.

    Returns:
        [rows, k] float32, 0 after the slate.

    Examples:
        >>> slot_discounts(np.array([[True, True, True], [True, False, False]]))[1].tolist()
        [1.0, 0.0, 0.0]
    """
    chex.assert_rank(where, 2)
    gains = where.astype(np.float32) * _dcg_gains(where.shape[1]).astype(np.float32)
    return gains / gains.sum(axis=1, keepdims=True).clip(np.float32(1e-12))


def _dcg_gains(k: int) -> np.ndarray:
    return 1.0 / np.log2(np.arange(2, k + 2))
