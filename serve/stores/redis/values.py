"""Events, slates and counters as `serve.stores.redis` writes them: lists' entries and texts of hashes."""

import json
from collections.abc import Sequence
from typing import Any

from serve.model.events import INTERACTION, Event
from serve.stores.base import ShownItem, Slate, UserEvent, digest
from serve.stores.counters import EXPECTED, Counter, are_counts, with_hour
from serve.stores.rows import Started


def counter_of(item_id: str, text: bytes) -> Counter:
    """A value of `trend`: the reference and the counts.

    Raises:
        ValueError: The text is not a time and finite numbers from 0 on.
    """
    try:
        reference, *counts = map(float, text.split())
        counter = Counter(int(reference), with_hour(counts))
    except (OverflowError, ValueError):
        counter = None
    if counter is None or not are_counts(counter.counts):
        raise ValueError(
            f"jaxrec:trend, counter of the item {item_id!r}: expected a time and {EXPECTED}, came {text!r}"
        )
    return counter


def slate_arguments(one: Started) -> list[Any]:
    """Those of the script LOG_SLATE."""
    slate = one.slate
    user = "" if slate.user_id is None else digest(slate.user_id)
    key = "jaxrec:shown" if slate.user_id is None else f"jaxrec:shown:{slate.user_id}"
    return [key, slate.recommendation_id, json.dumps(slate), one.deletion, user]


def slate_of(value: bytes, user_id: str | None) -> Slate:
    """A slate of a user's list. Its own user may have become this one (`EventStore.merge_users`).

    Older servers than those of version 3 wrote the first seven fields alone, those of version 3 the first ten, those
    of version 4 the first twelve."""
    row: list[Any] = [tuple(column) if isinstance(column, list) else column for column in json.loads(value)]
    return Slate(*row)._replace(user_id=user_id)


SHOWN_ITEMS = "jaxrec:shown_items"
"""The key of the items that were shown of a recommendation, without `:` and its id."""


def shown_item_arguments(one: ShownItem) -> tuple[str, str, str]:
    """Those of the script RECORD_SHOWN."""
    return f"{SHOWN_ITEMS}:{one.recommendation_id}", one.item_id, json.dumps(one[2:])


def shown_item(key: bytes, field: bytes, value: bytes) -> ShownItem:
    """An entry of a hash of items that were shown."""
    return ShownItem(key.decode().removeprefix(f"{SHOWN_ITEMS}:"), field.decode(), *json.loads(value))


def event_value(new: UserEvent) -> str:
    """An event, without its user and its revision. Most have no type, weight and value of their own."""
    value: list[Any] = [new.event_id, *new.event[:3]]
    if (new.type, new.event.weight, new.value) != (INTERACTION, 1.0, None):
        value += [new.recommendation_id, new.type, new.event.weight, new.value]
    elif new.recommendation_id is not None:
        value.append(new.recommendation_id)
    return json.dumps(value, ensure_ascii=False)


def user_event(user_id: str, value: bytes) -> tuple[int, UserEvent]:
    """An event with its revision."""
    revision, _, text = value.partition(b" ")
    event_id, item_id, rating, timestamp, named, kind, weight, number = _padded(text)
    return int(revision), UserEvent(event_id, user_id, Event(item_id, rating, timestamp, weight), named, kind, number)


def revision_of(value: bytes) -> int:
    """The revision of an event of a user's list."""
    return int(value.partition(b" ")[0])


def place(event: tuple[int, UserEvent]) -> tuple[int, int]:
    """Of an event with its revision among a user's events: by time, then by revision."""
    return event[1].event.timestamp, event[0]


def _padded(text: bytes) -> list[Any]:
    """Event id, item, rating, timestamp, recommendation id, type, weight and value of an event."""
    columns: list[Any] = json.loads(text)
    return columns + _PADDING[len(columns) - 4 :]


_PADDING: list[Any] = [None, INTERACTION, 1.0, None]


def decoded(values: Sequence[bytes], since: int, until: int | None = None) -> list[Event]:
    """The events, of some of a user's list, whose revision is in `since` + 1..`until`, by (timestamp, arrival)."""
    events: list[tuple[int, int, Event]] = []
    for value in values:
        revision, _, text = value.partition(b" ")
        if since < int(revision) and (until is None or int(revision) <= until):
            _, item_id, rating, timestamp, _, _, weight, _ = _padded(text)
            events.append((timestamp, int(revision), Event(item_id, rating, timestamp, weight)))
    events.sort(key=lambda event: event[:2])
    return [event for _, _, event in events]
