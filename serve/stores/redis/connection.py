"""A connection to one Redis server: what its failures become, and reading and writing that survives them."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from serve.stores.base import StoreError
from serve.stores.deferred import DeferringStore
from serve.stores.redis.server import keys

COPIED_AT_ONCE = 1_000
TIMEOUT_S = 5.0


class RedisConnection(DeferringStore):
    """The part of a store that calls Redis."""

    _waits_for_disk: bool

    def __init__(self, location: str) -> None:
        """Connects when first used; raises StoreError for what is no location."""
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

    def _keys(self, pattern: bytes) -> Iterator[bytes]:
        """Those that match, each once."""
        with self._failures("cannot be read"):
            yield from keys(self._redis, pattern)

    def _parts(self, key: bytes) -> Iterator[list[bytes]]:
        for start in itertools.count(0, COPIED_AT_ONCE):
            with self._failures("cannot be read"):
                values: list[Any] = self._redis.lrange(key, start, start + COPIED_AT_ONCE - 1)
            if not values:
                return
            yield values

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

    @contextmanager
    def _failures(self, what: str) -> Iterator[None]:
        try:
            yield
        except redis.RedisError as error:
            raise StoreError(f"Redis: {what}: {error}") from error
