"""Policy gradients from slates that the policy drew itself."""

import jax
import jax.numpy as jnp


def reinforce_loss(logprobs: jax.Array, returns: jax.Array, baseline: jax.Array, where: jax.Array) -> jax.Array:
    """Scalar whose gradient is minus the policy gradient. All [batch, k]; `where` marks slots that hold an item."""
    advantages = jax.lax.stop_gradient(returns - baseline)
    return -jnp.mean(jnp.sum(jnp.where(where, logprobs * advantages, 0.0), axis=-1))


def baseline_loss(baseline: jax.Array, returns: jax.Array, where: jax.Array) -> jax.Array:
    """Mean squared error over the slots that hold an item. All [batch, k]."""
    errors = jnp.where(where, jnp.square(baseline - jax.lax.stop_gradient(returns)), 0.0)
    return jnp.sum(errors) / jnp.maximum(jnp.sum(where, dtype=jnp.float32), 1.0)
