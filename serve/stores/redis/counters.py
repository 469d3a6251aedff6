"""The counters of items in a Redis store: how they are read, and begun with a model's counts."""

import os
import time
from typing import Any

from serve.stores.base import StoreError
from serve.stores.counters import NONE_READ, Counter, Damaged, ItemCounts, add_events
from serve.stores.redis.connection import RedisConnection
from serve.stores.redis.scripts import ADD_SEED, READ_COUNTS, SEED, SEED_EVENTS
from serve.stores.redis.values import counter_of

COUNTERS_AT_ONCE = 1_000
# A seed that was broken off before it was whole is forgotten after an hour.
STAGED_S = 3_600


class RedisCounters(RedisConnection):
    """The part of a store that counts."""

    def __init__(self, location: str) -> None:
        """As `RedisConnection`."""
        super().__init__(location)
        self._read_counts = self._redis.register_script(READ_COUNTS)
        self._begin_seed = self._redis.register_script(SEED)
        self._seed_events = self._redis.register_script(SEED_EVENTS)
        self._add_seed = self._redis.register_script(ADD_SEED)
        self._damaged = Damaged("Redis, jaxrec:trend")

    def item_counts(self, since: int = NONE_READ) -> ItemCounts:
        counters: dict[str, Counter] = {}
        found: list[Any] = [None] * COUNTERS_AT_ONCE
        with self._failures("cannot be read"):
            if since > int(self._redis.get("jaxrec:revision") or 0):
                # The data is that of another server, or an older copy.
                since = NONE_READ
            try:
                # No two items have the same revision. What changes meanwhile is found again, with a later one: the
                # counters are as of the last part.
                while len(found) == COUNTERS_AT_ONCE:
                    found = self._read_counts(args=[since, COUNTERS_AT_ONCE])
                    for item, revision, text in found:
                        counters[item.decode()] = counter_of(item.decode(), text)
                        since = int(revision)
            except ValueError as error:
                raise StoreError(f"Redis: cannot be read: {error}") from error
        return ItemCounts.of(counters.items(), since, max(0, since))

    def counted_until(self) -> int | None:
        with self._failures("cannot be read"), self._redis.pipeline(transaction=True) as pipeline:
            pipeline.get("jaxrec:trend_until")
            pipeline.exists("jaxrec:trend_held", "jaxrec:trend_seed")
            until, is_left = pipeline.execute()
        return None if until is None or is_left else int(until)

    def _seed(self, counters: dict[str, Counter], until: int) -> None:
        """Two steps: the model's counters of the server that is first, and the events that were stored by then. Any
        server completes what another one began."""
        staged = self._staged(counters)
        self._written(lambda client: self._begin_seed(args=[*staged, until], client=client))
        self._add_staged()
        held, first = self._read(lambda: self._redis.mget("jaxrec:trend_held", "jaxrec:trend_until"))
        if held is not None:
            staged = self._staged(self._counted(int(held), int(first)))
            self._written(lambda client: self._seed_events(args=staged, client=client))
        # Also where another server has just staged the events.
        self._add_staged()

    def _counted(self, last: int, until: int) -> dict[str, Counter]:
        """The counters of the stored events up to a revision that happened after `until`."""
        counters: dict[str, Counter] = {}
        for part in self.all_events():
            events = [
                new.event
                for revision, new in part
                if revision <= last and new.event.timestamp > until and new.event.weight > 0
            ]
            add_events(counters, ((event.item_id, event.timestamp) for event in events), time.time())
        return counters

    def _staged(self, counters: dict[str, Counter]) -> tuple[str, int]:
        """Writes counters to a list of their own, in parts; returns its key and its length."""
        entries = [
            entry
            for item_id, (reference, counts) in counters.items()
            for entry in (item_id, " ".join(map(repr, (reference, *counts))))
        ]
        staged = f"jaxrec:trend_seed:{os.urandom(8).hex()}"
        with self._failures("cannot be written"):
            for start in range(0, len(entries), 2 * COUNTERS_AT_ONCE):
                with self._redis.pipeline(transaction=True) as pipeline:
                    pipeline.rpush(staged, *entries[start : start + 2 * COUNTERS_AT_ONCE])
                    pipeline.expire(staged, STAGED_S)
                    pipeline.execute()
        return staged, len(entries)

    def _add_staged(self) -> None:
        left = 1
        while left:
            left, damaged = self._written(lambda client: self._add_seed(args=[COUNTERS_AT_ONCE], client=client))
            self._damaged.log(item.decode() for item in damaged)
