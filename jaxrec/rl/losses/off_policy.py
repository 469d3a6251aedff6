"""Top-K off-policy correction: Chen et al. 2019, "Top-K Off-Policy Correction for a REINFORCE Recommender System"
(arXiv:1812.02353).

The log holds single actions a_t that a behaviour policy β chose, and the returns R_t that followed. Equation 6: with
α(a|s) = 1 - (1 - π(a|s))^K, the probability that a is among K draws from π,

    gradient = E_β[ sum_t π(a_t|s_t)/β(a_t|s_t) * λ_K(s_t, a_t) * R_t * grad log π(a_t|s_t) ]
    λ_K(s, a) = dα/dπ = K (1 - π(a|s))^(K - 1)          (equation 7)
    π/β is replaced by min(π/β, c)                      (equation 8)

π, β and λ_K are all taken at the action that was logged, never at one that the policy draws anew. The products of
weights over the steps before and after t are left out, as in equation 3 of the paper (first order).
"""

import math

import jax
import jax.numpy as jnp


def importance_weights(
    logprob_pi: jax.Array, logprob_beta: jax.Array, cap: float | None = None
) -> tuple[jax.Array, jax.Array]:
    """(weights, clipped) [...]: min(π/β, cap) at the logged actions, and where the cap was reached (bool).

    Computed from log-probabilities, so that the ratio of two tiny numbers is exact and none overflows before the cap.
    The weights are constants of the gradient (equation 6 differentiates log π only).
    """
    log_weights = jax.lax.stop_gradient(logprob_pi - logprob_beta)
    if cap is None:
        return jnp.exp(log_weights), jnp.zeros(log_weights.shape, bool)
    limit = math.log(cap)
    return jnp.exp(jnp.minimum(log_weights, limit)), log_weights > limit


def top_k_multiplier(logprob_pi: jax.Array, k: int) -> jax.Array:
    """λ_K [...] = k (1 - π)^(k - 1) of the logged actions (equation 7): k where π is near 0, 0 where it is near 1.

    A constant of the gradient. log(1 - π) is taken without cancellation on both ends.
    """
    logprob = jax.lax.stop_gradient(logprob_pi)
    if k == 1:
        return jnp.ones_like(logprob)
    near_one = logprob > -math.log(2)
    log_rest = jnp.where(
        near_one,
        jnp.log(-jnp.expm1(jnp.where(near_one, logprob, -1.0))),
        jnp.log1p(-jnp.exp(jnp.where(near_one, -1.0, logprob))),
    )
    return k * jnp.exp((k - 1) * log_rest)


def top_k_off_policy_loss(
    logprob_pi: jax.Array,
    logprob_beta: jax.Array,
    returns: jax.Array,
    where: jax.Array,
    k: int,
    cap: float | None = None,
) -> jax.Array:
    """Scalar whose gradient is minus equation 6 with the cap of equation 8, a mean over the entries of `where`.

    All [...], at the logged actions; what the others hold reaches neither value nor gradient. `k` = 1 is the plain
    off-policy correction (equation 3). A baseline that does not depend on the action may be subtracted from the
    returns: without a bias only for k = 1 and no `cap`, where E_β[w grad log π] is 0. E_β[w λ_K grad log π] is not, nor
    is it with capped weights, and there a baseline is a deviation which adds a bias.
    """
    logprob_pi, logprob_beta, returns = (jnp.where(where, x, 0.0) for x in (logprob_pi, logprob_beta, returns))
    weights, _ = importance_weights(logprob_pi, logprob_beta, cap)
    coefficients = jax.lax.stop_gradient(weights * top_k_multiplier(logprob_pi, k) * returns)
    terms = jnp.where(where, coefficients * logprob_pi, 0.0)
    return -jnp.sum(terms) / jnp.maximum(jnp.sum(where, dtype=jnp.float32), 1.0)
