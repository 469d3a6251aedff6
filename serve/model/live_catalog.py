"""A model's catalogue with the items of a store over it: titles, tags, metadata, and which items may be answered.

A store has an item as a whole, so its title and tags replace those of the model directory. Items of the store that the
model was not exported with are added after the model's own. What a request uses is a
`LiveCatalog`, which is immutable and replaced as a whole; `Overlay` makes it, and makes the next one of what changed.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from itertools import chain
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from serve.model.added_items import AddedItems
from serve.model.catalog import Catalog
from serve.model.filters import Filters, ItemFilter
from serve.model.item_rows import ItemRows

logger = logging.getLogger(__name__)

MOST_NOTED = 200
"""If more items are withheld, they are not named one by one: the log of a slate would be long."""
KEPT = 4
"""For so many stretches of time, in which the same items are available, the withheld items are in memory: one byte for
each item of the catalogue."""
MOST_FILTER_BYTES = 4 * 2**20
"""Of the filters with allow-lists that a catalogue keeps, with the messages that they were in."""
MOST_ADDED = 100_000
"""Added items of a model. Each request multiplies the vectors of all of them."""
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


class NewestFilters:
    """The filters that were used last, as many as MOST_FILTER_BYTES hold. Safe to share between threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: dict[bytes, tuple[ItemFilter, int]] = {}
        self.size = 0
        """In bytes."""

    def get(self, key: bytes) -> ItemFilter | None:
        """One that is kept, which is the newest again; None: it is not."""
        with self._lock:
            found = self._kept.pop(key, None)
            if found is None:
                return None
            self._kept[key] = found
        return found[0]

    def put(self, key: bytes, item_filter: ItemFilter, size: int) -> None:
        """Keeps one of so many bytes, in place of those that were not used for longest."""
        if size > MOST_FILTER_BYTES:
            return
        with self._lock:
            if key in self._kept:
                return
            self._kept[key] = item_filter, size
            self.size += size
            while self.size > MOST_FILTER_BYTES:
                _, dropped = self._kept.pop(next(iter(self._kept)))
                self.size -= dropped


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
    id_messages: dict[int, bytes] = field(default_factory=dict)
    """The same of answers without titles and tags."""
    allow_lists: NewestFilters = field(default_factory=NewestFilters)
    """Filters with allow-lists that requests had, by their messages: see `serve.api.filters`."""

    @classmethod
    def of(cls, catalog: Catalog) -> Self:
        """Without items of a store."""
        return cls(catalog, Filters(catalog), {}, np.zeros(0, np.int64), _nothing, _nothing)

    @property
    def added_ids(self) -> Sequence[str]:
        """The raw ids of the added items, in the order of their indices."""
        return () if self.added is None else self.added.ids

    def indices(self, item_ids: Iterable[str]) -> list[int]:
        """Item indices of the ids that the catalogue has."""
        index = self.catalog.index
        return [index[item_id] for item_id in item_ids if item_id in index]

    def blocked(self, item_filter: ItemFilter | None, withheld: Withheld | None) -> NDArray[np.bool_] | None:
        """The items that a filter does not allow, or that are withheld.

        Args:
            item_filter: As for `Filters.blocked`.
            withheld: Of this catalogue.

        Returns:
            `[items+1]` of own and added items, not to be written to, True also at 0; None: every item may be answered.
        """
        blocked = self.filters.blocked(item_filter)
        if withheld is None:
            return blocked
        return withheld.mask if blocked is None else blocked | withheld.mask

    def withheld(self, request_time: int | None = None) -> Withheld | None:
        """The items that may not be answered.

        Args:
            request_time: In seconds; None: now.

        Returns:
            The items; None: every item may be answered.
        """
        of_time = self.withheld_now if request_time is None else self.withheld_from
        if not len(self.boundaries):
            return of_time(ALWAYS)
        at = int(self.boundaries.searchsorted(int(time.time()) if request_time is None else request_time, "right"))
        return of_time(int(self.boundaries[at - 1]) if at else ALWAYS)


