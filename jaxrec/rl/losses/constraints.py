"""Constraints that keep a policy from giving the same few items to everybody.

Each loss is 0 until the policy falls below a floor, and then grows by one per nat.
"""

import chex
import jax
import jax.numpy as jnp

from jaxrec.rl.losses.masking import masked_mean


def entropy_floor_loss(entropies: jax.Array, floor: float | jax.Array, where: jax.Array) -> jax.Array:
    """Mean number of nats by which a policy's entropies fall below a floor.

    An entropy bonus (Williams & Peng 1991) that ends at a floor: a policy above it is not pushed towards uniform.

    Args:
        entropies: [batch] float32, nats (`jaxrec.rl.policy.entropy`).
        floor: scalar, nats.
        where: [batch] bool, the states that count.

    Returns:
        Scalar, nats; 0 if no state counts.

    Examples:
        >>> float(entropy_floor_loss(jnp.array([0.5, 2.0]), 1.0, jnp.array([True, True])))  # (0.5 + 0) / 2
        0.25
    """
    chex.assert_rank([entropies, where], 1)
    chex.assert_equal_shape([entropies, where])
    return masked_mean(jnp.maximum(jnp.where(where, floor - entropies, 0.0), 0.0), where)


def coverage_floor_loss(logits: jax.Array, floor: float | jax.Array, where: jax.Array) -> tuple[jax.Array, jax.Array]:
    """How far the number of items that a batch's recommendations are spread over is below a floor.

    The mean policy over the batch is the share of all recommendations that each item gets. The exponential of its
    entropy is the effective number of items (Hill 1973, number of order 1). The loss is log(floor / that number), or 0
    above the floor. A policy may be certain in every state if it differs between states.

    Args:
        logits: [batch, items + 1] float32.
        floor: scalar, in items.
        where: [batch] bool, the states that count.

    Returns:
        (loss, effective items), scalars, in nats and in items; both 0 if no state counts.

    Examples:
        >>> certain = jnp.array([[-1e9, 50.0, 0.0, 0.0], [-1e9, 0.0, 50.0, 0.0]])  # of item 1, of item 2
        >>> loss, items = coverage_floor_loss(certain, 3.0, jnp.array([True, True]))
        >>> round(float(loss), 4), round(float(items), 4)  # log(3 / 2), 2
        (0.4055, 2.0)
    """
    chex.assert_rank([logits, where], [2, 1])
    chex.assert_equal_shape_prefix([logits, where], 1)
    any_counts, count = jnp.any(where), jnp.maximum(jnp.sum(where, dtype=jnp.float32), 1.0)
    counted = jnp.where(where[:, None], logits, 0.0)  # before the softmax, whose gradient would spread a NaN
    share = jnp.sum(jnp.where(where[:, None], jax.nn.softmax(counted), 0.0), axis=0) / count
    some = share > 0  # the logarithm of an item that no state recommends has no gradient
    spread = -jnp.sum(jnp.where(some, share * jnp.log(jnp.where(some, share, 1.0)), 0.0))
    loss = jnp.maximum(jnp.log(floor) - spread, 0.0)
    return jnp.where(any_counts, loss, 0.0), jnp.where(any_counts, jnp.exp(spread), 0.0)
