"""Events, impressions and spilled states in Redis, for several servers with one store.

What belongs together changes in one script, so that no reader sees half of it. Redis must write each command to its
log before it answers: `appendfsync always`, or from 7.2 on any appendonly server, which is then asked to (WAITAOF).
A server that would lose or evict events is refused. One Redis server (with replicas or not), no Redis Cluster: a
script touches keys of several users.

Keys, all below `jaxrec:`: `event_ids` (set), `revision` (counter), `user:ID` (hash of the first and last revision),
`events:ID` (list in order of arrival), `shown:ID` and `shown` (lists), `shown_ids` (set of what is in them),
`states:ID` (hash by model version), `states` (set of the IDs that have one, so that they can be found),
`deletions` (sorted set of digests of deleted users by time), `deleted` (hash of lists `deleted:NUMBER`, what is left of
long deleted lists, and of which set it has ids), `trend` (hash of the counters by item ID), `trend_changed` (sorted
set of those IDs by the revision of the last change), `trend_until` (events after this time are counted); while a store
is seeded, `trend_held` (the revision up to which the events have still to be added up), `trend_seed` (list: what is
still to be added to `trend`) and `trend_seed:TOKEN` (the same, before it is whole); while a store of version 1 is
brought up to date, `update` (hash of the lists of impressions: how much of each is left) and `update_ids` (`shown_ids`
later).
"""

import itertools
import json
import os
import struct
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from serve.model.events import Event
from serve.stores.base import (
    DELETION_S,
    MOST_EVENTS,
    Changes,
    Deleted,
    Impression,
    SpilledState,
    StoreError,
    UserEvent,
    digest,
)
from serve.stores.counters import NONE_READ, Counter, Damaged, ItemCounts, add_events
from serve.stores.deferred import DeferredWrites, DeferringStore
from serve.stores.redis_scripts import (
    ADD_SEED,
    DELETE_USER,
    DROP_STATES,
    END_UPDATE,
    FORGET_REST,
    LOG_IMPRESSION,
    READ_COUNTS,
    RECORD,
    SAVE_STATE,
    SEED,
    SEED_EVENTS,
    UPDATE_IMPRESSIONS,
)
from serve.stores.redis_values import counter_of, decoded, impression_arguments, impression_of, user_event
from serve.stores.rows import Started

VERSION = "5"
UPDATED_AS_THEY_ARE = (b"2", b"3", b"4")
"""Older versions whose entries are read as they are."""
COPIED_AT_ONCE = 1_000
UPDATED_AT_ONCE = 1_000
DELETED_AT_ONCE = 1_000
DROPPED_AT_ONCE = 1_000
COUNTERS_AT_ONCE = 1_000
# A seed that was broken off before it was whole is forgotten after an hour.
STAGED_S = 3_600
TIMEOUT_S = 5.0
FIRST_WITH_WAITAOF = (7, 2)
REVISION = struct.Struct("<q")


