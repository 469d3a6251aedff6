"""Imitation: the cross-entropy of logged items, which keeps a policy near what users chose."""

import chex
import jax
import jax.numpy as jnp

from jaxrec.rl.policy import recommendable


def imitation_loss(logits: jax.Array, target: jax.Array, weight: jax.Array) -> jax.Array:
    """Weighted mean cross-entropy of logged items under a policy.

    Args:
        logits: [batch, items + 1] float32, NEVER for items that may not be recommended.
        target: [batch] int32, the logged items. Those that may not be recommended do not count.
        weight: [batch] float32, at least 0.

    Returns:
        Scalar, nats; 0 if no target counts.

    Examples:
        >>> two_items = jnp.array([[-1e9, 0.0, 0.0]])
        >>> round(float(imitation_loss(two_items, jnp.array([1]), jnp.array([0.5]))), 4)  # log 2
        0.6931
    """
    chex.assert_rank([logits, target, weight], [2, 1, 1])
    chex.assert_equal_shape_prefix([logits, target, weight], 1)
    chosen = jnp.take_along_axis(logits, target[:, None], axis=1)[:, 0]
    weight = jnp.where(recommendable(chosen), weight, 0.0)
    losses = jnp.where(weight > 0, jax.nn.logsumexp(logits, axis=1) - chosen, 0.0)
    return jnp.sum(weight * losses) / jnp.maximum(jnp.sum(weight), 1e-6)
