"""Whether a Redis server loses nothing, and what brings the store of an earlier version in it up to date."""

from collections.abc import Iterator

import redis

from serve.stores.base import StoreError
from serve.stores.redis.scripts import END_UPDATE, UPDATE_SLATES

VERSION = "9"
UPDATED_AS_THEY_ARE = (b"2", b"3", b"4", b"5", b"6", b"7", b"8")
"""Older versions whose entries are read as they are."""
UPDATED_AT_ONCE = 1_000
FIRST_WITH_WAITAOF = (7, 2)


def check_server(client: redis.Redis) -> bool:
    """Whether to ask after each write that it is on disk; raises StoreError when that would not help."""
    where = "Redis: expected a server that loses nothing"
    info = client.info()
    policy = info.get("maxmemory_policy", "noeviction")
    if policy != "noeviction":
        raise StoreError(f"{where}, came maxmemory-policy {policy}; set it to noeviction")
    if not info.get("aof_enabled"):
        raise StoreError(f"{where}, came appendonly no; set it to yes, and appendfsync to always")
    try:
        always = client.config_get("appendfsync").get("appendfsync") == "always"
    except redis.ResponseError:  # managed servers forbid it
        always = False
    version = tuple(int(part) for part in info["redis_version"].split(".")[:2])
    if not always and version < FIRST_WITH_WAITAOF:
        raise StoreError(f"{where} before it answers; set appendfsync to always, or use Redis 7.2 or later")
    if not client.set("jaxrec:version", VERSION, nx=True):
        found = client.get("jaxrec:version")
        if found == b"1":
            _update_from_version_1(client)
        elif found in UPDATED_AS_THEY_ARE:
            # Servers of version 2 could not read what is logged from now on, those of version 3 would not count
            # what they record, those of version 4 would not log the request options, those of version 5 would take
            # every event for a positive one, those of version 6 would answer items that are hidden, those of
            # version 7 could not read counters with an hour, and those of version 8 would not number deletions.
            client.set("jaxrec:version", VERSION)
        elif found != VERSION.encode():
            version_there = found.decode() if isinstance(found, bytes) else found
            raise StoreError(f"Redis: is a store in version {version_there}, expected 1..{VERSION}")
    return not always


def _update_from_version_1(client: redis.Redis) -> None:
    """Goes on where it was broken off. Servers of version 1 have to be stopped: they would log without ids."""
    update = client.register_script(UPDATE_SLATES)
    for key in (b"jaxrec:shown", *keys(client, b"jaxrec:shown:*")):
        while update(args=[key, UPDATED_AT_ONCE]):
            pass
    client.register_script(END_UPDATE)(args=[VERSION])


def keys(client: redis.Redis, pattern: bytes) -> Iterator[bytes]:
    """Those that match, each once."""
    seen = set()
    for key in client.scan_iter(pattern, count=1000):
        if key not in seen:
            seen.add(key)
            yield key
