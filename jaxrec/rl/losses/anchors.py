"""What keeps a policy near what it is known to do well, and from giving the same few items to everybody.

Each is added to a policy's loss: the anchor and the leash always pull, the entropy floor and the coverage guard are 0
until their floor is reached, and then grow by one per nat.
"""

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


def entropy_floor_loss(entropies: jax.Array, floor: float | jax.Array, where: jax.Array) -> jax.Array:
    """Mean nats by which entropies [batch] (`jaxrec.rl.policy.entropy`) fall below the floor, over `where` [batch].

    An entropy bonus (Williams & Peng 1991) that ends at a floor: a policy above it is not pushed towards uniform.
    """
    missing = jnp.maximum(jnp.where(where, floor - entropies, 0.0), 0.0)
    return jnp.sum(missing) / jnp.maximum(jnp.sum(where, dtype=jnp.float32), 1.0)


def coverage_guard_loss(logits: jax.Array, floor: float | jax.Array, where: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(loss, effective items) of logits [batch, items + 1], of which the states of `where` [batch] count.

    The mean policy over the batch says what share of all recommendations each item gets; exp of its entropy is the
    number of items that it is spread over (Hill 1973, number of order 1). The loss is the logarithm of how many times
    that number is below `floor`, and 0 above it; a policy may be certain in every state if it differs between states.
    Where no state counts both are 0.
    """
    any_counts, count = jnp.any(where), jnp.maximum(jnp.sum(where, dtype=jnp.float32), 1.0)
    counted = jnp.where(where[:, None], logits, 0.0)  # before the softmax, whose gradient would spread a NaN
    share = jnp.sum(jnp.where(where[:, None], jax.nn.softmax(counted), 0.0), axis=0) / count
    some = share > 0  # the logarithm of an item that nobody may get has no gradient
    spread = -jnp.sum(jnp.where(some, share * jnp.log(jnp.where(some, share, 1.0)), 0.0))
    loss = jnp.maximum(jnp.log(floor) - spread, 0.0)
    return jnp.where(any_counts, loss, 0.0), jnp.where(any_counts, jnp.exp(spread), 0.0)
