"""Events, shown recommendations and spilled states in Redis, for several servers with one store.

What belongs together changes in one script, so that no reader sees half of it. Redis must write each command to its
log before it answers: `appendfsync always`, or from 7.2 on any appendonly server, which is then asked to (WAITAOF).
A server that would lose or evict events is refused. One Redis server (with replicas or not), no Redis Cluster: a
script touches keys of several users.

Keys, all below `jaxrec:`: `event_ids` (set), `revision` (counter), `user:ID` (hash of the first and last revision),
`events:ID` (list in order of arrival), `shown:ID` and `shown` (lists), `states:ID` (hash by model version),
`states` (sorted set of the IDs that have one, so that they can be found).
"""

import json
import struct
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from serve.history import Event
from serve.store import Changes, Deleted, EventStore, Shown, SpilledState, StoreError, UserEvent
from serve.stores.deferred import DeferredWrites

VERSION = "1"
TIMEOUT_S = 5.0
FIRST_WITH_WAITAOF = (7, 2)
REVISION = struct.Struct("<q")

# ARGV: for each event its id, user and value. Returns 1 for each that is new. Arguments, not KEYS: see above.
RECORD = """
local new = {}
for at = 1, #ARGV, 3 do
    local user = ARGV[at + 1]
    local is_new = redis.call('SADD', 'jaxrec:event_ids', ARGV[at])
    if is_new == 1 then
        local revision = redis.call('INCR', 'jaxrec:revision')
        redis.call('HSETNX', 'jaxrec:user:' .. user, 'first', revision)
        redis.call('HSET', 'jaxrec:user:' .. user, 'last', revision)
        redis.call('RPUSH', 'jaxrec:events:' .. user, string.format('%d', revision) .. ' ' .. ARGV[at + 2])
    end
    new[#new + 1] = is_new
end
return new
"""
# ARGV: user. Returns how many events and shown recommendations there were.
DELETE_USER = """
local user = ARGV[1]
local events = redis.call('LRANGE', 'jaxrec:events:' .. user, 0, -1)
for _, text in ipairs(events) do
    local event = cjson.decode(string.sub(text, string.find(text, ' ') + 1))
    redis.call('SREM', 'jaxrec:event_ids', event[1])
end
local shown = redis.call('LLEN', 'jaxrec:shown:' .. user)
redis.call('SREM', 'jaxrec:states', user)
redis.call('DEL', 'jaxrec:events:' .. user, 'jaxrec:shown:' .. user, 'jaxrec:states:' .. user, 'jaxrec:user:' .. user)
return {#events, shown}
"""
# ARGV: user, model version, revision, revision and state as bytes. Only for a user that was not deleted since.
SAVE_STATE = """
local first = redis.call('HGET', 'jaxrec:user:' .. ARGV[1], 'first')
if first and tonumber(first) <= tonumber(ARGV[3]) then
    redis.call('HSET', 'jaxrec:states:' .. ARGV[1], ARGV[2], ARGV[4])
    redis.call('SADD', 'jaxrec:states', ARGV[1])
end
"""


