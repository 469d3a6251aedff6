"""Keeps the catalogues of the loaded models up to date with the items of the store, which all its servers share.

One thread reads every half second which items changed, and makes each model in use a new `LiveCatalog`, which replaces
the last one as a whole. All items of the store are in memory: the next model, which may know others of them, has to
withhold what is hidden from its first answer on, also if the store is away.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable
from weakref import WeakKeyDictionary

from serve.model.live_catalog import Item, Overlay
from serve.model.recommender import Recommender
from serve.serving.refresher import Refresher
from serve.stores.base import EventStore, ItemCursor, StoreError

REFRESH_S = 0.5
AT_ONCE = 1_000
"""Items of a page: while Redis gathers it, all other calls of Redis wait."""
READING = "the store's items cannot be read, and the catalogue stays as it was last read"


class CatalogueRefresher(Refresher):
    """The items of one store, and the models that answer with them. Close it."""

    name = "catalogue-refresher"
    failure = "the catalogue cannot be refreshed"

    def __init__(
        self,
        store: EventStore,
        refresh_s: float = REFRESH_S,
        on_failure: Callable[[], None] = lambda: None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """Nothing is read yet.

        Args:
            store: Where the items are.
            refresh_s: Seconds from one refresh to the next.
            on_failure: Called each time that the store cannot be read.
            monotonic: Seconds of a clock that is never set, for `age_s`.
        """
        super().__init__(refresh_s, monotonic)
        self._store = store
        self._on_failure = on_failure
        self._items: dict[str, Item] = {}
        # How many of the items have a tag.
        self._tags: Counter[str] = Counter()
        self._cursor = ItemCursor()
        # What was read since the catalogue was last whole.
        self._changed: dict[str, Item | None] = {}
        self._was_whole = False
        self._overlays: WeakKeyDictionary[Recommender, Overlay] = WeakKeyDictionary()

    def prepare(self, model: Recommender) -> None:
        """Gives a model its catalogue, before it serves; with the items that were read before, if the store fails.

        Raises:
            StoreError: The items were never read as a whole. Without them, the model would answer what is hidden.
        """
        with self._lock:
            # For all models: what changed is read once.
            self._read()
            overlay = self._overlays[model] = Overlay(model.own_live, model.item_rows)
            overlay.apply(self._items.items())
            model.live, model.stored_tags = overlay.live(), self._tags

    def refresh(self) -> None:
        """Reads what changed, and gives each model in use its catalogue."""
        with self._lock:
            self._read()

    def item_count(self) -> int:
        """How many items of the store are in memory."""
        return len(self._items)

    def withheld_count(self) -> int:
        """How many items of the model that answers most requests are withheld now."""
        models = self._models
        withheld = models[0].live.withheld() if models else None
        return 0 if withheld is None else withheld.total

    def _read(self) -> None:
        """Takes in what changed in the store; logs and counts what the store raises, and goes on there the next time.

        Raises:
            StoreError: The items were never read as a whole.
        """
        is_whole = False
        try:
            while not is_whole:
                found = self._store.items_since(self._cursor, AT_ONCE)
                if found.anew:
                    self._changed = dict.fromkeys(self._items)
                self._changed.update(found.items)
                self._cursor, is_whole = found.cursor, len(found.items) < AT_ONCE
        except StoreError as error:
            self._failed(READING, error)
            self._on_failure()
            if not self._was_whole:
                raise
            return
        self._works(READING)
        self._was_whole, self._refreshed = True, self._monotonic()
        changed, self._changed = self._changed, {}
        for item_id, item in changed.items():
            before = self._items.pop(item_id, None)
            if item is not None:
                self._items[item_id] = item
                self._tags.update(item.tags)
            self._forget(() if before is None else before.tags)
        for model, overlay in self._overlays.items():
            if overlay.apply(changed.items()):
                model.live = overlay.live()

    def _forget(self, tags: Iterable[str]) -> None:
        for tag in tags:
            self._tags[tag] -= 1
            if not self._tags[tag]:
                del self._tags[tag]
