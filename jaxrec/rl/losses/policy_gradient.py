"""Policy gradients from slates that the policy drew itself.

Both losses have the gradient of Williams 1992, theorem 1, with its sign turned: minus the mean of

    sum_i grad log p(slot i | slots before it) * (G_i - b_i)

where G_i is the return that slot i is answerable for, and b_i a baseline that does not depend on what slot i draws.
They differ in the baseline: a learned one, or the other samples of the same state. What a slot without an item holds
(a NaN, too) reaches neither value nor gradient.
"""

import jax
import jax.numpy as jnp


def reinforce_loss(logprobs: jax.Array, returns: jax.Array, baseline: jax.Array, where: jax.Array) -> jax.Array:
    """Scalar whose gradient is minus the policy gradient. All [batch, k]; `where` marks slots that hold an item.

    Williams 1992, theorem 1, with a baseline [batch, k] that is a function of the state; it receives no gradient here.
    The mean is over the rows of which any slot counts.
    """
    advantages = jnp.where(where, jax.lax.stop_gradient(returns - baseline), 0.0)
    rows = jnp.sum(jnp.any(where, axis=-1), dtype=jnp.float32)
    return -jnp.sum(jnp.where(where, logprobs, 0.0) * advantages) / jnp.maximum(rows, 1.0)


def baseline_loss(baseline: jax.Array, returns: jax.Array, where: jax.Array) -> jax.Array:
    """Mean squared error over the slots that hold an item. All [batch, k]."""
    errors = jnp.where(where, baseline - jax.lax.stop_gradient(returns), 0.0)
    return jnp.sum(jnp.square(errors)) / jnp.maximum(jnp.sum(where, dtype=jnp.float32), 1.0)


def plackett_luce_loss(logprobs: jax.Array, returns: jax.Array, where: jax.Array) -> jax.Array:
    """Scalar whose gradient is minus the policy gradient, from several slates of each state.

    Kool et al. 2019, "Buy 4 REINFORCE Samples, Get a Baseline for Free!": with S independent samples

        gradient = 1/S sum_s grad log p(slate_s) * (f_s - 1/(S - 1) sum_(j != s) f_j)

    The other samples know nothing of sample s, so their mean is a baseline of no bias. `logprobs` and `returns` are
    [samples, batch] of whole slates, or [samples, batch, k] of slots (`jaxrec.rl.policy.slate_logprobs`, reward to go):
    then each slot has the other samples' mean return from that slot on. `where` [batch] or [batch, k], the same for all
    samples; the mean is over the states of which anything counts. Raises ValueError for fewer than two samples, and
    where the shapes differ.
    """
    samples = logprobs.shape[0]
    if samples < 2:
        raise ValueError(f"{samples} sample(s) of each state, expected at least 2: the others are the baseline")
    if returns.shape != logprobs.shape or where.shape != logprobs.shape[1:]:
        raise ValueError(
            f"logprobs {logprobs.shape}, returns {returns.shape} and where {where.shape}, expected returns of the "
            "first one's shape and where of that without samples"
        )
    returns = jax.lax.stop_gradient(jnp.where(where, returns, 0.0))
    others = (jnp.sum(returns, axis=0) - returns) / (samples - 1)
    terms = jnp.where(where, logprobs, 0.0) * (returns - others)
    states = jnp.sum(jnp.any(where.reshape(where.shape[0], -1), axis=-1), dtype=jnp.float32)
    return -jnp.sum(terms) / (samples * jnp.maximum(states, 1.0))