class RedisStore(EventStore):
    """A store in one database of a Redis server."""

    def __init__(self, location: str) -> None:
        """Connects; raises StoreError, also where the server does not keep what it is told."""
        try:
            # A broken connection is replaced at the next call; commands are not repeated behind our back.
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
        self._save_state = self._redis.register_script(SAVE_STATE)
        try:
            with self._failures("cannot be opened"):
                self._waits_for_disk = self._check_server()
        except BaseException:
            self._redis.close()
            raise
        self._deferred = DeferredWrites(self._write_deferred)

    def __enter__(self) -> "RedisStore":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._deferred.close()
        self._redis.close()

    def record(self, events: Sequence[UserEvent]) -> list[UserEvent]:
        if not events:
            return []
        arguments = []
        for new in events:
            value = [new.event_id, *new.event, *([new.recommendation_id] if new.recommendation_id is not None else ())]
            arguments += [new.event_id, new.user_id, json.dumps(value, ensure_ascii=False)]
        is_new = self._written(lambda client: self._record(args=arguments, client=client))
        return [event for event, new in zip(events, is_new, strict=True) if new]

    def history(self, user_id: str, until: int | None = None) -> list[Event]:
        events = _decoded(self._read(lambda: self._redis.lrange(f"jaxrec:events:{user_id}", 0, -1)), 0)
        return events if until is None else [event for event in events if event.timestamp <= until]

    def revision(self, user_id: str) -> int:
        return int(self._read(lambda: self._redis.hget(f"jaxrec:user:{user_id}", "last")) or 0)

    def changes(self, user_id: str, since: int = 0) -> Changes:
        first, last = self._read(lambda: self._redis.hmget(f"jaxrec:user:{user_id}", "first", "last"))
        first, revision = int(first or 0), int(last or 0)
        complete = since < first or not revision
        if complete:
            since = 0
        elif since >= revision:
            return Changes(revision, [], complete=False)
        values = self._read(lambda: self._redis.lrange(f"jaxrec:events:{user_id}", 0, -1))
        return Changes(revision, _decoded(values, since, revision), complete)

    def log_shown(self, shown: Shown, *, wait: bool = False) -> None:
        if wait:
            self._written(lambda client: client.rpush(_shown_key(shown.user_id), json.dumps(shown)))
        else:
            self._deferred.add([shown])

    def shown(self, user_id: str | None) -> list[Shown]:
        values = self._read(lambda: self._redis.lrange(_shown_key(user_id), 0, -1))
        rows = [json.loads(value) for value in values]
        return [Shown(row[0], row[1], tuple(row[2]), tuple(row[3]), *row[4:]) for row in rows]

    def save_states(self, states: Sequence[SpilledState]) -> None:
        self._deferred.add(states)

    def load_state(self, user_id: str, model_version: str) -> SpilledState | None:
        value = self._read(lambda: self._redis.hget(f"jaxrec:states:{user_id}", model_version))
        if value is None:
            return None
        (revision,) = REVISION.unpack_from(value)
        return SpilledState(user_id, model_version, revision, value[REVISION.size :])

    def drop_states(self, keep_versions: Collection[str]) -> int:
        kept = {version.encode() for version in keep_versions}
        dropped = 0
        with self._failures("cannot be written"):
            for user in self._redis.sscan_iter("jaxrec:states", count=1000):
                key = b"jaxrec:states:" + user
                old = [version for version in self._redis.hkeys(key) if version not in kept]
                dropped += self._redis.hdel(key, *old) if old else 0
        return dropped

    def delete_user(self, user_id: str) -> Deleted:
        self._deferred.discard(user_id)
        events, shown = self._written(lambda client: self._delete(args=[user_id], client=client))
        return Deleted(events, shown)

    @property
    def dropped_count(self) -> int:
        return self._deferred.dropped_count

    def flush(self) -> None:
        self._deferred.flush()

    def _write_deferred(self, shown: Sequence[Shown], states: Sequence[SpilledState]) -> None:
        with self._failures("cannot be written"), self._redis.pipeline(transaction=True) as pipeline:
            for one in shown:
                pipeline.rpush(_shown_key(one.user_id), json.dumps(one))
            for state in states:
                value = REVISION.pack(state.revision) + state.state
                self._save_state(args=[state.user_id, state.model_version, state.revision, value], client=pipeline)
            pipeline.execute()

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
        where = "Redis: expected a server that keeps what it is told"
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
            if found != VERSION.encode():
                shown = found.decode() if isinstance(found, bytes) else found
                raise StoreError(f"Redis: is a store in version {shown}, expected {VERSION}")
        return not always

    @contextmanager
    def _failures(self, what: str) -> Iterator[None]:
        try:
            yield
        except redis.RedisError as error:
            raise StoreError(f"Redis: {what}: {error}") from error


def _shown_key(user_id: str | None) -> str:
    return "jaxrec:shown" if user_id is None else f"jaxrec:shown:{user_id}"


def _decoded(values: Sequence[bytes], since: int, until: int | None = None) -> list[Event]:
    """The events of a user's list whose revision is in `since` + 1..`until`, by (timestamp, arrival)."""
    events = []
    for value in values:
        revision, _, text = value.partition(b" ")
        if since < int(revision) and (until is None or int(revision) <= until):
            _, item_id, rating, timestamp, *_ = json.loads(text)
            events.append(Event(item_id, rating, timestamp))
    # The list is in the order of arrival, and sorting keeps it.
    return sorted(events, key=lambda event: event.timestamp)
