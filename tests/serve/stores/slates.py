"""Slates in a store, as tests write and read them."""

from serve.stores.base import EventStore, Slate


def log_now(store: EventStore, slate: Slate, *, started: float | None = None) -> None:
    """Logs a slate; it is on disk on return."""
    store.log_slate(slate, started=started)
    store.flush()


def slates_of(store: EventStore, user_id: str | None) -> list[Slate]:
    """Those of a user, or (None) of histories that came with their requests, oldest first."""
    return [one for part in store.all_slates() for one in part if one.user_id == user_id]
