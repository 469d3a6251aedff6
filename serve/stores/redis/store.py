"""Events, slates, spilled states and items in Redis, for several servers with one store.

What belongs together changes in one script, so that no reader sees half of it. Redis must write each command to its
log before it answers: `appendfsync always`, or from 7.2 on any appendonly server, which is then asked to (WAITAOF).
A server that would lose or evict events is refused. One Redis server (with replicas or not), no Redis Cluster: a
script touches keys of several users.

Keys, all below `jaxrec:`: `event_ids` (set), `revision` (counter), `user:ID` (hash of the first and last revision),
`events:ID` and `neutral:ID` (lists in order of arrival: the events that are not neutral, and those that are),
`shown:ID` and `shown` (lists), `shown_ids` (set of what is in them), `shown_items:RECOMMENDATION` (hash by item),
`states:ID` (hash by model version), `states` (set of the IDs that have one, so that they can be found), `deletions`
(sorted set of the digests of deleted users by the number of the deletion), `deletion_numbers` (hash of the same),
`deletion` (the number of the last one), `deleted` (hash of lists `deleted:NUMBER`, what is left of long
deleted lists, and of which set it has ids), `trend` (hash of the counters by item ID), `trend_changed` (sorted set of
those IDs by the revision of the last change), `trend_until` (events after this time are counted); while a store is
seeded, `trend_held` (the revision up to which the events have still to be added up), `trend_seed` (list: what is still
to be added to `trend`) and `trend_seed:TOKEN` (the same, before it is whole); while a store of version 1 is brought up
to date, `update` (hash of the lists of slates: how much of each is left) and `update_ids` (`shown_ids` later). Those of
items are in `serve.stores.redis.items`.
"""

import heapq
import struct
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from itertools import chain, islice
from typing import Any, TypeVar

from serve.model.events import Event
from serve.stores.base import (
    EVERY_SLATE,
    MOST_DELETIONS,
    MOST_EVENTS,
    MOST_MERGED,
    MOST_SLATES,
    SOME_SLATES,
    Changes,
    Deleted,
    ShownItem,
    Slate,
    SpilledState,
    Swept,
    TooManySlates,
    TooManyToMerge,
    UserEvent,
    digest,
)
from serve.stores.deferred import DeferredWrites
from serve.stores.redis.connection import COPIED_AT_ONCE
from serve.stores.redis.counters import RedisCounters
from serve.stores.redis.items import RedisItems
from serve.stores.redis.scripts import (
    DROP_STATES,
    LOG_SLATE,
    RECORD,
    SAVE_STATE,
)
from serve.stores.redis.server import check_server
from serve.stores.redis.user_scripts import (
    DELETE_EVENTS,
    DELETE_USER,
    FORGET_REST,
    MERGE_USERS,
    PRUNE_SHOWN,
    PRUNE_SLATES,
    RECORD_SHOWN,
)
from serve.stores.redis.values import (
    SHOWN_ITEMS,
    decoded,
    event_value,
    place,
    revision_of,
    shown_item,
    shown_item_arguments,
    slate_arguments,
    slate_of,
    user_event,
)
from serve.stores.rows import Started

DELETED_AT_ONCE = 1_000
SLATES_AT_ONCE = 50
READ_FIRST = 32  # events, to find those that arrived since a revision: mostly there is one
LISTS = (b"jaxrec:events:", b"jaxrec:neutral:")
SHOWN = b"jaxrec:shown:"
LISTS_AT_ONCE = 50
REVISION = struct.Struct("<q")
T = TypeVar("T")


