"""The logit of items that are never recommended, and how items get it."""

import chex
import jax
import jax.numpy as jnp

NEVER = -1e30
"""The logit of padding and of excluded items."""


def exclude_items(scores: jax.Array, exclude: jax.Array) -> jax.Array:
    """Takes items out of the candidates.

    Args:
        scores: [batch, items + 1] float32; column 0 is padding.
        exclude: [batch, width] int32 (0 = nothing).

    Returns:
        The scores with NEVER at the excluded items and at padding.
    """
    chex.assert_rank([scores, exclude], 2)
    rows = jnp.arange(scores.shape[0])[:, None]
    return scores.at[rows, exclude].set(NEVER).at[:, 0].set(NEVER)
