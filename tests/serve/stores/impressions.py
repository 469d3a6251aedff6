"""Impressions in a store, as tests write and read them."""

from serve.stores.base import EventStore, Impression


def log_now(store: EventStore, impression: Impression, *, started: float | None = None) -> None:
    """Logs an impression; it is on disk on return."""
    store.log_impression(impression, started=started)
    store.flush()


def impressions_of(store: EventStore, user_id: str | None) -> list[Impression]:
    """Those of a user, or (None) of histories that came with their requests, oldest first."""
    return [one for part in store.all_impressions() for one in part if one.user_id == user_id]