class JoinedIndex(Mapping[str, int]):
    """The index of the model's own items and that of the added ones, without a copy of the larger one."""

    def __init__(self, own: Mapping[str, int], added: Mapping[str, int]) -> None:
        self._own, self._added = own, added

    def get(self, item_id: str, default: Any = None) -> Any:
        found = self._own.get(item_id)
        return self._added.get(item_id, default) if found is None else found

    def __getitem__(self, item_id: str) -> int:
        found = self._own.get(item_id)
        return self._added[item_id] if found is None else found

    def __contains__(self, item_id: object) -> bool:
        return item_id in self._own or item_id in self._added

    def __iter__(self) -> Iterator[str]:
        return chain(self._own, self._added)

    def __len__(self) -> int:
        return len(self._own) + len(self._added)


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
        self._first = len(catalog) + 1
        self._added: dict[str, int] = {}
        self._added_ids: list[str] = []
        self._waiting: dict[str, Item] = {}
        self._titles, self._tags = list(catalog.titles), list(catalog.genres)
        self._of_tag = dict(live.filters.of_tag)
        self._metadata: dict[int, Mapping[str, str]] = {}
        # Of all items, and of the added ones; with room for more.
        self._hidden = np.zeros(self._first, np.bool_)
        self._since = np.full(self._first, ALWAYS, np.int64)
        self._until = np.full(self._first, NEVER, np.int64)
        self._rows = np.zeros((0, item_rows.rows.shape[1]), np.float32)
        self._rows_are_shared = False

    def apply(self, changes: Iterable[tuple[str, Item | None]]) -> bool:
        """Takes in changed items.

        Args:
            changes: Ids, each once, and the items as they are now; None: the store has the item no more.

        Returns:
            Whether the catalogue is another one.
        """
        # The tags of the changed indices, as they were.
        before: dict[int, tuple[str, ...]] = {}
        for item_id, stored in changes:
            at = self._base.index.get(item_id)
            if at is not None:
                self._set(at, stored or Item(item_id, self._base.titles[at], self._base.genres[at]), before)
            elif stored is None:
                self._waiting.pop(item_id, None)
                self._remove(item_id, before)
            else:
                self._set_added(stored, before)
        while self._waiting and len(self._added) < MOST_ADDED:
            self._set_added(self._waiting.pop(next(iter(self._waiting))), before)
        self._change_tags(before)
        return bool(before)

    def _set(self, at: int, item: Item, before: dict[int, tuple[str, ...]]) -> None:
        before.setdefault(at, self._tags[at])
        self._titles[at], self._tags[at], self._hidden[at] = item.title, item.tags, item.hidden
        self._since[at], self._until[at] = _window(item)
        if item.metadata:
            self._metadata[at] = item.metadata
        else:
            self._metadata.pop(at, None)

    def _set_added(self, item: Item, before: dict[int, tuple[str, ...]]) -> None:
        """Sets an item that the model was not exported with, once it has an index; if there is no room, it waits."""
        at = self._added.get(item.item_id)
        if at is None:
            if len(self._added) >= MOST_ADDED:
                self._wait(item)
                return
            at = self._added[item.item_id] = len(self._titles)
            self._added_ids.append(item.item_id)
            self._titles.append("")
            self._tags.append(())
            self._make_room(len(self._titles))
        self._set(at, item, before)
        self._own_rows()[at - self._first] = self._item_rows.row(item.title, item.tags, item.metadata)

    def _own_rows(self) -> NDArray[np.float32]:
        """The rows, which no catalogue has: they may be changed."""
        if self._rows_are_shared:
            self._rows, self._rows_are_shared = self._rows.copy(), False
        return self._rows

    def _wait(self, item: Item) -> None:
        if not self._waiting:
            logger.warning(
                "the store has more than %d items that a model was not exported with; the others are not recommended"
                " until some of these are deleted, or a model knows them",
                MOST_ADDED,
            )
        self._waiting[item.item_id] = item

    def _make_room(self, count: int) -> None:
        """For so many items in all."""
        if count > len(self._hidden):
            more = max(count, len(self._hidden) + len(self._added)) - len(self._hidden)
            self._hidden = np.append(self._hidden, np.zeros(more, np.bool_))
            self._since = np.append(self._since, np.full(more, ALWAYS, np.int64))
            self._until = np.append(self._until, np.full(more, NEVER, np.int64))
            self._rows = np.concatenate([self._rows, np.zeros((more, self._rows.shape[1]), np.float32)])
            self._rows_are_shared = False

    def _remove(self, item_id: str, before: dict[int, tuple[str, ...]]) -> None:
        """Removes an added item, if it is one; the last one gets its index."""
        at, last = self._added.get(item_id), len(self._titles) - 1
        if at is None:
            return
        moved = self._added_ids[-1]
        before.setdefault(last, self._tags[last])
        before.setdefault(at, self._tags[at])
        if at != last:
            self._set(at, self._as_item(last, moved), before)
            self._own_rows()[at - self._first] = self._rows[last - self._first]
            self._added[moved], self._added_ids[at - self._first] = at, moved
        del self._added[item_id]
        self._metadata.pop(last, None)
        for column in (self._titles, self._tags, self._added_ids):
            column.pop()

    def _as_item(self, at: int, item_id: str) -> Item:
        since, until = int(self._since[at]), int(self._until[at])
        return Item(
            item_id,
            self._titles[at],
            self._tags[at],
            None if since == ALWAYS else since,
            None if until == NEVER else until,
            bool(self._hidden[at]),
            self._metadata.get(at, {}),
        )

    def _change_tags(self, before: Mapping[int, tuple[str, ...]]) -> None:
        """Brings the items of each tag up to date, once items have other tags than `before`, or are gone."""
        gained: dict[str, list[int]] = {}
        lost: dict[str, list[int]] = {}
        for at, tags in before.items():
            for tag in tags:
                lost.setdefault(tag, []).append(at)
            for tag in self._tags[at] if at < len(self._tags) else ():
                gained.setdefault(tag, []).append(at)
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

    def live(self) -> LiveCatalog:
        """The catalogue as it is now; later changes do not change it."""
        catalog, count, added = self._catalog(), len(self._titles), None
        if self._added:
            self._rows_are_shared = True
            rows = self._rows[: len(self._added)]
            added = AddedItems(self._first, tuple(self._added_ids), rows[:, :-1], rows[:, -1])
        since, until = self._since[:count], self._until[:count]
        timed = np.flatnonzero((since > ALWAYS) | (until < NEVER))
        windows = timed, since[timed], until[timed]
        times = np.sort(np.concatenate(windows[1:]))
        withheld = partial(_withheld, self._first, self._hidden[:count].copy(), *windows)
        return LiveCatalog(
            catalog=catalog,
            filters=Filters(catalog, dict(self._of_tag)),
            metadata=dict(self._metadata),
            boundaries=times[(times > ALWAYS) & (times < NEVER)],
            # Not a method: a cache that holds its owner would keep it in memory until a garbage collection.
            withheld_from=lru_cache(KEPT)(withheld),
            withheld_now=lru_cache(1)(withheld),
            added=added,
        )

    def _catalog(self) -> Catalog:
        titled = replace(self._base, titles=tuple(self._titles), genres=tuple(self._tags))
        count = len(self._added)
        if not count:
            return titled
        return replace(
            titled,
            item_ids=(*self._base.item_ids, *self._added_ids),
            popularity=np.append(titled.popularity, np.zeros(count, np.int64)),
            recent_popularity=np.append(titled.recent_popularity, np.zeros(count)),
            by_popularity=np.append(titled.by_popularity, np.arange(self._first, self._first + count, dtype=np.int32)),
            new=np.append(titled.new, np.ones(count, np.bool_)),
            index=JoinedIndex(self._base.index, dict(self._added)),
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
    first_added: int,
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
    own = np.flatnonzero(mask[:first_added])
    mask[0] = True
    mask.setflags(write=False)
    return Withheld(mask, len(own), tuple(own.tolist()) if len(own) <= MOST_NOTED else None)
