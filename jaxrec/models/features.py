"""What a model reads of an event: the batch type, and the learned views of rating and time."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

# Bucket 0: unknown. Bucket 1: less than a second. Then powers of two, up to 2**29 seconds (17 years) and beyond.
GAP_EDGES = np.concatenate([[0.0], 2.0 ** np.arange(30)]).astype(np.float32)
GAP_BUCKETS = len(GAP_EDGES) + 1

Array = jax.Array | np.ndarray


def gap_bucket(gap: Array) -> jax.Array:
    """The bucket of each gap, by comparisons only, so that every runtime agrees at the edges.

    Args:
        gap: [...] float32, seconds; below 0 where it is unknown.

    Returns:
        [...] int32 in 0..GAP_BUCKETS - 1.

    Examples:
        >>> gap_bucket(np.array([-1.0, 0.0, 0.9, 1.0, 2.0, 1e12], np.float32)).tolist()
        [0, 1, 1, 2, 3, 31]
    """
    return jnp.sum(gap[..., None] >= GAP_EDGES, axis=-1, dtype=jnp.int32)


class GapEmbedding(nnx.Module):
    """A learned vector for each log-sized bucket of a time gap."""

    def __init__(self, width: int, *, rngs: nnx.Rngs) -> None:
        self.table = nnx.Param(0.1 * jax.random.normal(rngs.params(), (GAP_BUCKETS, width)))

    def __call__(self, gap: Array) -> jax.Array:
        """[...] float32 seconds -> [..., width] float32."""
        return self.table[...][gap_bucket(gap)]


class RatingEmbedding(nnx.Module):
    """A learned line through the rating scale, and a learned vector for a missing rating."""

    def __init__(self, width: int, *, rngs: nnx.Rngs) -> None:
        self.slope = nnx.Param(jax.random.normal(rngs.params(), (width,)))
        self.offset = nnx.Param(jnp.zeros(width))
        self.missing = nnx.Param(jnp.zeros(width))

    def __call__(self, rating: Array) -> jax.Array:
        """[...] float32 in 0..1 or MISSING_RATING -> [..., width] float32."""
        rating = rating[..., None]
        return jnp.where(rating < 0, self.missing[...], rating * self.slope[...] + self.offset[...])
