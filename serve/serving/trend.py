"""Keeps the trend of the loaded models up to date: what all servers of a store record, every few seconds.

One thread reads the counters that changed, decays all of them to the present, and has each model make a trend of them,
which takes the place of the last one as a whole. No request waits for that. The counts of a model's export are a lower
bound for each item: it may have been trained on events that the store never saw.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from itertools import islice
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from serve.model.recommender import Recommender
from serve.model.trend import HALF_LIVES_S, Counted, TrendFiles, halved
from serve.stores.base import EventStore, StoreError
from serve.stores.counters import NONE_READ, ItemCounts

logger = logging.getLogger(__name__)

REFRESH_S = 5.0


class TrendRefresher:
    """The counts of one store, and the models that use them. Close it.

    The models in use are refreshed from the first `keep` on.
    """

    def __init__(self, store: EventStore, refresh_s: float = REFRESH_S, clock: Callable[[], float] = time.time) -> None:
        """`refresh_s` is how many seconds a refresh comes after the last; `clock` gives seconds since 1970."""
        self._store = store
        self._refresh_s = refresh_s
        self._clock = clock
        self._models: Sequence[Recommender] = ()
        # Held while counters are read and used: by the thread, and by those that load models.
        self._lock = threading.Lock()
        self._seed: _Counters | None = None
        self._recorded = _Counters()
        self._change = NONE_READ
        self._arrival = 0
        self._failing = False
        self._refreshed = time.monotonic()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="trend-refresher", daemon=True)

    def prepare(self, model: Recommender) -> None:
        """Gives a model its trend, before it serves; without the store, if that fails."""
        with self._lock:
            self._read(model)
            self._use(model)

    def keep(self, models: Sequence[Recommender]) -> None:
        """From now on these are refreshed, and no others."""
        with self._lock:
            self._models = tuple(models)
        if not self._thread.is_alive() and not self._closed.is_set():
            self._thread.start()

    def refresh(self) -> None:
        """Reads what changed and gives each model in use its trend."""
        with self._lock:
            if self._models:
                self._read(self._models[0])
            for model in self._models:
                self._use(model)

    def age_s(self) -> float:
        """Seconds since counters were last read, or since the start."""
        return time.monotonic() - self._refreshed

    def close(self) -> None:
        """Stops; the models keep the trend that they have."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while not self._closed.wait(self._refresh_s):
            # Whatever happens, the thread goes on: no other would be started.
            try:
                self.refresh()
            except Exception:
                logger.exception("the trend cannot be refreshed")

    def _read(self, model: Recommender) -> None:
        """Takes in what changed in the store; `model` is whose export an empty one is seeded with. Raises nothing of
        the store: it is logged once until it works again."""
        try:
            if self._seed is None:
                exported = model.engine.exported
                seed = self._store.seeded(_by_item(exported, model.catalog.item_ids), exported.counted_until)
                self._seed = _Counters()
                self._seed.update(seed)
            changed = self._store.item_counts(self._change)
        except StoreError as error:
            if not self._failing:
                logger.error("the trend decays from what was last read of the store", exc_info=error)
            self._failing = True
            return
        self._recorded.update(changed)
        self._change, self._arrival = changed.change, changed.arrival
        if self._failing:
            logger.info("the trend is read from the store again")
        self._failing, self._refreshed = False, time.monotonic()

    def _use(self, model: Recommender) -> None:
        """Has a model make its trend of the counts as of now."""
        now = int(self._clock())
        exported = model.engine.exported.at(now)
        counts = np.zeros(exported.shape[::-1])
        for counters in (self._seed, self._recorded):
            if counters is not None:
                counters.add_to(counts, model, now)
        try:
            counted = None if self._seed is None else Counted(now, self._arrival)
            model.engine.use_counts(np.maximum(np.ascontiguousarray(counts.T, np.float32), exported), counted)
        except Exception:
            logger.exception("the model %s keeps its trend of before", model.info.model_version)


class _Counters:
    """Counters of items that come and change, in arrays; also of items that no model knows yet."""

    def __init__(self) -> None:
        self._rows: dict[str, int] = {}
        self._references = np.zeros(0, np.int64)
        self._counts = np.zeros((0, len(HALF_LIVES_S)))
        # The rows' item indices in each model, 0 for those that it does not know.
        self._items: WeakKeyDictionary[Recommender, NDArray[np.intp]] = WeakKeyDictionary()

    def update(self, changed: ItemCounts) -> None:
        """Takes in counters, new ones and those that take the place of earlier ones."""
        rows = self._rows
        places = [rows.setdefault(item_id, len(rows)) for item_id in changed.item_ids]
        new = len(rows) - len(self._references)
        if new:
            self._references = np.concatenate([self._references, np.zeros(new, np.int64)])
            self._counts = np.concatenate([self._counts, np.zeros((new, len(HALF_LIVES_S)))])
        self._references[places] = changed.references
        self._counts[places] = changed.counts

    def add_to(self, counts: NDArray[np.float64], model: Recommender, now: float) -> None:
        """Adds the counters, decayed to `now`, to those of a model's items `[items+1, half-lives]`, in place."""
        items = self._items.get(model, np.zeros(0, np.intp))
        if len(items) < len(self._rows):
            index = model.catalog.index
            new = [index.get(item_id, 0) for item_id in islice(self._rows, len(items), None)]
            items = self._items[model] = np.concatenate([items, np.array(new, np.intp)])
        # Each item is there once, but 0.
        counts[items] += self._counts * halved(now - self._references.astype(np.float64))
        counts[0] = 0


def _by_item(exported: TrendFiles, item_ids: Sequence[str]) -> ItemCounts:
    """The counts of an export by raw id, without items that have none."""
    items = np.flatnonzero(exported.counts.any(axis=0))
    return ItemCounts(
        item_ids=[item_ids[item] for item in items.tolist()],
        references=np.full(len(items), exported.counted_until, np.int64),
        counts=exported.counts.T[items].astype(np.float64),
    )
