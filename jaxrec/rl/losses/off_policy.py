"""Top-K off-policy correction: Chen et al. 2019, "Top-K Off-Policy Correction for a REINFORCE Recommender System"
(arXiv:1812.02353).

The log holds single actions a_t that a behaviour policy β chose, and the returns R_t that followed. Equation 6: with
α(a|s) = 1 - (1 - π(a|s))^K, the probability that a is among K draws from π,

    gradient = E_β[ sum_t π(a_t|s_t)/β(a_t|s_t) * λ_K(s_t, a_t) * R_t * grad log π(a_t|s_t) ]
    λ_K(s, a) = dα/dπ = K (1 - π(a|s))^(K - 1)          (equation 7)
    π/β is replaced by min(π/β, c)                      (equation 8)

π, β and λ_K are all taken at the logged action, never at one that the policy draws anew. The products of weights over
the steps before and after t are left out, as in equation 3 of the paper (first order).
"""

import math

import chex
import jax
import jax.numpy as jnp

from jaxrec.rl.losses.masking import masked_mean, zero_masked


def capped_importance_weights(
    logprob_pi: jax.Array, logprob_beta: jax.Array, cap: float | None = None
) -> tuple[jax.Array, jax.Array]:
    """min(π/β, cap) of logged actions (equation 8).

    Computed from log-probabilities, so that the ratio of two tiny numbers is exact and none overflows before the cap.

    Args:
        logprob_pi: [...] float32, log π of the logged actions, nats.
        logprob_beta: [...] float32, log β of the logged actions, nats.
        cap: the largest weight, above 0; None for no cap.

    Returns:
        (weights, clipped), [...] float32 and bool: the weights, which are constants of the gradient (equation 6
        differentiates log π only), and where the cap was reached.

    Examples:
        >>> pi, beta = jnp.log(jnp.array([0.5, 0.9])), jnp.log(jnp.array([0.25, 0.1]))
        >>> weights, clipped = capped_importance_weights(pi, beta, cap=3.0)
        >>> [round(weight, 4) for weight in weights.tolist()], clipped.tolist()
        ([2.0, 3.0], [False, True])
    """
    chex.assert_equal_shape([logprob_pi, logprob_beta])
    log_weights = jax.lax.stop_gradient(logprob_pi - logprob_beta)
    if cap is None:
        return jnp.exp(log_weights), jnp.zeros(log_weights.shape, bool)
    limit = math.log(cap)
    return jnp.exp(jnp.minimum(log_weights, limit)), log_weights > limit


def weight_metrics(weights: jax.Array, clipped: jax.Array, where: jax.Array) -> dict[str, jax.Array]:
    """Effective sample size (Kong 1992) as a share of the sample, and the share of weights at the cap; all [...].

    Examples:
        >>> everywhere, none = jnp.ones(4, bool), jnp.zeros(4, bool)
        >>> float(weight_metrics(jnp.array([1.0, 1.0, 0.0, 0.0]), none, everywhere)["ess_share"])
        0.5
    """
    count = jnp.maximum(jnp.sum(where, dtype=jnp.float32), 1.0)
    weights = jnp.where(where, weights, 0.0)
    size = jnp.square(jnp.sum(weights)) / jnp.maximum(jnp.sum(jnp.square(weights)), 1e-30)
    return {"ess_share": size / count, "clipped_share": jnp.sum(where & clipped, dtype=jnp.float32) / count}


def top_k_multiplier(logprob_pi: jax.Array, k: int) -> jax.Array:
    """λ_K of logged actions (equation 7), a constant of the gradient: k where π is near 0, 0 where it is near 1.

    log(1 - π) is computed without cancellation at both ends.

    Args:
        logprob_pi: [...] float32, log π of the logged actions, nats.
        k: draws, at least 1.

    Returns:
        [...] float32.

    Examples:
        >>> [round(each, 4) for each in top_k_multiplier(jnp.log(jnp.array([0.5, 0.9])), 3).tolist()]  # 3 (1 - π)^2
        [0.75, 0.03]
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
    """Scalar whose gradient is minus equation 6, with the cap of equation 8.

    `k` = 1 is the plain off-policy correction (equation 3). There, without a `cap`, a baseline that does not depend on
    the action may be subtracted from the returns without a bias, since E_β[w grad log π] is 0. E_β[w λ_K grad log π] is
    not 0, nor is the expectation with capped weights: a baseline is then a deviation from the paper that adds a bias.

    Args:
        logprob_pi: [...] float32, log π of the logged actions, nats.
        logprob_beta: [...] float32, log β of the logged actions, nats; a constant of the gradient.
        returns: [...] float32, what followed each action; constants of the gradient.
        where: [...] bool, the actions that count.
        k: items that the policy shows at a time.
        cap: the largest importance weight; None for no cap.

    Returns:
        Scalar, a mean over the actions that count; 0 if there are none.

    Examples:
        >>> pi, beta = jnp.log(jnp.array([0.5])), jnp.log(jnp.array([0.25]))
        >>> loss = top_k_off_policy_loss(pi, beta, jnp.array([3.0]), jnp.array([True]), k=2)
        >>> round(float(loss), 4)  # -(w 2) (λ 1) (R 3) log(0.5)
        4.1589
    """
    chex.assert_equal_shape([logprob_pi, logprob_beta, returns, where])
    logprob_pi, logprob_beta, returns = zero_masked(where, logprob_pi, logprob_beta, returns)
    weights, _ = capped_importance_weights(logprob_pi, logprob_beta, cap)
    coefficients = jax.lax.stop_gradient(weights * top_k_multiplier(logprob_pi, k) * returns)
    return -masked_mean(coefficients * logprob_pi, where)
