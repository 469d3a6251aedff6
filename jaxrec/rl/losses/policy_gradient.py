"""Policy gradients from slates that the policy drew itself.

Both losses have the gradient of Williams 1992, "Simple Statistical Gradient-Following Algorithms for Connectionist
Reinforcement Learning", theorem 1, with its sign turned: minus the mean of

    sum_i grad log p(slot i | slots before it) * (G_i - b_i)

where G_i is the return of slot i, and b_i a baseline that does not depend on what slot i draws. They differ in the
baseline: a learned one, or the other samples of the same state. Slots that do not count may hold anything, a NaN too.
"""

import chex
import jax
import jax.numpy as jnp

from jaxrec.rl.losses.masking import count_rows, masked_mean


def reinforce_loss(logprobs: jax.Array, returns: jax.Array, baseline: jax.Array, where: jax.Array) -> jax.Array:
    """Scalar whose gradient is minus the policy gradient with a baseline (Williams 1992, theorem 1).

    Args:
        logprobs: [batch, k] float32, log p(slot | slots before it), nats.
        returns: [batch, k] float32, the return of each slot; constants of the gradient.
        baseline: [batch, k] float32, a function of the state alone; a constant of the gradient.
        where: [batch, k] bool, the slots that hold an item.

    Returns:
        Scalar; the mean is over the rows that have a slot which counts.

    Examples:
        >>> logprobs, returns = jnp.array([[-1.0, -2.0]]), jnp.array([[1.0, 0.5]])
        >>> loss = reinforce_loss(logprobs, returns, jnp.full((1, 2), 0.25), jnp.ones((1, 2), bool))
        >>> float(loss)  # 1 * 0.75 + 2 * 0.25
        1.25
    """
    chex.assert_rank([logprobs, returns, baseline, where], 2)
    chex.assert_equal_shape([logprobs, returns, baseline, where])
    advantages = jnp.where(where, jax.lax.stop_gradient(returns - baseline), 0.0)
    return -jnp.sum(jnp.where(where, logprobs, 0.0) * advantages) / count_rows(where)


def baseline_loss(baseline: jax.Array, returns: jax.Array, where: jax.Array) -> jax.Array:
    """Mean squared error of a baseline (Sutton & Barto 2018, section 13.4: the critic of REINFORCE with baseline).

    Args:
        baseline: [...] float32.
        returns: [...] float32; constants of the gradient.
        where: [...] bool, the entries that count.

    Returns:
        Scalar; 0 if no entry counts.

    Examples:
        >>> float(baseline_loss(jnp.array([0.5, 0.0]), jnp.array([1.0, 9.0]), jnp.array([True, False])))
        0.25
    """
    chex.assert_equal_shape([baseline, returns, where])
    return masked_mean(jnp.square(jnp.where(where, baseline - jax.lax.stop_gradient(returns), 0.0)), where)


def plackett_luce_loss(logprobs: jax.Array, returns: jax.Array, where: jax.Array) -> jax.Array:
    """Scalar whose gradient is minus the policy gradient, from several slates of each state.

    Kool et al. 2019, "Buy 4 REINFORCE Samples, Get a Baseline for Free!": with S independent samples

        gradient = 1/S sum_s grad log p(slate_s) * (f_s - 1/(S - 1) sum_(j != s) f_j)

    The other samples are independent of sample s, so their mean is a baseline without bias.

    Args:
        logprobs: [samples, batch] float32 of whole slates, or [samples, batch, k] of slots
            (`jaxrec.rl.policy.slate_logprobs`), nats.
        returns: as `logprobs`; of slots, the reward from each slot on: each slot then has the other samples' mean
            return from that slot on as its baseline. Constants of the gradient.
        where: [batch] or [batch, k] bool, what counts, the same in all samples.

    Returns:
        Scalar; the mean is over samples and over the states of which anything counts.

    Raises:
        ValueError: There are fewer than two samples, or the shapes differ.

    Examples:
        >>> logprobs, returns = jnp.array([[-1.0], [-2.0]]), jnp.array([[1.0], [0.0]])  # two slates of one state
        >>> float(plackett_luce_loss(logprobs, returns, jnp.array([True])))  # -(-1 * (1 - 0) - 2 * (0 - 1)) / 2
        -0.5
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
    return -jnp.sum(terms) / (samples * count_rows(where))
