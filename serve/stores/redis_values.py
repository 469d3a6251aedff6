"""Events, impressions and counters as `serve.stores.redis` writes them: lists' entries and texts of hashes."""

import json
from collections.abc import Sequence
from typing import Any

from serve.model.events import Event
from serve.stores.base import Impression, UserEvent, digest
from serve.stores.counters import EXPECTED, Counter, are_counts
from serve.stores.rows import Started


def counter_of(item_id: str, text: bytes) -> Counter:
    """A value of `trend`: the reference and the counts.

    Raises:
        ValueError: The text is not a time and finite numbers from 0 on.
    """
    try:
        reference, *counts = map(float, text.split())
        counter = Counter(int(reference), counts)
    except (OverflowError, ValueError):
        counter = None
    if counter is None or not are_counts(counter.counts):
        raise ValueError(
            f"jaxrec:trend, counter of the item {item_id!r}: expected a time and {EXPECTED}, came {text!r}"
        )
    return counter


def impression_arguments(one: Started, now: float) -> list[Any]:
    """Those of the script LOG_IMPRESSION; `now` is the server's time."""
    impression = one.impression
    user = "" if impression.user_id is None else digest(impression.user_id)
    key = "jaxrec:shown" if impression.user_id is None else f"jaxrec:shown:{impression.user_id}"
    return [key, impression.recommendation_id, json.dumps(impression), one.by(now), user]


def impression_of(value: bytes) -> Impression:
    """Older servers than those of version 3 wrote the first seven fields alone, those of version 3 the first ten, those
    of version 4 the first twelve."""
    row: list[Any] = [tuple(column) if isinstance(column, list) else column for column in json.loads(value)]
    return Impression(*row)


def user_event(user_id: str, value: bytes) -> tuple[int, UserEvent]:
    """An event with its revision."""
    revision, _, text = value.partition(b" ")
    event_id, item_id, rating, timestamp, *rest = json.loads(text)
    return int(revision), UserEvent(event_id, user_id, Event(item_id, rating, timestamp), rest[0] if rest else None)


def decoded(values: Sequence[bytes], since: int, until: int | None = None) -> list[Event]:
    """The events of a user's list whose revision is in `since` + 1..`until`, by (timestamp, arrival)."""
    events = []
    for value in values:
        revision, _, text = value.partition(b" ")
        if since < int(revision) and (until is None or int(revision) <= until):
            _, item_id, rating, timestamp, *_ = json.loads(text)
            events.append(Event(item_id, rating, timestamp))
    # The list is in the order of arrival, and sorting keeps it.
    return sorted(events, key=lambda event: event.timestamp)
