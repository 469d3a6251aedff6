"""The policy as a server with `--explore TEMPERATURE` plays it: Plackett-Luce over the best POOL items of the logits
divided by the temperature (`serve.model.exploration`)."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxrec.models.masks import NEVER
from jaxrec.rl.policy import recommendable, slate_logprobs

POOL = 100
EXACT = 0.02  # nats; propensities that are reproduced as closely are this policy's


def served_logits(logits: jax.Array, temperature: jax.Array, slates: jax.Array) -> jax.Array:
    """logits [batch, items + 1] -> those of the drawing of slates [batch, k] int32 at temperature [batch]: NEVER
    outside of the pool, which is as wide as the slate at least."""
    widest = min(max(POOL, slates.shape[1]), logits.shape[-1])
    pool = jnp.clip(jnp.sum(slates > 0, axis=1), min(POOL, widest), widest)
    least = jnp.take_along_axis(jax.lax.top_k(logits, widest)[0], pool[:, None] - 1, axis=1)
    return jnp.where(recommendable(logits) & (logits >= least), tempered(logits, temperature), NEVER)


def tempered(logits: jax.Array, temperature: jax.Array) -> jax.Array:
    """logits [batch, items + 1] over temperature [batch], NEVER where they are."""
    return jnp.where(recommendable(logits), logits / temperature[:, None], logits)


def served_logprobs(logits: jax.Array, slates: jax.Array) -> jax.Array:
    """log p(slot | slots before it) [batch, k] of slates [batch, k] int32 under `served_logits`; NEVER for an item that
    is not drawn from, 0 for an empty slot (item 0)."""
    chosen = jnp.take_along_axis(logits, slates, axis=-1)
    logprobs = jnp.where(recommendable(chosen), slate_logprobs(logits, slates), NEVER)
    return jnp.where(slates > 0, logprobs, 0.0)


def reproduced_versions(
    logprobs: np.ndarray, log_propensities: np.ndarray, version: np.ndarray, count: int
) -> np.ndarray:
    """Which of `count` model versions [count] bool are the policy with these `logprobs` [rows, k] of the logged slots:
    those whose rows (`version` [rows] int32) it reproduces, by the median row's largest distance from the logged
    `log_propensities` [rows, k]. Not by every row: that an event came late, the log does not tell. A version without
    rows is not."""
    distance = np.abs(logprobs - log_propensities).max(axis=1)
    medians = (np.median(distance[version == one]) if np.any(version == one) else np.inf for one in range(count))
    return np.array([median <= EXACT for median in medians], bool)
