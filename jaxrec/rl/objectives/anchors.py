"""What keeps a policy near what it is known to do well."""

import jax
import jax.numpy as jnp

from jaxrec.rl.policy import recommendable

KL_COEFFICIENT_RANGE = (1e-3, 1e3)
KL_CONTROL_RATE = 0.1  # Ziegler et al. 2019: K_beta
KL_CONTROL_CLIP = 0.2


def anchor_loss(logits: jax.Array, target: jax.Array, weight: jax.Array) -> jax.Array:
    """Mean cross-entropy (nats) of target [batch] int32 under logits [batch, items + 1], weighted by weight [batch].

    Targets that may not be recommended do not count; 0 where none counts.
    """
    chosen = jnp.take_along_axis(logits, target[:, None], axis=1)[:, 0]
    weight = jnp.where(recommendable(chosen), weight, 0.0)
    losses = jnp.where(weight > 0, jax.nn.logsumexp(logits, axis=1) - chosen, 0.0)
    return jnp.sum(weight * losses) / jnp.maximum(jnp.sum(weight), 1e-6)


def next_kl_coefficient(coefficient: jax.Array, kl: jax.Array, target: float) -> jax.Array:
    """Ziegler et al. 2019, section 2.2: a log-space proportional controller; the error is clipped to 20 %."""
    error = jnp.clip(kl / target - 1.0, -KL_CONTROL_CLIP, KL_CONTROL_CLIP)
    return jnp.clip(coefficient * (1.0 + KL_CONTROL_RATE * error), *KL_COEFFICIENT_RANGE)
