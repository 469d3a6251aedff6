"""A model's catalogue with the items of a store over it: titles, tags, metadata, and which items may be answered.

A store has an item as a whole, so its title and tags replace those of the model directory. Items of the store that the
model was not exported with are added after the model's own. An item keeps its index for as long as the model is loaded,
also if it is deleted from the store. What a request uses is a
`LiveCatalog`, which is immutable and replaced as a whole; `Overlay` makes it, and makes the next one of what changed.
"""

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from itertools import islice
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from serve.model.added_items import AddedItems
from serve.model.catalog import Catalog
from serve.model.filters import Filters
from serve.model.item_rows import ItemRows

logger = logging.getLogger(__name__)

MOST_NOTED = 200
"""If more items are withheld, they are not named one by one: the log of a slate would be long."""
KEPT = 4
"""For so many stretches of time, in which the same items are available, the withheld items are in memory: one byte for
each item of the catalogue."""
MOST_ADDED = 100_000
"""Added items of a model. Each request multiplies the vectors of all of them: some 0.3 ms for 10,000."""
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
    """`[items+1]` of own and added items, not to be written to, True also at 0."""
    total: int
    """How many of the model's own they are."""
    items: tuple[int, ...] | None
    """The indices of the model's own; None: they are more than `MOST_NOTED`."""


