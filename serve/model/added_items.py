"""Added items, which the catalogue of a store has and a model was not exported with, in the model's rankings.

An added item without events in the trend is new, and stays below the first places of the others, as the graphs have it
for the new items that they know.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from serve.model.ranking.engine import Ranking
from serve.model.ranking.search import best_of

FIRST_PLACES = 10
"""So many places are for items that are not new (`jaxrec.models.new_items`)."""
GAP = np.float32(1e-3)
"""Logits of new items lie up to twice this below that of the last of the FIRST_PLACES."""


class AddedItems(NamedTuple):
    """The added items of a catalogue. Not to be changed."""

    first: int
    """The item index of the first one; the others follow."""
    ids: tuple[str, ...]
    vectors: NDArray[np.float32]
    """`[added, width]`"""
    bias: NDArray[np.float32]
    """`[added]`"""

    def scores(self, query: NDArray[np.float32], trend: NDArray[np.float32]) -> NDArray[np.float32]:
        """`[added]` logits for a query `[width]`, with the `trend` `[added]`."""
        found: NDArray[np.float32] = self.vectors @ query + self.bias + trend
        return found


def with_added(
    ranking: Ranking, items: NDArray[np.int32], scores: NDArray[np.float32], new: NDArray[np.bool_], k: int
) -> Ranking:
    """A ranking of the model's own items, and added ones in it by their scores.

    Args:
        ranking: At least FIRST_PLACES items, or all that may be answered.
        items: `[n]`, the added items that may be answered.
        scores: `[n]`, their logits.
        new: `[all items+1]`, which items, own and added, are new.
        k: Number of items.

    Returns:
        At most k items. No new one is among the FIRST_PLACES of the others (`jaxrec.models.new_items.capped_logits`).
    """
    is_new = new[items]
    if is_new.any():
        old = np.concatenate([ranking.scores[~new[ranking.items]], scores[~is_new]])
        if len(old):
            first = min(FIRST_PLACES, len(old))
            last = np.partition(old, len(old) - first)[len(old) - first]
            above = np.maximum(scores - last, 0)
            capped = np.minimum(scores, last - 2 * GAP) + GAP * above / (1 + above)
            scores = np.where(is_new, capped, scores).astype(np.float32)
    items, scores = np.concatenate([ranking.items, items]), np.concatenate([ranking.scores, scores])
    best, of_best = best_of(items, scores, min(k, len(items)))
    return ranking._replace(items=best, scores=of_best)
