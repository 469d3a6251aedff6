"""The policy as a server with `--explore TEMPERATURE` plays it: Plackett-Luce over the best POOL items of the logits
divided by the temperature (`serve/exploration.py`)."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrec.models.sequence import NEVER
from jaxrec.rl.policy import recommendable, slate_logprobs

POOL = 100
TEMPERATURES = (0.01, 100.0)
GRID = 17
REFINEMENTS = 6
EXACT = 0.02  # nats; propensities that are reproduced as closely are this policy's


def served_logits(logits: jax.Array, temperature: jax.Array | float, slots: int) -> jax.Array:
    """logits [batch, items + 1] -> those of the drawing: NEVER outside of the pool, which is as wide as a slate at
    least."""
    pool = min(max(POOL, slots), logits.shape[-1])
    least = jax.lax.top_k(logits, pool)[0][:, -1:]
    return jnp.where(recommendable(logits) & (logits >= least), logits / temperature, NEVER)


def served_logprobs(logits: jax.Array, slates: jax.Array) -> jax.Array:
    """log p(slot | slots before it) [batch, k] of slates [batch, k] int32 under `served_logits`; NEVER for an item that
    is not drawn from, 0 for an empty slot (item 0)."""
    chosen = jnp.take_along_axis(logits, slates, axis=-1)
    logprobs = jnp.where(recommendable(chosen), slate_logprobs(logits, slates), NEVER)
    return jnp.where(slates > 0, logprobs, 0.0)


class Fit(NamedTuple):
    """`error` nats: the median distance between the logged log-propensities and those of a policy at `temperature`, in
    what was shown last; `own_share`: of the whole log's slates, those that this policy reproduces."""

    temperature: float
    error: float
    own_share: float


def fit_temperature(
    logits: jax.Array, slates: jax.Array, log_propensities: jax.Array, temperature: float | None = None
) -> tuple[float, float]:
    """The temperature at which a policy with logits [rows, items + 1] comes closest to the propensities [rows, k] of
    the logged slates, or the given one, and the median distance there in nats. The store does not note the temperature;
    where the log is this policy's it is found exactly."""

    def errors(temperatures: np.ndarray) -> np.ndarray:
        return np.asarray(_errors(jnp.asarray(temperatures, jnp.float32), logits, slates, log_propensities))

    if temperature is not None:
        return temperature, float(errors(np.array([temperature]))[0])
    return _least(errors)


def own_share(logits: jax.Array, slates: jax.Array, log_propensities: jax.Array, temperature: float) -> float:
    """The share of the slates [rows, k] all of whose propensities a policy with these logits reproduces."""
    logprobs = served_logprobs(served_logits(logits, temperature, slates.shape[1]), slates)
    distance = jnp.max(jnp.where(slates > 0, jnp.abs(logprobs - log_propensities), 0.0), axis=1)
    return float(jnp.mean(distance <= EXACT))


@jax.jit
def _errors(temperatures: jax.Array, logits: jax.Array, slates: jax.Array, log_propensities: jax.Array) -> jax.Array:
    pool = served_logits(logits, 1.0, slates.shape[1])  # the same at every temperature

    def error(temperature: jax.Array) -> jax.Array:
        logprobs = served_logprobs(jnp.where(recommendable(pool), pool / temperature, NEVER), slates)
        return jnp.nanmedian(jnp.where(slates > 0, jnp.abs(logprobs - log_propensities), jnp.nan))

    return jax.lax.map(error, temperatures)


def _least(errors: Callable[[np.ndarray], np.ndarray]) -> tuple[float, float]:
    """By a grid in the logarithm, refined around the best point."""
    low, high = np.log(TEMPERATURES)
    for _ in range(1 + REFINEMENTS):
        grid = np.linspace(low, high, GRID)
        found = errors(np.exp(grid))
        best = int(np.argmin(found))
        step = grid[1] - grid[0]
        low, high = grid[best] - step, grid[best] + step
    return float(np.exp(grid[best])), float(found[best])