@dataclass(frozen=True, slots=True, eq=False)
class LiveCatalog:
    """What requests use of a model's catalogue. Safe to share between threads."""

    catalog: Catalog
    """With the titles and the tags (genres) of the store's items, the added ones last."""
    filters: Filters
    metadata: Mapping[int, Mapping[str, str]]
    """By item index; items without metadata are missing."""
    boundaries: NDArray[np.int64]
    """`[n]`, sorted, some several times: the seconds at which an item becomes available, or ceases to be."""
    withheld_from: Callable[[int], Withheld | None]
    """What is withheld from one of the boundaries on, until the next one."""
    withheld_now: Callable[[int], Withheld | None]
    """The same, with a memory of its own: times that requests name do not push out what is withheld now."""
    added: AddedItems | None = None
    """None: there are none."""
    messages: dict[int, bytes] = field(default_factory=dict)
    """By item index, what of an answer does not depend on the query, encoded once: see `serve.api.codec`."""

    @classmethod
    def of(cls, catalog: Catalog) -> Self:
        """Without items of a store."""
        return cls(catalog, Filters(catalog), {}, np.zeros(0, np.int64), _nothing, _nothing)

    @property
    def added_ids(self) -> Sequence[str]:
        """The raw ids of the added items, in the order of their indices."""
        return () if self.added is None else self.catalog.item_ids[self.added.first :]

    def indices(self, item_ids: Iterable[str]) -> list[int]:
        """Item indices of the ids that the catalogue has."""
        index = self.catalog.index
        return [index[item_id] for item_id in item_ids if item_id in index]

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

    def __init__(self, live: LiveCatalog, item_rows: ItemRows) -> None:
        """Without items of a store.

        Args:
            live: `LiveCatalog.of` the catalogue of the model directory.
            item_rows: What ranks added items.
        """
        self._base = catalog = live.catalog
        self._item_rows = item_rows
        self._own_count = len(catalog)
        self._index = dict(catalog.index)
        self._rows = np.zeros((0, item_rows.rows.shape[1]), np.float32)
        self._is_full = False
        self._titles, self._tags = list(catalog.titles), list(catalog.genres)
        self._of_tag = dict(live.filters.of_tag)
        size = len(catalog) + 1
        self._hidden = np.zeros(size, np.bool_)
        self._since = np.full(size, ALWAYS, np.int64)
        self._until = np.full(size, NEVER, np.int64)
        self._metadata: dict[int, Mapping[str, str]] = {}

    def apply(self, changes: Iterable[tuple[str, Item | None]]) -> bool:
        """Takes in changed items.

        Args:
            changes: Ids, each once, and the items as they are now; None: the store has the item no more.

        Returns:
            Whether the catalogue is another one.
        """
        is_changed = False
        gained: dict[str, list[int]] = {}
        lost: dict[str, list[int]] = {}
        changes = list(changes)
        self._add(item_id for item_id, stored in changes if stored is not None)
        for item_id, stored in changes:
            at = self._index.get(item_id)
            if at is None:
                continue
            is_changed = True
            item = stored or self._without_store(item_id, at)
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
            if at > self._own_count:
                self._rows[at - self._own_count - 1] = self._item_rows.row(item.title, item.tags, item.metadata)
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

    def _add(self, item_ids: Iterable[str]) -> None:
        """Gives those items an index that have none, until MOST_ADDED have one."""
        wanted = [item_id for item_id in item_ids if item_id not in self._index]
        new = wanted[: MOST_ADDED - len(self._rows)]
        if len(new) < len(wanted) and not self._is_full:
            self._is_full = True
            logger.warning(
                "the store has more than %d items that the model was not exported with; those that came last are not"
                " recommended until a model knows them",
                MOST_ADDED,
            )
        if new:
            self._index.update(zip(new, range(len(self._titles), len(self._titles) + len(new)), strict=True))
            self._titles += [""] * len(new)
            self._tags += [()] * len(new)
            self._rows = np.concatenate([self._rows, np.zeros((len(new), self._rows.shape[1]), np.float32)])
            self._hidden = np.append(self._hidden, np.zeros(len(new), np.bool_))
            self._since = np.append(self._since, np.full(len(new), ALWAYS, np.int64))
            self._until = np.append(self._until, np.full(len(new), NEVER, np.int64))

    def _without_store(self, item_id: str, at: int) -> Item:
        """An item that the store has no more: as the model directory has it; an added one is hidden for good."""
        if at > self._own_count:
            return Item(item_id, hidden=True)
        return Item(item_id, self._base.titles[at], self._base.genres[at])

    def live(self) -> LiveCatalog:
        """The catalogue as it is now; later changes do not change it."""
        catalog, count = self._catalog(), len(self._rows)
        timed = np.flatnonzero((self._since > ALWAYS) | (self._until < NEVER))
        windows = timed, self._since[timed], self._until[timed]
        times = np.sort(np.concatenate(windows[1:]))
        withheld = partial(_withheld, self._own_count, self._hidden.copy(), *windows)
        rows = self._rows.copy()
        return LiveCatalog(
            catalog=catalog,
            filters=Filters(catalog, dict(self._of_tag)),
            metadata=dict(self._metadata),
            boundaries=times[(times > ALWAYS) & (times < NEVER)],
            # Not a method: a cache that holds its owner would keep it in memory until a garbage collection.
            withheld_from=lru_cache(KEPT)(withheld),
            withheld_now=lru_cache(1)(withheld),
            added=AddedItems(self._own_count + 1, rows[:, :-1], rows[:, -1]) if count else None,
        )

    def _catalog(self) -> Catalog:
        titled = replace(self._base, titles=tuple(self._titles), genres=tuple(self._tags))
        count = len(self._rows)
        if not count:
            return titled
        index = dict(self._index)
        added = range(self._own_count + 1, self._own_count + 1 + count)
        return replace(
            titled,
            item_ids=(*self._base.item_ids, *islice(index, self._own_count, None)),
            popularity=np.append(titled.popularity, np.zeros(count, np.int64)),
            recent_popularity=np.append(titled.recent_popularity, np.zeros(count)),
            by_popularity=np.append(titled.by_popularity, np.array(added, np.int32)),
            new=np.append(titled.new, np.ones(count, np.bool_)),
            index=index,
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
    own_count: int,
    hidden: NDArray[np.bool_],
    items: NDArray[np.intp],
    since: NDArray[np.int64],
    until: NDArray[np.int64],
    time: int,
) -> Withheld | None:
    mask = hidden.copy()
    mask[items[(time < since) | (until <= time)]] = True
    if not mask.any():
        return None
    own = np.flatnonzero(mask[: own_count + 1])
    mask[0] = True
    mask.setflags(write=False)
    return Withheld(mask, len(own), tuple(own.tolist()) if len(own) <= MOST_NOTED else None)
