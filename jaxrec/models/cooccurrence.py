"""The co-occurrence model: scores by the neighbours of the most recent events. Nothing of it is trained by gradient."""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxrec.models.features import Array
from jaxrec.models.neighbours import Neighbours
from jaxrec.models.tables import FixedTable

RECENT_ITEMS = 10  # events that score; the eleventh would weigh RECENT_DECAY ** 10 = 6 %
RECENT_DECAY = 0.75


class CoOccurrence(nnx.Module):
    """score(j) = sum over the RECENT_ITEMS last events of RECENT_DECAY ** (how many came later) * weight(item, j)."""

    def __init__(self, neighbours: Neighbours) -> None:
        self.neighbour_item = FixedTable(jnp.asarray(neighbours.item, jnp.int32))
        self.neighbour_weight = FixedTable(jnp.asarray(neighbours.weight, jnp.float32))

    def scores(self, recent: jax.Array) -> jax.Array:
        """recent [batch, RECENT_ITEMS] int32 as `recent_items` gives it -> [batch, items + 1] float32, not negative."""
        return neighbour_scores(self.neighbour_item[...], self.neighbour_weight[...], recent)


def neighbour_scores(neighbour_item: jax.Array, neighbour_weight: jax.Array, recent: jax.Array) -> jax.Array:
    """`CoOccurrence.scores` with its two tables [items + 1, width]."""
    decays = RECENT_DECAY ** jnp.arange(RECENT_ITEMS, dtype=jnp.float32)
    rows = jnp.arange(recent.shape[0])[:, None, None]
    scores = jnp.zeros((recent.shape[0], neighbour_item.shape[0]), jnp.float32)
    return scores.at[rows, neighbour_item[recent]].add(neighbour_weight[recent] * decays[:, None])


def recent_items(item: Array, length: Array, before: jax.Array | None = None) -> jax.Array:
    """The most recent items of each row, the last one first.

    Args:
        item: [batch, length] int32.
        length: [batch] int32, how many of a row's items count.
        before: [batch, RECENT_ITEMS] int32, the most recent items before `item`, the last one first.

    Returns:
        [batch, RECENT_ITEMS] int32, 0 where there are no more.

    Examples:
        >>> recent_items(jnp.array([[5, 6, 7]]), jnp.array([2]))[0, :3].tolist()
        [6, 5, 0]
    """
    item = jnp.asarray(item)
    if before is None:
        before = jnp.zeros((item.shape[0], RECENT_ITEMS), jnp.int32)
    timeline = jnp.concatenate([before[:, ::-1], item], axis=1)
    places = RECENT_ITEMS - 1 + jnp.asarray(length)[:, None] - jnp.arange(RECENT_ITEMS)
    return jnp.take_along_axis(timeline, places, axis=1)
