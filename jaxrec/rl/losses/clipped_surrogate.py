"""The clipped surrogate of a policy's value on a log: Schulman et al. 2017, "Proximal Policy Optimization Algorithms"
(arXiv:1707.06347), equation 7.

With the ratio w = π/β of what was logged, the gradient of mean(w A) is the policy gradient. It is cut at a cap:

    min(w A, clip(w, 1 / cap, cap) A)

A good action gains nothing more once it is `cap` times as likely as in the log, and a bad one nothing below 1 / cap. A
capped weight that only scales grad log π (Chen et al. 2019, equation 8) has no such end: a policy that can tell the
states of a small log apart overfits them. Its weights on the training users grow until a few rows are all that counts,
while other users gain nothing.

A bad action that is far likelier than in the log would weigh without bound. It ends at the cap, too (the dual clip of
Ye et al. 2020, arXiv:1912.09729, equation 5, with the same bound). Deviations: the ratio is to the policy of the log,
not to that of the last update. For slates it is the product over the slots above, as in per-decision importance
sampling. The bounds are 1 / cap and cap instead of 1 - ε and 1 + ε.
"""

import math

import chex
import jax
import jax.numpy as jnp

from jaxrec.rl.losses.masking import count_rows


def clipped_surrogate_loss(log_ratios: jax.Array, advantages: jax.Array, where: jax.Array, cap: float) -> jax.Array:
    """Minus the clipped surrogate (equation 7 with the dual clip), summed over slots, a mean over rows.

    Args:
        log_ratios: [rows, slots] float32, log π/β of the slots up to each one, nats.
        advantages: [rows, slots] float32, a slot's reward less a baseline of the state; constants of the gradient.
        where: [rows, slots] bool, the slots that count.
        cap: the largest ratio, above 1.

    Returns:
        Scalar; the mean is over the rows that have a slot which counts.

    Raises:
        ValueError: The cap is 1 or less.

    Examples:
        >>> log_ratios, advantages = jnp.log(jnp.array([[1.5, 3.0, 0.25]])), jnp.array([[1.0, 1.0, -2.0]])
        >>> loss = clipped_surrogate_loss(log_ratios, advantages, jnp.ones((1, 3), bool), cap=2.0)
        >>> round(float(loss), 4)  # -(1.5 * 1 + 2 * 1 - 1/2 * 2)
        -2.5
    """
    chex.assert_rank([log_ratios, advantages, where], 2)
    chex.assert_equal_shape([log_ratios, advantages, where])
    if not cap > 1:
        raise ValueError(f"the cap is {cap}, expected above 1")
    advantages = jax.lax.stop_gradient(jnp.where(where, advantages, 0.0))
    limit = math.log(cap)
    # Cut before exp, which would overflow and make a NaN of the branch that is not taken.
    capped = jnp.minimum(jnp.where(where, log_ratios, 0.0), limit)
    weights = jnp.exp(jnp.where(advantages > 0, capped, jnp.maximum(capped, -limit)))
    return -jnp.sum(weights * advantages) / count_rows(where)
