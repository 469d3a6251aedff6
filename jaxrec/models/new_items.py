"""New items, those without training events, in a ranking: below the first places, which stay as they would be."""

import chex
import jax
import jax.numpy as jnp

from jaxrec.models.features import Array
from jaxrec.models.masks import NEVER

FIRST_PLACES = 10
"""So many places are for known items; the metrics of a list of this length do not change."""
GAP = 1e-3
"""Logits of capped items lie up to twice this below that of the last of the FIRST_PLACES."""


def capped_logits(logits: jax.Array, new_items: jax.Array, exclude: Array | None = None) -> jax.Array:
    """Logits in which no new item is among the FIRST_PLACES of the known ones that may be recommended.

    With t, the logit of the last of those places, a new item's logit l becomes min(l, t - 2 GAP) + GAP x / (1 + x),
    x = max(l - t, 0): below t - GAP, and in the order of l.

    Args:
        logits: [batch, items + 1] float32; column 0 is padding.
        new_items: [items + 1] bool, or [batch, items + 1].
        exclude: [batch, width] int32, items that are not recommended (0 = nothing); None: every item may be.

    Returns:
        [batch, items + 1] float32: the logits, those of new items capped. Where fewer than FIRST_PLACES known items
        may be recommended, all of them are before the new ones.

    Examples:
        >>> logits = jnp.array([[0.0, *range(12, 0, -1), 20.0, 2.5]])  # known items 1 to 12, new 13 and 14
        >>> new = jnp.arange(15) > 12
        >>> [round(x, 4) for x in capped_logits(logits, new)[0, 12:].tolist()]  # the tenth of the known has 3
        [1.0, 2.9989, 2.5]
    """
    chex.assert_rank([logits, new_items], [2, {1, 2}])
    known = jnp.where(new_items, NEVER, logits)
    if exclude is not None:
        known = known.at[jnp.arange(len(known))[:, None], exclude].set(NEVER)
    best = jax.lax.top_k(known[:, 1:], min(FIRST_PLACES, known.shape[1] - 1))[0]
    last = jnp.min(jnp.where(best > NEVER / 2, best, jnp.inf), axis=1, keepdims=True)
    above = jnp.maximum(logits - last, 0.0)
    capped = jnp.minimum(logits, last - 2 * GAP) + GAP * above / (1 + above)
    return jnp.where(new_items, capped, logits)
