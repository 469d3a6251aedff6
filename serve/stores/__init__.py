"""Stores of events: `open_store` finds the database behind a location."""

from pathlib import Path

from serve.stores.base import EventStore, StoreError


def open_store(location: str | Path) -> EventStore:
    """Opens what `location` names, and creates what is missing in it; raises StoreError.

    `postgresql://USER@HOST/DATABASE` and `redis://HOST:PORT/NUMBER` are for several servers with one store and
    need the extras `postgres` and `redis`; anything else is the path of a SQLite file.
    """
    scheme = str(location).partition("://")[0] if "://" in str(location) else ""
    try:
        if scheme in ("postgresql", "postgres"):
            from serve.stores.postgres.store import PostgresStore

            return PostgresStore(str(location))
        if scheme in ("redis", "rediss", "unix"):
            from serve.stores.redis.store import RedisStore

            return RedisStore(str(location))
    except ModuleNotFoundError as error:
        extra = "postgres" if scheme.startswith("postgres") else "redis"
        missing = f"{scheme}:// needs {error.name}, which is not installed"
        raise StoreError(f'{missing}: pip install "jaxrec[{extra}]"') from error
    if scheme:
        raise StoreError(f"expected a path, postgresql:// or redis://, came {scheme}://")
    from serve.stores.sqlite.store import SQLiteStore

    return SQLiteStore(Path(location))
