"""The clipped surrogate of a policy's value on a log: Schulman et al. 2017, "Proximal Policy Optimization Algorithms"
(arXiv:1707.06347), equation 7.

With the ratio w = π/β of what was logged, its mean of w A has the policy gradient; cut at a cap as

    min(w A, clip(w, 1 / cap, cap) A)

what is good is not made likelier any more once it is `cap` times as likely as in the log, and what is bad not rarer
than 1 / cap. A capped weight that only scales grad log π (Chen et al. 2019, equation 8) goes on for ever, and a policy
that can tell the states of a small log apart learns them by heart: its weights on the users that trained it grow until
some rows are all that counts, while other users gain nothing.

What is bad and far likelier than in the log would weigh without bound, and it ends at the cap, too (the dual clip of Ye
et al. 2020, arXiv:1912.09729, equation 5, with the same bound). Deviations: the ratio is to the policy of the log, not
to that of the last update, and for slates the product over the slots above, as in per-decision importance sampling; the
bounds are 1 / cap and cap instead of 1 - ε and 1 + ε.
"""

import math

import jax
import jax.numpy as jnp


def clipped_surrogate_loss(log_ratios: jax.Array, advantages: jax.Array, where: jax.Array, cap: float) -> jax.Array:
    """Scalar: minus the surrogate, summed over slots; the mean is over the rows of which any slot counts.

    All [rows, slots]: `log_ratios` log π/β of the slots up to each one, `advantages` (constants of the gradient) a
    slot's reward less a baseline of the state. What slots outside of `where` hold reaches neither value nor gradient.
    Raises ValueError for a cap of 1 or less.
    """
    if not cap > 1:
        raise ValueError(f"the cap is {cap}, expected above 1")
    advantages = jax.lax.stop_gradient(jnp.where(where, advantages, 0.0))
    limit = math.log(cap)
    # Cut before exp, which would overflow and make a NaN of the branch that is not taken.
    capped = jnp.minimum(jnp.where(where, log_ratios, 0.0), limit)
    weights = jnp.exp(jnp.where(advantages > 0, capped, jnp.maximum(capped, -limit)))
    rows = jnp.sum(jnp.any(where, axis=-1), dtype=jnp.float32)
    return -jnp.sum(weights * advantages) / jnp.maximum(rows, 1.0)
