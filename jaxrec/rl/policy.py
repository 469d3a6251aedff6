"""Slates drawn without replacement (Plackett-Luce), their exact log-probabilities, and distances between policies.

Logits are [..., items + 1]; what may not be recommended holds NEVER (`jaxrec.evaluation.metrics.exclude_items`).
"""

import jax
import jax.numpy as jnp

from jaxrec.models.masks import NEVER


def sample_slates(key: jax.Array, logits: jax.Array, k: int) -> jax.Array:
    """[..., k] int32 items, best first, drawn one after the other without replacement from softmax(logits).

    Adding Gumbel noise and taking the k largest draws exactly that (Kool et al. 2019, "Stochastic Beams and Where to
    Find Them", section 2.2, after Yellott 1977). Where fewer than k items may be recommended, the rest of the slate is
    items with logit NEVER.
    """
    noise = jax.random.gumbel(key, logits.shape, logits.dtype)
    return greedy_slates(logits + noise, k)


def greedy_slates(logits: jax.Array, k: int) -> jax.Array:
    """[..., k] int32: the k items with the highest logits, best first."""
    return jax.lax.top_k(logits, k)[1]


def recommendable(logits: jax.Array) -> jax.Array:
    """True where a logit is that of an item which may be recommended."""
    return logits > NEVER / 2


def slate_logprobs(logits: jax.Array, slates: jax.Array) -> jax.Array:
    """[..., k]: log p(slot i | slots before it), whose sum is the slate's log-probability under Plackett-Luce.

    The items left for slot i are those of slots i, i + 1, ... and those outside the slate; their log-sum-exp is summed
    from the back, so nothing is subtracted that could cancel. Slots that hold no recommendable item count 0.
    """
    chosen = jnp.take_along_axis(logits, slates, axis=-1)
    outside = jnp.put_along_axis(logits, slates, jnp.float32(NEVER), axis=-1, inplace=False)
    rest = jax.nn.logsumexp(outside, axis=-1, keepdims=True)
    left = jax.lax.cumlogsumexp(jnp.concatenate([chosen, rest], axis=-1), axis=logits.ndim - 1, reverse=True)
    return jnp.where(recommendable(chosen), chosen - left[..., :-1], 0.0)


def kl_divergence(logits: jax.Array, reference: jax.Array) -> jax.Array:
    """[...] nats: KL(softmax(logits) || softmax(reference)), exact over the catalogue.

    Both must exclude the same items. It is what one slot's first draw can tell the two policies apart by.
    """
    log_p, log_q = jax.nn.log_softmax(logits), jax.nn.log_softmax(reference)
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def entropy(logits: jax.Array) -> jax.Array:
    """[...] nats of softmax(logits)."""
    log_p = jax.nn.log_softmax(logits)
    return -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)
