"""Keeps the trend of the loaded models up to date: what all servers of a store record, every few seconds.

One thread reads the counters that changed, decays all of them to the present, and has each model make a trend of them,
which replaces the last one as a whole. No request waits for that.

The store is seeded with the counts of the first model's export. A later model may have been exported with events that
the store never saw: each count is the larger one of the store's and of the model's export, both decayed to now. So all
servers of a store have the same trend for a model, whenever they loaded it.
"""

import time
from collections.abc import Callable, Sequence
from itertools import islice
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from serve.model.popular import NO_OTHERS, OtherCounts, with_no_hour
from serve.model.recommender import Recommender
from serve.model.trend import COUNTED_S, Counted, TrendFiles, halved
from serve.serving.refresher import Refresher
from serve.stores.base import EventStore, StoreError
from serve.stores.counters import NONE_READ, ItemCounts

REFRESH_S = 5.0
READING = "the store's counts cannot be read, and the trend decays from what was last read"


class TrendRefresher(Refresher):
    """The counts of one store, and the models that use them. Close it."""

    name = "trend-refresher"
    failure = "the trend cannot be refreshed"

    def __init__(
        self,
        store: EventStore | None,
        refresh_s: float = REFRESH_S,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """Nothing is read yet.

        Args:
            store: None: the trend is that of each model's export, which decays.
            refresh_s: Seconds from one refresh to the next.
            clock: Seconds since 1970-01-01T00:00Z.
            monotonic: Seconds of a clock that is never set, for `age_s`.
        """
        super().__init__(refresh_s, monotonic)
        self._store = store
        self._clock = clock
        self._counters = _Counters()
        self._change = NONE_READ
        # Of the last event that was counted; None: nothing was read yet.
        self._arrival: int | None = None

    def prepare(self, model: Recommender) -> None:
        """Gives a model its trend, before it serves; without the store, if that fails."""
        with self._lock:
            self._read(model)
            self._use(model)

    def refresh(self) -> None:
        """Reads what changed and gives each model in use its trend."""
        with self._lock:
            if self._models:
                self._read(self._models[0])
            for model in self._models:
                self._use(model)

    def _read(self, model: Recommender) -> None:
        """Reads what changed in the store, and seeds it with a model's export if it is not seeded; logs what the store
        raises."""
        if self._store is None:
            return
        try:
            if self._store.counted_until() is None:
                exported = model.engine.exported
                self._store.seed_counts(_by_item(exported, model.own_catalog.item_ids), exported.counted_until)
            changed = self._store.item_counts(self._change)
        except StoreError as error:
            self._failed(READING, error)
            return
        self._counters.update(changed)
        self._change, self._arrival = changed.change, changed.arrival
        self._works(READING)
        self._refreshed = self._monotonic()

    def _use(self, model: Recommender) -> None:
        """Has a model make its trend of the counts as of now."""
        # Whole seconds, as slates note them: the counts can be computed again.
        now = int(self._clock())
        counts, others = with_no_hour(model.engine.exported.at(now)), NO_OTHERS
        if self._arrival is not None:
            counts = np.maximum(counts, self._counters.of(model, now).T.astype(np.float32))
            others = self._counters.others(model, now)
        keeping = f"the model {model.info.model_version} keeps its trend of before"
        try:
            model.use_counts(counts, Counted(now, self._arrival), others)
        except Exception as error:
            self._failed(keeping, error)
        else:
            self._works(keeping)


class _Counters:
    """Counters of items that come and change, in arrays; also of items that no model knows yet."""

    def __init__(self) -> None:
        self._rows: dict[str, int] = {}
        self._references = np.zeros(0, np.int64)
        self._counts = np.zeros((0, len(COUNTED_S)))
        # The rows' item indices in each model, 0 for those that it does not know.
        self._items: WeakKeyDictionary[Recommender, NDArray[np.intp]] = WeakKeyDictionary()

    def update(self, changed: ItemCounts) -> None:
        """Adds new counters, and replaces those that are known."""
        rows = self._rows
        places = [rows.setdefault(item_id, len(rows)) for item_id in changed.item_ids]
        new = len(rows) - len(self._references)
        if new:
            self._references = np.concatenate([self._references, np.zeros(new, np.int64)])
            self._counts = np.concatenate([self._counts, np.zeros((new, len(COUNTED_S)))])
        self._references[places] = changed.references
        self._counts[places] = changed.counts

    def of(self, model: Recommender, now: int) -> NDArray[np.float64]:
        """The counts of a model's own items, decayed to `now`, `[items+1, half-lives]`."""
        counts = np.zeros((len(model.own_catalog) + 1, len(COUNTED_S)))
        # Each item is there once, but 0.
        counts[self._indices(model)] = self._counts * halved(now - self._references.astype(np.float64), COUNTED_S)
        counts[0] = 0
        return counts

    def others(self, model: Recommender, now: int) -> OtherCounts:
        """The counts of a model's added items, decayed to `now`. Not of all ids that were ever recorded: anyone who may
        record events makes these more and more."""
        of_added = {item_id: self._rows[item_id] for item_id in model.live.added_ids if item_id in self._rows}
        if not of_added:
            return NO_OTHERS
        rows = np.array(list(of_added.values()), np.intp)
        seconds = now - self._references[rows].astype(np.float64)
        return OtherCounts(list(of_added), self._counts[rows] * halved(seconds, COUNTED_S))

    def _indices(self, model: Recommender) -> NDArray[np.intp]:
        """The rows' item indices in a model, 0 for those that it does not know."""
        items = self._items.get(model, np.zeros(0, np.intp))
        if len(items) < len(self._rows):
            index = model.own_catalog.index
            new = [index.get(item_id, 0) for item_id in islice(self._rows, len(items), None)]
            items = self._items[model] = np.concatenate([items, np.array(new, np.intp)])
        return items


def _by_item(exported: TrendFiles, item_ids: Sequence[str]) -> ItemCounts:
    """The counts of an export by raw id, without items that have none."""
    items = np.flatnonzero(exported.counts.any(axis=0))
    return ItemCounts(
        item_ids=[item_ids[item] for item in items.tolist()],
        references=np.full(len(items), exported.counted_until, np.int64),
        counts=with_no_hour(exported.counts).T[items].astype(np.float64),
    )
