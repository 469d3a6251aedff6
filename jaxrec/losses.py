"""Training losses. `where` marks valid entries; sums are divided by their number, never by the padded length."""

import jax
import jax.numpy as jnp
import optax

from jaxrec.models.features import Array


def next_item_loss(
    queries: jax.Array, item_vectors: jax.Array, item_bias: jax.Array, target: Array, where: Array
) -> jax.Array:
    """Mean full-softmax cross-entropy (nats) of the next item over valid positions; 0 where there are none.

    queries [..., width], item_vectors [items + 1, width], item_bias [items + 1], target [...] int32, where [...] bool.
    """
    logits = queries @ item_vectors.T + item_bias
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, target)
    return jnp.sum(jnp.where(where, losses, 0.0)) / jnp.maximum(jnp.sum(where), 1)
