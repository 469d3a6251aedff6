"""A model's catalogue with the items of a store over it: titles, tags, metadata, and which items may be answered.

A store has an item as a whole, so its title and tags replace those of the model directory. What a request uses is a
`LiveCatalog`, which is immutable and replaced as a whole; `Overlay` makes it, and makes the next one of what changed.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from serve.model.catalog import Catalog
from serve.model.filters import Filters

MOST_NOTED = 200
"""If more items are withheld, they are not named one by one: the log of a slate would be long."""
KEPT = 4
"""For so many stretches of time, in which the same items are available, the withheld items are in memory: one byte for
each item of the catalogue."""
ALWAYS, NEVER = -1, 2**62
"""Times in seconds: before the first, and after the last."""


class Item(NamedTuple):
    """An item as a store has it."""

    item_id: str
    title: str = ""
    tags: tuple[str, ...] = ()
    """Sorted, each once."""
    available_from: int | None = None
    """In seconds since 1970-01-01T00:00Z, from which on it may be answered; None: since always."""
    available_until: int | None = None
    """In the same seconds, from which on it may not be answered any more; None: for ever."""
    hidden: bool = False
    """Whether it may never be answered."""
    metadata: Mapping[str, str] = {}
    """Not to be changed."""

    def is_available(self, time: int) -> bool:
        """Whether it may be answered at a time in seconds."""
        since, until = _window(self)
        return not self.hidden and since <= time < until


class Withheld(NamedTuple):
    """The items that may not be answered at a time: they are hidden, or not available."""

    mask: NDArray[np.bool_]
    """`[items+1]`, not to be written to, True also at 0."""
    total: int
    """How many they are, at least 1."""
    items: tuple[int, ...] | None
    """Their indices; None: they are more than `MOST_NOTED`."""


@dataclass(frozen=True, slots=True, eq=False)
class LiveCatalog:
    """What requests use of a model's catalogue. Safe to share between threads."""

    catalog: Catalog
    """With the titles and the tags (genres) of the store's items."""
    filters: Filters
    metadata: Mapping[int, Mapping[str, str]]
    """By item index; items without metadata are missing."""
    boundaries: NDArray[np.int64]
    """`[n]`, sorted, some several times: the seconds at which an item becomes available, or ceases to be."""
    withheld_from: Callable[[int], Withheld | None]
    """What is withheld from one of the boundaries on, until the next one."""
    withheld_now: Callable[[int], Withheld | None]
    """The same, with a memory of its own: times that requests name do not push out what is withheld now."""
    messages: dict[int, bytes] = field(default_factory=dict)
    """By item index, what of an answer does not depend on the query, encoded once: see `serve.api.codec`."""
    id_messages: dict[int, bytes] = field(default_factory=dict)
    """The same of answers without titles and tags."""

    @classmethod
    def of(cls, catalog: Catalog) -> Self:
        """Without items of a store."""
        return cls(catalog, Filters(catalog), {}, np.zeros(0, np.int64), _nothing, _nothing)

    def withheld(self, request_time: int | None = None) -> Withheld | None:
        """The items that may not be answered.

        Args:
            request_time: In seconds; None: now.

        Returns:
            The items; None: every item may be answered.
        """
        of_time = self.withheld_now if request_time is None else self.withheld_from
        at = int(self.boundaries.searchsorted(int(time.time()) if request_time is None else request_time, "right"))
        return of_time(int(self.boundaries[at - 1]) if at else ALWAYS)


class Overlay:
    """The items of a store over one model's catalogue. For one thread at a time."""

    def __init__(self, live: LiveCatalog) -> None:
        """Without items of a store.

        Args:
            live: `LiveCatalog.of` the catalogue of the model directory.
        """
        self._base = catalog = live.catalog
        self._titles, self._tags = list(catalog.titles), list(catalog.genres)
        self._of_tag = dict(live.filters.of_tag)
        size = len(catalog) + 1
        self._hidden = np.zeros(size, np.bool_)
        self._since = np.full(size, ALWAYS, np.int64)
        self._until = np.full(size, NEVER, np.int64)
        self._metadata: dict[int, Mapping[str, str]] = {}

    def apply(self, changes: Iterable[tuple[str, Item | None]]) -> bool:
        """Takes in changed items. Those that the model does not know change nothing.

        Args:
            changes: Ids, each once, and the items as they are now; None: the store has the item no more.

        Returns:
            Whether the model knows one of them.
        """
        is_changed = False
        gained: dict[str, list[int]] = {}
        lost: dict[str, list[int]] = {}
        for item_id, stored in changes:
            at = self._base.index.get(item_id)
            if at is None:
                continue
            is_changed = True
            item = stored or Item(item_id, self._base.titles[at], self._base.genres[at])
            for tag in self._tags[at]:
                lost.setdefault(tag, []).append(at)
            for tag in item.tags:
                gained.setdefault(tag, []).append(at)
            self._titles[at], self._tags[at], self._hidden[at] = item.title, item.tags, item.hidden
            self._since[at], self._until[at] = _window(item)
            if item.metadata:
                self._metadata[at] = item.metadata
            else:
                self._metadata.pop(at, None)
        is_lost = np.zeros(len(self._hidden), np.bool_)
        for tag in lost.keys() | gained.keys():
            kept = self._of_tag.get(tag, _NO_ITEMS)
            if tag in lost:
                is_lost[lost[tag]] = True
                kept = kept[~is_lost[kept]]
                is_lost[lost[tag]] = False
            of_tag = np.concatenate([kept, np.array(gained.get(tag, ()), np.int32)])
            if len(of_tag):
                self._of_tag[tag] = of_tag
            else:
                self._of_tag.pop(tag, None)
        return is_changed

    def live(self) -> LiveCatalog:
        """The catalogue as it is now; later changes do not change it."""
        catalog = replace(self._base, titles=tuple(self._titles), genres=tuple(self._tags))
        timed = np.flatnonzero((self._since > ALWAYS) | (self._until < NEVER))
        windows = timed, self._since[timed], self._until[timed]
        times = np.sort(np.concatenate(windows[1:]))
        withheld = partial(_withheld, self._hidden.copy(), *windows)
        return LiveCatalog(
            catalog=catalog,
            filters=Filters(catalog, dict(self._of_tag)),
            metadata=dict(self._metadata),
            boundaries=times[(times > ALWAYS) & (times < NEVER)],
            # Not a method: a cache that holds its owner would keep it in memory until a garbage collection.
            withheld_from=lru_cache(KEPT)(withheld),
            withheld_now=lru_cache(1)(withheld),
        )


_NO_ITEMS: NDArray[np.int32] = np.zeros(0, np.int32)


def _window(item: Item) -> tuple[int, int]:
    """From when until when the item is available."""
    return (
        ALWAYS if item.available_from is None else item.available_from,
        NEVER if item.available_until is None else item.available_until,
    )


def _nothing(time: int) -> None:
    return None


def _withheld(
    hidden: NDArray[np.bool_], items: NDArray[np.intp], since: NDArray[np.int64], until: NDArray[np.int64], time: int
) -> Withheld | None:
    mask = hidden.copy()
    mask[items[(time < since) | (until <= time)]] = True
    total = int(np.count_nonzero(mask))
    if not total:
        return None
    found = tuple(np.flatnonzero(mask).tolist()) if total <= MOST_NOTED else None
    mask[0] = True
    mask.setflags(write=False)
    return Withheld(mask, total, found)
