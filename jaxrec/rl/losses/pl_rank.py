"""PL-Rank-2: the gradient of a ranking's expected reward under a Plackett-Luce model.

Oosterhuis 2021, "Computationally Efficient Optimization of Plackett-Luce Ranking Models for Relevance and Fairness",
equation 12: with rankings y of the first K items, discounts θ and rewards ρ of the items,

    dE[R] / ds_d = E_y[ sum_{k > rank(d)} θ_k ρ_{y_k}
                        + sum_{k <= rank(d)} π(d | y_1..y_(k-1)) (θ_k ρ_d - sum_{x >= k} θ_x ρ_{y_x}) ]

where an item that is not placed has no later ones and takes part in all K choices. A sample uses the rewards of all
items, placed or not, so that few samples are enough.
"""

import jax
import jax.numpy as jnp

from jaxrec.models.masks import NEVER


def pl_rank_loss(
    key: jax.Array, scores: jax.Array, rewards: jax.Array, where: jax.Array, discounts: jax.Array, samples: int
) -> jax.Array:
    """[]: a loss whose gradient is that of minus the expected reward, the mean over the batch.

    Args:
        key: Of the rankings that are drawn.
        scores: [batch, items] float32, the logits of the Plackett-Luce model.
        rewards: [batch, items] float32, of each item at a place with discount 1.
        where: [batch, items] bool, the items that can be placed.
        discounts: [K] float32, of the places.
        samples: Rankings drawn for each row.

    Returns:
        The loss. Its value is not the expected reward; only its gradient is meant.
    """
    fixed = jnp.where(where, jax.lax.stop_gradient(scores), NEVER)
    keys = jax.random.split(key, samples)
    gradient = jnp.mean(jax.vmap(lambda one: pl_rank_gradient(one, fixed, rewards, discounts))(keys), axis=0)
    return -jnp.sum(jnp.where(where, gradient * scores, 0.0)) / len(scores)


def pl_rank_gradient(key: jax.Array, scores: jax.Array, rewards: jax.Array, discounts: jax.Array) -> jax.Array:
    """One sample of the gradient of the expected reward by the scores.

    Args:
        key: Of the ranking that is drawn.
        scores: [batch, items] float32, NEVER for items that cannot be placed.
        rewards: [batch, items] float32.
        discounts: [K] float32; K is cut to the number of items.

    Returns:
        [batch, items] float32.
    """
    batch, items = scores.shape
    k = min(len(discounts), items)
    discounts = jnp.asarray(discounts)[:k]
    drawn, placed = jax.lax.top_k(scores + jax.random.gumbel(key, scores.shape), k)
    real = drawn > NEVER / 2
    placed_rewards = jnp.take_along_axis(rewards, placed, axis=1)
    earned = jnp.where(real, placed_rewards * discounts, 0.0)
    from_here = jnp.cumsum(earned[:, ::-1], axis=1)[:, ::-1]
    after = jnp.concatenate([from_here[:, 1:], jnp.zeros((batch, 1))], axis=1)
    weight = jnp.exp(scores - jnp.max(scores, axis=1, keepdims=True))
    of_placed = jnp.where(real, jnp.take_along_axis(weight, placed, axis=1), 0.0)
    rows = jnp.arange(batch)[:, None]
    # Summed from the back, so that nothing is subtracted that could cancel.
    outside = jnp.sum(weight.at[rows, placed].set(0.0), axis=1, keepdims=True)
    left = outside + jnp.cumsum(of_placed[:, ::-1], axis=1)[:, ::-1]
    left = jnp.where(real, left, jnp.inf)
    chances = jnp.cumsum(discounts / left, axis=1)
    forgone = jnp.cumsum(from_here / left, axis=1)
    of_others = weight * (rewards * chances[:, -1:] - forgone[:, -1:])
    return of_others.at[rows, placed].set(after + of_placed * (placed_rewards * chances - forgone))