class RedisStore(DeferringStore):
    """A store in one database of a Redis server."""

    def __init__(self, location: str) -> None:
        """Connects; raises StoreError, also where the server could lose acknowledged events."""
        try:
            # A broken connection is replaced at the next call; redis-py repeats no commands by itself.
            self._redis = redis.Redis.from_url(
                location,
                socket_timeout=TIMEOUT_S,
                socket_connect_timeout=TIMEOUT_S,
                retry=Retry(NoBackoff(), 0),
                health_check_interval=0,
            )
        except ValueError as error:
            raise StoreError(f"Redis: {error}") from error
        self._record = self._redis.register_script(RECORD)
        self._delete = self._redis.register_script(DELETE_USER)
        self._forget_rest = self._redis.register_script(FORGET_REST)
        self._drop_states = self._redis.register_script(DROP_STATES)
        self._drop_from = 0
        self._save_state = self._redis.register_script(SAVE_STATE)
        self._log_impression = self._redis.register_script(LOG_IMPRESSION)
        self._read_counts = self._redis.register_script(READ_COUNTS)
        self._begin_seed = self._redis.register_script(SEED)
        self._seed_events = self._redis.register_script(SEED_EVENTS)
        self._add_seed = self._redis.register_script(ADD_SEED)
        try:
            with self._failures("cannot be opened"):
                self._waits_for_disk = self._check_server()
                self._finish_deletions()
        except BaseException:
            self._redis.close()
            raise
        self._damaged = Damaged("Redis, jaxrec:trend")
        self._deferred = DeferredWrites(self._write_deferred)

    def close(self) -> None:
        self._deferred.close()
        self._redis.close()

    def record(self, events: Sequence[UserEvent]) -> list[UserEvent]:
        if not events:
            return []
        arguments: list[Any] = [int(time.time())]
        for new in events:
            value = [new.event_id, *new.event, *([new.recommendation_id] if new.recommendation_id is not None else ())]
            arguments += [new.event_id, new.user_id, json.dumps(value, ensure_ascii=False)]
            arguments += [new.event.item_id, new.event.timestamp]
        is_new, damaged = self._written(lambda client: self._record(args=arguments, client=client))
        self._damaged.log(item.decode() for item in damaged)
        return [event for event, new in zip(events, is_new, strict=True) if new]

    def history(self, user_id: str, until: int | None = None) -> list[Event]:
        events = decoded(self._events(user_id, MOST_EVENTS), 0)
        if until is not None:
            events = [event for event in events if event.timestamp <= until]
        return events[-MOST_EVENTS:]

    def revision(self, user_id: str) -> int:
        return int(self._read(lambda: self._redis.hget(f"jaxrec:user:{user_id}", "last")) or 0)

    def changes(self, user_id: str, since: int = 0, most: int = MOST_EVENTS) -> Changes:
        first, last = self._read(lambda: self._redis.hmget(f"jaxrec:user:{user_id}", "first", "last"))
        first, revision = int(first or 0), int(last or 0)
        complete = since < first or not revision
        if complete:
            since = 0
        elif since >= revision:
            return Changes(revision, [], complete=False)
        values = self._events(user_id, most)
        events = decoded(values, since, revision)
        if not complete and len(events) >= most:
            events, complete = decoded(values, 0, revision), True
        return Changes(revision, events[-most:], complete)

    def load_state(self, user_id: str, model_version: str) -> SpilledState | None:
        value = self._read(lambda: self._redis.hget(f"jaxrec:states:{user_id}", model_version))
        if value is None:
            return None
        (revision,) = REVISION.unpack_from(value)
        return SpilledState(user_id, model_version, revision, value[REVISION.size :])

    def drop_states(self, keep_versions: Collection[str], most: int) -> int:
        # From where the last call ended; before "none is left" is said, all users are seen once.
        dropped, sees_all = 0, self._drop_from == 0
        with self._failures("cannot be written"):
            while dropped < most:
                at_once = min(most - dropped, DROPPED_AT_ONCE)
                cursor, count = self._drop_states(args=[self._drop_from, at_once, *keep_versions])
                self._drop_from = int(cursor)
                dropped += count
                if self._drop_from == 0:
                    if sees_all or dropped:
                        break
                    sees_all = True
        return dropped

    def delete_user(self, user_id: str) -> Deleted:
        self._deferred.discard(user_id)
        arguments: list[Any] = [user_id, digest(user_id), DELETION_S, DELETED_AT_ONCE]
        events, impressions = self._written(lambda client: self._delete(args=arguments, client=client))
        # Also what an attempt that failed left.
        self._finish_deletions()
        return Deleted(events, impressions)

    def last_arrival(self) -> int:
        return int(self._read(lambda: self._redis.get("jaxrec:revision")) or 0)

    def all_events(self, after: int = 0) -> Iterator[Sequence[tuple[int, UserEvent]]]:
        prefix = b"jaxrec:events:"
        for key in self._keys(prefix + b"*"):
            user_id = key.removeprefix(prefix).decode()
            for values in self._parts(key):
                yield [one for one in (user_event(user_id, value) for value in values) if one[0] > after]

    def all_impressions(self) -> Iterator[Sequence[Impression]]:
        for key in (b"jaxrec:shown", *self._keys(b"jaxrec:shown:*")):
            for values in self._parts(key):
                yield [impression_of(value) for value in values]

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
            events = [new.event for revision, new in part if revision <= last and new.event.timestamp > until]
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

    def _finish_deletions(self) -> None:
        """Of long lists, also where another server began; may be broken off, and done by two at once."""
        lists: dict[bytes, bytes] = self._read(lambda: self._redis.hgetall("jaxrec:deleted"))
        with self._failures("cannot be written"):
            for rest, ids in lists.items():
                while self._forget_rest(args=[rest, ids, DELETED_AT_ONCE]):
                    pass
        if lists:
            self._written(lambda client: client.hdel("jaxrec:deleted", *lists))

    def _events(self, user_id: str, most: int) -> list[bytes]:
        """A user's events as they are stored, of many those that arrived last: the newest by time are among them,
        unless most of them came late."""
        values: list[bytes] = self._read(lambda: self._redis.lrange(f"jaxrec:events:{user_id}", -2 * most, -1))
        return values

    def _keys(self, pattern: bytes) -> Iterator[bytes]:
        """Those that match, each once."""
        seen = set()
        with self._failures("cannot be read"):
            for key in self._redis.scan_iter(pattern, count=1000):
                if key not in seen:
                    seen.add(key)
                    yield key

    def _parts(self, key: bytes) -> Iterator[list[bytes]]:
        for start in itertools.count(0, COPIED_AT_ONCE):
            with self._failures("cannot be read"):
                values: list[Any] = self._redis.lrange(key, start, start + COPIED_AT_ONCE - 1)
            if not values:
                return
            yield values

    def _write_deferred(self, impressions: Sequence[Started], states: Sequence[SpilledState]) -> None:
        with self._failures("cannot be written"), self._redis.pipeline(transaction=True) as pipeline:
            now = self._now()
            for one in impressions:
                self._log_impression(args=impression_arguments(one, now), client=pipeline)
            for state in states:
                value = REVISION.pack(state.revision) + state.state
                self._save_state(args=[state.user_id, state.model_version, state.revision, value], client=pipeline)
            pipeline.execute()

    def _now(self) -> float:
        """By the server's clock, which the times of deletions are of."""
        seconds, microseconds = self._redis.time()
        return float(seconds + microseconds / 1e6)

    def _read(self, call: Callable[[], Any]) -> Any:
        with self._failures("cannot be read"):
            return call()

    def _written(self, call: Callable[[redis.Redis], Any]) -> Any:
        """The result of a call, once it is on the server's disk."""
        with self._failures("cannot be written"):
            if not self._waits_for_disk:
                return call(self._redis)
            # WAITAOF waits for the writes of its own connection, and a pipeline has one.
            with self._redis.pipeline(transaction=False) as pipeline:
                call(pipeline)
                pipeline.waitaof(1, 0, int(TIMEOUT_S * 1000))
                result, (synced, _) = pipeline.execute()
        if not synced:
            raise StoreError(f"Redis: cannot be written: not on its disk within {TIMEOUT_S:g} s")
        return result

    def _check_server(self) -> bool:
        """Whether to ask after each write that it is on disk; raises StoreError when that would not help."""
        where = "Redis: expected a server that loses nothing"
        info = self._redis.info()
        policy = info.get("maxmemory_policy", "noeviction")
        if policy != "noeviction":
            raise StoreError(f"{where}, came maxmemory-policy {policy}; set it to noeviction")
        if not info.get("aof_enabled"):
            raise StoreError(f"{where}, came appendonly no; set it to yes, and appendfsync to always")
        try:
            always = self._redis.config_get("appendfsync").get("appendfsync") == "always"
        except redis.ResponseError:  # managed servers forbid it
            always = False
        version = tuple(int(part) for part in info["redis_version"].split(".")[:2])
        if not always and version < FIRST_WITH_WAITAOF:
            raise StoreError(f"{where} before it answers; set appendfsync to always, or use Redis 7.2 or later")
        if not self._redis.set("jaxrec:version", VERSION, nx=True):
            found = self._redis.get("jaxrec:version")
            if found == b"1":
                self._update_from_version_1()
            elif found in UPDATED_AS_THEY_ARE:
                # Servers of version 2 could not read what is logged from now on, those of version 3 would not count
                # what they record, and those of version 4 would not log the request options.
                self._redis.set("jaxrec:version", VERSION)
            elif found != VERSION.encode():
                version_there = found.decode() if isinstance(found, bytes) else found
                raise StoreError(f"Redis: is a store in version {version_there}, expected 1..{VERSION}")
        return not always

    def _update_from_version_1(self) -> None:
        """Goes on where it was broken off. Servers of version 1 have to be stopped: they would log without ids."""
        update = self._redis.register_script(UPDATE_IMPRESSIONS)
        for key in (b"jaxrec:shown", *self._keys(b"jaxrec:shown:*")):
            while update(args=[key, UPDATED_AT_ONCE]):
                pass
        self._redis.register_script(END_UPDATE)(args=[VERSION])

    @contextmanager
    def _failures(self, what: str) -> Iterator[None]:
        try:
            yield
        except redis.RedisError as error:
            raise StoreError(f"Redis: {what}: {error}") from error