class RedisStore(RedisCounters, RedisItems):
    """A store in one database of a Redis server."""

    def __init__(self, location: str) -> None:
        """Connects; raises StoreError, also where the server could lose acknowledged events."""
        super().__init__(location)
        self._record = self._redis.register_script(RECORD)
        self._delete = self._redis.register_script(DELETE_USER)
        self._delete_events = self._redis.register_script(DELETE_EVENTS)
        self._record_shown = self._redis.register_script(RECORD_SHOWN)
        self._merge = self._redis.register_script(MERGE_USERS)
        self._forget_rest = self._redis.register_script(FORGET_REST)
        self._drop_states = self._redis.register_script(DROP_STATES)
        self._prune_from = 0
        # Lists and hashes still to be pruned, and from which place of the first one on.
        self._unpruned: deque[bytes] = deque()
        self._prune_place = 0
        self._prune = self._redis.register_script(PRUNE_SLATES)
        self._prune_shown = self._redis.register_script(PRUNE_SHOWN)
        self._save_state = self._redis.register_script(SAVE_STATE)
        self._log_slate = self._redis.register_script(LOG_SLATE)
        try:
            with self._failures("cannot be opened"):
                self._waits_for_disk = check_server(self._redis)
                self._finish_deletions()
        except BaseException:
            self._redis.close()
            raise
        self._deferred = DeferredWrites(self._write_deferred, self._last_deletion)

    def close(self) -> None:
        self._deferred.close()
        self._redis.close()

    def record(self, events: Sequence[UserEvent]) -> list[UserEvent]:
        if not events:
            return []
        arguments: list[Any] = [int(time.time())]
        for new in events:
            arguments += [new.event_id, new.user_id, event_value(new)]
            arguments += [new.event.item_id, new.event.timestamp, (new.event.weight > 0) - (new.event.weight < 0)]
        is_new, damaged = self._written(lambda client: self._record(args=arguments, client=client))
        self._damaged.log(item.decode() for item in damaged)
        return [event for event, new in zip(events, is_new, strict=True) if new]

    def history(self, user_id: str, until: int | None = None) -> list[Event]:
        events = decoded(self._events(user_id, MOST_EVENTS, 0), 0)
        if until is not None:
            events = [event for event in events if event.timestamp <= until]
        return events[-MOST_EVENTS:]

    def recorded_ids(self, event_ids: Sequence[str]) -> set[str]:
        # Not SMISMEMBER, which came with Redis 6.2.
        with self._failures("cannot be read"), self._redis.pipeline(transaction=False) as pipeline:
            for event_id in event_ids:
                pipeline.sismember("jaxrec:event_ids", event_id)
            return {event_id for event_id, stored in zip(event_ids, pipeline.execute(), strict=True) if stored}

    def revision(self, user_id: str) -> int:
        return int(self._read(lambda: self._redis.hget(f"jaxrec:user:{user_id}", "last")) or 0)

    def revisions(self, user_ids: Sequence[str]) -> dict[str, int]:
        def read() -> list[bytes | None]:
            with self._redis.pipeline(transaction=False) as pipeline:
                for user_id in user_ids:
                    pipeline.hget(f"jaxrec:user:{user_id}", "last")
                found: list[bytes | None] = pipeline.execute()
                return found

        return {user_id: int(last or 0) for user_id, last in zip(user_ids, self._read(read), strict=True)}

    def changes(self, user_id: str, since: int = 0, most: int = MOST_EVENTS) -> Changes:
        first, last = self._read(lambda: self._redis.hmget(f"jaxrec:user:{user_id}", "first", "last"))
        first, revision = int(first or 0), int(last or 0)
        complete = since < first or not revision
        if complete:
            since = 0
        elif since >= revision:
            return Changes(revision, [], complete=False)
        events = decoded(self._events(user_id, most, since), since, revision)
        if not complete and len(events) >= most:
            events, complete = decoded(self._events(user_id, most, 0), 0, revision), True
        return Changes(revision, events[-most:], complete)

    def load_state(self, user_id: str, model_version: str) -> SpilledState | None:
        value = self._read(lambda: self._redis.hget(f"jaxrec:states:{user_id}", model_version))
        if value is None:
            return None
        (revision,) = REVISION.unpack_from(value)
        return SpilledState(user_id, model_version, revision, value[REVISION.size :])

    def drop_states(self, keep_versions: Collection[str], most: int, place: Any = None) -> Swept:
        with self._failures("cannot be written"):
            cursor, count = self._drop_states(args=[place or 0, most, *keep_versions])
        return Swept(count, int(cursor) or None)

    def prune_slates(self, before: int, most: int) -> bool:
        """Goes through all lists, from where the last call ended."""
        left = most
        with self._failures("cannot be written"):
            while left > 0:
                if not self._unpruned:
                    found: Any = self._redis.scan(self._prune_from, match="jaxrec:shown*", count=most)
                    self._prune_from, names = found
                    self._unpruned.extend(names)
                left -= self._prune_first(before, most) if self._unpruned else 1
                if not self._unpruned and not self._prune_from:
                    return False
        return True

    def _prune_first(self, before: int, most: int) -> int:
        """Prunes a part of the first list; how many entries it looked at, at least 1. A list is in about the order of
        time: it is done with when a whole part of it is young enough."""
        key, seen, deleted = self._unpruned[0], 1, 0
        if key.startswith(f"{SHOWN_ITEMS}:".encode()):
            self._prune_shown(args=[key, key.decode().removeprefix(f"{SHOWN_ITEMS}:"), before])
        elif key == b"jaxrec:shown" or key.startswith(b"jaxrec:shown:"):
            seen, deleted = self._prune(args=[key, before, most, self._prune_place])
        self._prune_place += seen - deleted
        if not deleted:
            self._unpruned.popleft()
            self._prune_place = 0
        return max(1, seen)

    def delete_user(self, user_id: str) -> Deleted:
        self._deferred.discard(user_id)
        arguments: list[Any] = [user_id, digest(user_id), MOST_DELETIONS, DELETED_AT_ONCE]
        events, neutral, slates = self._written(lambda client: self._delete(args=arguments, client=client))
        self._deferred.look()
        # Also what an attempt that failed left.
        self._finish_deletions()
        return Deleted(events + neutral, slates)

    def list_events(
        self, user_id: str, most: int, before: tuple[int, int] | None = None
    ) -> list[tuple[int, UserEvent]]:
        """Reads all events of the user."""
        found: list[tuple[int, UserEvent]] = []
        for key in _lists_of(user_id):
            for values in self._parts(key):
                found += [user_event(user_id, value) for value in values]
                found = heapq.nlargest(most, (one for one in found if before is None or place(one) < before), key=place)
        return found

    def _stored_slates(self, user_id: str, since: int) -> Iterator[tuple[str, Sequence[str]]]:
        """Of the slates that were logged last, which are in about the order of their times."""
        for start in range(0, MOST_SLATES, SLATES_AT_ONCE):
            first, last = -min(start + SLATES_AT_ONCE, MOST_SLATES), -start - 1
            values: list[Any] = self._read(partial(self._redis.lrange, f"jaxrec:shown:{user_id}", first, last))
            slates = [one for one in (slate_of(value, user_id) for value in values) if one.timestamp >= since]
            if not slates:
                return
            newest_first = sorted(reversed(slates), key=lambda one: -one.timestamp)
            yield from ((one.recommendation_id, one.item_ids) for one in newest_first)

    def record_shown(self, items: Sequence[ShownItem]) -> int:
        arguments = [argument for one in items for argument in shown_item_arguments(one)]
        return int(self._written(partial(self._record_shown, None, arguments))) if arguments else 0

    def all_shown(self) -> Iterator[Sequence[ShownItem]]:
        found_keys = self._keys(f"{SHOWN_ITEMS}:*".encode())
        while keys := list(islice(found_keys, COPIED_AT_ONCE)):
            with self._failures("cannot be read"), self._redis.pipeline(transaction=False) as pipeline:
                for key in keys:
                    pipeline.hgetall(key)
                found: list[dict[bytes, bytes]] = pipeline.execute()
            pairs = zip(keys, found, strict=True)
            yield [shown_item(key, field, value) for key, part in pairs for field, value in part.items()]

    def delete_events(self, user_id: str, event_ids: Sequence[str]) -> int:
        asked, deleted = set(event_ids), -1
        while deleted < 0:
            arguments: list[Any] = [user_id]
            for key in _lists_of(user_id):
                for number, value in enumerate(chain.from_iterable(self._parts(key))):
                    event_id = user_event(user_id, value)[1].event_id
                    if event_id in asked:
                        arguments += [key, number, value, event_id]
            if len(arguments) == 1:
                return 0
            # If another call deletes events of the user meanwhile, the places are others.
            deleted = self._written(partial(self._delete_events, None, arguments))
        return deleted

    def merge_users(self, source: str, target: str) -> Deleted:
        arguments: list[Any] = [
            source,
            target,
            digest(source),
            MOST_DELETIONS,
            MOST_MERGED,
            2 * MOST_EVENTS,
            MOST_SLATES,
        ]
        with self._deferred.merging(source, target):
            *counts, moved = self._written(lambda client: self._merge(args=arguments, client=client))
            if not moved:
                raise TooManyToMerge(sum(counts), MOST_MERGED)
        events, neutral, slates = counts
        return Deleted(events + neutral, slates)

    def last_arrival(self) -> int:
        return int(self._read(lambda: self._redis.get("jaxrec:revision")) or 0)

    def all_events(self, after: int = 0) -> Iterator[Sequence[tuple[int, UserEvent]]]:
        for prefix in LISTS:
            keys = self._keys(prefix + b"*")
            if after:
                yield from self._ends(keys, partial(_event_after, prefix, after))
                continue
            for key in keys:
                user_id = key.removeprefix(prefix).decode()
                for values in self._parts(key):
                    yield [user_event(user_id, value) for value in values]

    def all_slates(self, since: int = 0, most: int = EVERY_SLATE) -> Iterator[Sequence[Slate]]:
        keys = chain((b"jaxrec:shown",), self._keys(SHOWN + b"*"))
        if not since:
            for key in keys:
                for values in self._parts(key):
                    yield [slate_of(value, _user_of(key)) for value in values]
            return
        count = 0
        for slates in self._ends(keys, partial(_slate_since, since)):
            count += len(slates)
            if count > most:
                raise TooManySlates
            yield slates

    def _ends(self, keys: Iterator[bytes], wanted: Callable[[bytes, bytes], T | None]) -> Iterator[list[T]]:
        """What is wanted of lists, of whose values about the newest are: of each, parts from the newest one back to one
        without anything.

        Args:
            keys: Of the lists.
            wanted: What a value is, by its list; None: it is not wanted.
        """
        while some := list(islice(keys, LISTS_AT_ONCE)):
            start, size = 0, SLATES_AT_ONCE
            while some:
                with self._failures("cannot be read"), self._redis.pipeline(transaction=False) as pipeline:
                    for key in some:
                        pipeline.lrange(key, -start - size, -start - 1)
                    parts: list[list[bytes]] = pipeline.execute()
                longer = []
                for key, values in zip(some, parts, strict=True):
                    found = [one for one in (wanted(key, value) for value in values) if one is not None]
                    yield found
                    if found and len(values) == size:
                        longer.append(key)
                some, start, size = longer, start + size, min(4 * size, SOME_SLATES)

    def _finish_deletions(self) -> None:
        """Of long lists, also where another server began; may be broken off, and done by two at once."""
        lists: dict[bytes, bytes] = self._read(lambda: self._redis.hgetall("jaxrec:deleted"))
        with self._failures("cannot be written"):
            for rest, ids in lists.items():
                while self._forget_rest(args=[rest, ids, DELETED_AT_ONCE]):
                    pass
        if lists:
            self._written(lambda client: client.hdel("jaxrec:deleted", *lists))

    def _events(self, user_id: str, most: int, since: int) -> list[bytes]:
        """A user's events that are not neutral as they are stored, of many those that arrived last: the newest by time
        are among them, unless most of them came late. Back to a revision; some that are not after it may be among
        them."""
        key, left, size = f"jaxrec:events:{user_id}", 2 * most, 2 * most if since == 0 else READ_FIRST
        parts: list[list[bytes]] = []
        with self._failures("cannot be read"):
            end = self._redis.llen(key)
            while end > 0 and left > 0:
                start = max(0, end - min(size, left))
                values: list[Any] = self._redis.lrange(key, start, end - 1)
                parts.append(values)
                if not values or revision_of(values[0]) <= since:
                    break
                end, left, size = start, left - len(values), 4 * size
        return list(chain.from_iterable(reversed(parts)))

    def _last_deletion(self) -> int:
        return int(self._read(lambda: self._redis.get("jaxrec:deletion")) or 0)

    def _write_deferred(self, slates: Sequence[Started], states: Sequence[SpilledState]) -> None:
        with self._failures("cannot be written"), self._redis.pipeline(transaction=True) as pipeline:
            for one in slates:
                self._log_slate(args=slate_arguments(one), client=pipeline)
            for state in states:
                value = REVISION.pack(state.revision) + state.state
                self._save_state(args=[state.user_id, state.model_version, state.revision, value], client=pipeline)
            pipeline.execute()


def _user_of(key: bytes) -> str | None:
    """Whose slates a list has; None: nobody's."""
    return key.removeprefix(SHOWN).decode() if key.startswith(SHOWN) else None


def _slate_since(since: int, key: bytes, value: bytes) -> Slate | None:
    one = slate_of(value, _user_of(key))
    return one if one.timestamp >= since else None


def _event_after(prefix: bytes, after: int, key: bytes, value: bytes) -> tuple[int, UserEvent] | None:
    return user_event(key.removeprefix(prefix).decode(), value) if revision_of(value) > after else None


def _lists_of(user_id: str) -> list[bytes]:
    """The keys of a user's events."""
    return [prefix + user_id.encode() for prefix in LISTS]
