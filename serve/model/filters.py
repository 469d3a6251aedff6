"""Which items a request allows: by their ids and by their tags, which a model directory calls genres."""

from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache, partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from serve.model.catalog import Catalog

KEPT = 32
"""How many combinations of tags have a mask in memory, one byte for each item."""


class ItemFilter(NamedTuple):
    """What a request allows; an item must meet all conditions."""

    items: NDArray[np.int32] | None = None
    """`[n]`, indices of the items that are allowed; None: every item."""
    any_tags: tuple[str, ...] = ()
    """An item has at least one of these tags of the catalogue. Empty: any item. The tags of all three lists are sorted
    and different, since the lists are the key of a cache."""
    all_tags: tuple[str, ...] = ()
    """An item has each of them."""
    none_tags: tuple[str, ...] = ()
    """An item has none of them."""
    minimum_score: float | None = None
    """In the unit of the ranking; None: any score."""


class Filters:
    """Makes masks for one catalogue. Safe to share between threads."""

    def __init__(self, catalog: Catalog, of_tag: Mapping[str, NDArray[np.int32]] | None = None) -> None:
        """No mask is made yet.

        Args:
            catalog: The tags are the genres of its items.
            of_tag: `items_by_tag` of the catalogue, if that is known; else it is made.
        """
        self.of_tag = items_by_tag(catalog) if of_tag is None else of_tag
        """The indices of the items that have a tag, by tag; not to be changed."""
        self._count = len(catalog)
        # Not a method: a cache that holds its owner would keep the model in memory until a garbage collection.
        self._by_tags = lru_cache(KEPT)(partial(_blocked_by_tags, self.of_tag, self._count))

    @cached_property
    def tags(self) -> list[str]:
        """All tags of the items, sorted."""
        return sorted(self.of_tag)

    def blocked(self, item_filter: ItemFilter | None) -> NDArray[np.bool_] | None:
        """The items that a filter does not allow.

        Args:
            item_filter: Its ids and tags count; its minimum score does not. A tag that no item has any more counts as
                one that no item has.

        Returns:
            `[items+1]`, not to be written to, True also at 0; None: every item is allowed.
        """
        if item_filter is None:
            return None
        tags = item_filter.any_tags, item_filter.all_tags, item_filter.none_tags
        by_tags = self._by_tags(*tags) if any(tags) else None
        items = item_filter.items
        if items is None:
            return by_tags
        blocked = np.ones(self._count + 1, np.bool_)
        blocked[items] = False if by_tags is None else by_tags[items]
        return blocked


def items_by_tag(catalog: Catalog) -> dict[str, NDArray[np.int32]]:
    """The indices of the items that have a tag, by tag."""
    of_tag: dict[str, list[int]] = {}
    for item, tags in enumerate(catalog.genres):
        for tag in tags:
            of_tag.setdefault(tag, []).append(item)
    return {tag: np.array(items, np.int32) for tag, items in of_tag.items()}


def _blocked_by_tags(
    of_tag: Mapping[str, NDArray[np.int32]],
    count: int,
    any_tags: Sequence[str],
    all_tags: Sequence[str],
    none_tags: Sequence[str],
) -> NDArray[np.bool_]:
    none = np.zeros(0, np.int32)
    blocked = np.full(count + 1, bool(any_tags))
    for tag in any_tags:
        blocked[of_tag.get(tag, none)] = False
    for tag in all_tags:
        without = np.ones(count + 1, np.bool_)
        without[of_tag.get(tag, none)] = False
        blocked |= without
    for tag in none_tags:
        blocked[of_tag.get(tag, none)] = True
    blocked[0] = True
    blocked.setflags(write=False)
    return blocked
