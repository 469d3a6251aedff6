"""A policy at the recommendations of a server's log, as it is served there."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxrec.evaluation.metrics import exclude_items
from jaxrec.models.hybrid import PolicyHead
from jaxrec.rl.scoring import Scoring, policy_logits
from jaxrec.rl.served.policy import served_logits, served_logprobs
from jaxrec.rl.served.states import LogStates

ROWS_PER_BATCH = 256
Columns = TypeVar("Columns")


def state_logits(graphdef: nnx.GraphDef[PolicyHead], head: Any, scoring: Scoring, states: LogStates) -> jax.Array:
    """The policy's logits [rows, items + 1]; NEVER at the items of the history."""
    logits = policy_logits(nnx.merge(graphdef, head), jnp.asarray(states.query), jnp.asarray(states.recent), scoring)
    return exclude_items(logits, jnp.asarray(states.exclude))


def slot_logprobs(logits: jax.Array, states: LogStates) -> jax.Array:
    """[rows, k]: of the logged slots, as a policy with these logits is served at the temperature of each row."""
    slate = jnp.asarray(states.slate)
    return served_logprobs(served_logits(logits, jnp.asarray(states.temperature), slate), slate)


def logged_logprobs(graphdef: nnx.GraphDef[PolicyHead], head: Any, scoring: Scoring, states: LogStates) -> np.ndarray:
    """[rows, k] float64: log-probabilities of the logged slots under a policy as it is served."""
    found = by_batches(lambda batch: _logprobs(graphdef, head, scoring, batch), states)
    return np.minimum(np.asarray(found, np.float64), 0.0)


@functools.partial(jax.jit, static_argnums=0)
def _logprobs(graphdef: nnx.GraphDef[PolicyHead], head: Any, scoring: Scoring, states: LogStates) -> jax.Array:
    return slot_logprobs(state_logits(graphdef, head, scoring, states), states)


def by_batches(compute: Callable[[LogStates], Columns], states: LogStates) -> Columns:
    """What `compute` makes of ROWS_PER_BATCH rows at a time, put together as NumPy arrays [rows, ...]. The last batch
    repeats the last row, so that one shape is compiled."""
    found = []
    for start in range(0, len(states.user), ROWS_PER_BATCH):
        rows = np.minimum(np.arange(start, start + ROWS_PER_BATCH), len(states.user) - 1)
        found.append(jax.device_get(compute(states.at(rows))))
    return jax.tree.map(lambda *parts: np.concatenate(parts)[: len(states.user)], *found)
