"""The policy as a server with `--explore TEMPERATURE` draws from it, at the recommendations of its log.

Slates are drawn by Plackett-Luce from the best POOL items of the logits divided by the temperature
(`serve/model/exploration.py`).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxrec.models.hybrid import PolicyHead
from jaxrec.models.masks import NEVER, exclude_items
from jaxrec.models.new_items import capped_logits
from jaxrec.rl.policy import recommendable, slate_logprobs
from jaxrec.rl.scoring import Scoring, policy_logits
from jaxrec.rl.served.states import ServedStates
from jaxrec.rl.states import by_batches

POOL = 100
ROWS_PER_BATCH = 256
EXACT = 0.02  # nats; propensities that are reproduced as closely are this policy's


def served_logits(logits: jax.Array, temperature: jax.Array, answered: jax.Array, longest: int) -> jax.Array:
    """The logits that a server draws slates from.

    Args:
        logits: [batch, items + 1] float32.
        temperature: [batch] float32.
        answered: [batch] int32, how many items each answer had, also if fewer of them were shown.
        longest: no answer had more items.

    Returns:
        [batch, items + 1] float32, NEVER outside of the pool: the best POOL items, or as many as were answered.
    """
    widest = min(max(POOL, longest), logits.shape[-1])
    pool = jnp.clip(answered, min(POOL, widest), widest)
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
    """[count] bool: which model versions are the policy with these `logprobs` [rows, k] of the logged slots.

    A version (`version` [rows] int32) is the policy if its median row's largest distance from the logged
    `log_propensities` [rows, k] is at most EXACT. Single rows may differ, since the log does not say which events came
    late. A version without rows is not the policy.
    """
    distance = np.abs(logprobs - log_propensities).max(axis=1)
    medians = (np.median(distance[version == one]) if np.any(version == one) else np.inf for one in range(count))
    return np.array([median <= EXACT for median in medians], bool)


def state_logits(graphdef: nnx.GraphDef[PolicyHead], head: Any, scoring: Scoring, states: ServedStates) -> jax.Array:
    """The policy's logits [rows, items + 1], with the trend of each row; NEVER at the items of the history."""
    logits = policy_logits(nnx.merge(graphdef, head), states.state, scoring)
    exclude = jnp.asarray(states.exclude)
    trend = jnp.zeros(()) if scoring.trends is None else scoring.trends.at(states.moment)
    logits += trend
    if scoring.new_items is not None:
        logits = capped_logits(logits, scoring.new_items & (trend == 0), exclude)
    return exclude_items(logits, exclude)


def state_served_logits(logits: jax.Array, states: ServedStates) -> jax.Array:
    """`served_logits` [rows, items + 1] of the policy's logits [rows, items + 1] at these states."""
    temperature, answered = jnp.asarray(states.temperature), jnp.asarray(states.answered)
    return served_logits(logits, temperature, answered, states.slate.shape[1])


def slot_logprobs(logits: jax.Array, states: ServedStates) -> jax.Array:
    """[rows, k]: of the logged slots, as a policy with these logits is served at the temperature of each row."""
    return served_logprobs(state_served_logits(logits, states), jnp.asarray(states.slate))


def logged_logprobs(
    graphdef: nnx.GraphDef[PolicyHead], head: Any, scoring: Scoring, states: ServedStates
) -> np.ndarray:
    """[rows, k] float64: log-probabilities of the logged slots under a policy as it is served."""
    found = by_batches(
        lambda rows: _logprobs(graphdef, head, scoring, states.at(rows)), len(states.user), ROWS_PER_BATCH
    )
    return np.minimum(np.asarray(found, np.float64), 0.0)


@functools.partial(jax.jit, static_argnums=0)
def _logprobs(graphdef: nnx.GraphDef[PolicyHead], head: Any, scoring: Scoring, states: ServedStates) -> jax.Array:
    return slot_logprobs(state_logits(graphdef, head, scoring, states), states)
