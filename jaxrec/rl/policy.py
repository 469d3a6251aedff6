"""Slates drawn without replacement (Plackett-Luce), their exact log-probabilities, and distances between policies.

Logits are [..., items + 1] float32. Items that may not be recommended hold NEVER
(`jaxrec.evaluation.metrics.exclude_items`).
"""

import chex
import jax
import jax.numpy as jnp

from jaxrec.models.masks import NEVER


def sample_slates(key: jax.Array, logits: jax.Array, k: int) -> jax.Array:
    """Slates whose items are drawn one after the other without replacement from softmax(logits).

    Adding Gumbel noise and taking the k largest draws exactly that (Kool et al. 2019, "Stochastic Beams and Where to
    Find Them", section 2.2, after Yellott 1977).

    Args:
        key: of the draw.
        logits: [..., items + 1] float32.
        k: slots of a slate.

    Returns:
        [..., k] int32 items, best first. If fewer than k items may be recommended, the last slots hold others.
    """
    noise = jax.random.gumbel(key, logits.shape, logits.dtype)
    return greedy_slates(logits + noise, k)


def greedy_slates(logits: jax.Array, k: int) -> jax.Array:
    """[..., k] int32: the k items with the highest logits [..., items + 1], best first.

    Examples:
        >>> greedy_slates(jnp.array([0.0, 0.1, 3.0, -1.0]), k=2).tolist()
        [2, 1]
    """
    return jax.lax.top_k(logits, k)[1]


def recommendable(logits: jax.Array) -> jax.Array:
    """[...] bool of logits [...]: true for items that may be recommended."""
    return logits > NEVER / 2


def slate_logprobs(logits: jax.Array, slates: jax.Array) -> jax.Array:
    """log p(slot i | slots before it), whose sum is the slate's log-probability under Plackett-Luce.

    The items left for slot i are those of slots i, i + 1, ... and those outside the slate. Their log-sum-exp is summed
    from the back, so nothing is subtracted that could cancel.

    Args:
        logits: [..., items + 1] float32.
        slates: [..., k] int32 different items.

    Returns:
        [..., k] float32, nats; 0 for slots whose item may not be recommended.

    Examples:
        >>> logits = jnp.log(jnp.array([1e-9, 1 / 2, 1 / 3, 1 / 6]))
        >>> [round(p, 4) for p in jnp.exp(slate_logprobs(logits, jnp.array([1, 2]))).tolist()]  # 1/2, then 1/3 of 1/2
        [0.5, 0.6667]
    """
    chex.assert_rank(slates, logits.ndim)
    chex.assert_equal_shape_prefix([logits, slates], logits.ndim - 1)
    chosen = jnp.take_along_axis(logits, slates, axis=-1)
    outside = jnp.put_along_axis(logits, slates, jnp.float32(NEVER), axis=-1, inplace=False)
    rest = jax.nn.logsumexp(outside, axis=-1, keepdims=True)
    left = jax.lax.cumlogsumexp(jnp.concatenate([chosen, rest], axis=-1), axis=logits.ndim - 1, reverse=True)
    return jnp.where(recommendable(chosen), chosen - left[..., :-1], 0.0)


def kl_divergence(logits: jax.Array, reference: jax.Array) -> jax.Array:
    """KL(softmax(logits) || softmax(reference)) of a slate's first slot, exact over the catalogue.

    Args:
        logits: [..., items + 1] float32.
        reference: [..., items + 1] float32, in which the same items may be recommended.

    Returns:
        [...] float32, nats.

    Examples:
        >>> half, quarter = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.25, 0.75]))
        >>> round(float(kl_divergence(half, quarter)), 4)  # (log(2) + log(2 / 3)) / 2
        0.1438
    """
    chex.assert_equal_shape([logits, reference])
    log_p, log_q = jax.nn.log_softmax(logits), jax.nn.log_softmax(reference)
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def entropy(logits: jax.Array) -> jax.Array:
    """[...] nats: the entropy of softmax(logits [..., items + 1]).

    Examples:
        >>> round(float(entropy(jnp.zeros(2))), 4)  # log 2
        0.6931
    """
    log_p = jax.nn.log_softmax(logits)
    return -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)
