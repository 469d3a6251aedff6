"""Means over the entries that count.

What a masked entry holds, a NaN too, must reach neither the value of a loss nor its gradient. So masked inputs are set
to 0 before anything is computed from them: 0 times the derivative at a NaN is a NaN.
"""

import jax
import jax.numpy as jnp


def zero_masked(where: jax.Array, *inputs: jax.Array) -> tuple[jax.Array, ...]:
    """The inputs [*where.shape, ...] with 0 where `where` (bool) is false."""
    return tuple(jnp.where(where.reshape(where.shape + (1,) * (x.ndim - where.ndim)), x, 0.0) for x in inputs)


def masked_mean(values: jax.Array, where: jax.Array) -> jax.Array:
    """Mean of values [...] float32 over the entries of `where` [...] bool; 0 if there are none.

    Examples:
        >>> float(masked_mean(jnp.array([1.0, 2.0, jnp.nan]), jnp.array([True, True, False])))
        1.5
    """
    return jnp.sum(jnp.where(where, values, 0.0)) / jnp.maximum(jnp.sum(where, dtype=jnp.float32), 1.0)


def count_rows(where: jax.Array) -> jax.Array:
    """How many rows of `where` [rows, ...] bool have an entry that counts; 1 if none has, to divide by.

    Examples:
        >>> float(count_rows(jnp.array([[True, True], [True, False], [False, False]])))
        2.0
    """
    return jnp.maximum(jnp.sum(jnp.any(where.reshape(where.shape[0], -1), axis=-1), dtype=jnp.float32), 1.0)
