"""Events, slates and items as rows of databases, and which slates are still to be written."""

import json
import secrets
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from serve.model.events import Event
from serve.model.live_catalog import NEVER, Item
from serve.stores.base import ShownItem, Slate, UserEvent, digest
from serve.stores.counters import Damaged


class Started(NamedTuple):
    """A slate to log, and the last deletion of a user that was known when its request began."""

    slate: Slate
    deletion: int


def still_wanted(started: Sequence[Started], deleted: Mapping[str, int]) -> list[Slate]:
    """Those whose request did not begin before its user was deleted.

    `deleted` has the numbers of deletions by digest.
    """
    if not deleted:
        return [slate for slate, _ in started]
    return [
        slate
        for slate, deletion in started
        if slate.user_id is None or deleted.get(digest(slate.user_id), deletion) <= deletion
    ]


def digests(started: Sequence[Started]) -> list[str]:
    """Of the users of the slates."""
    return sorted(digest(user_id) for user_id in {one.user_id for one, _ in started} if user_id is not None)


def new_mark() -> str:
    """The mark of a change of items; see `ItemCursor`."""
    return secrets.token_hex(8)


EVENT_COLUMNS = "event_id, user_id, item_id, rating, timestamp, weight, recommendation_id, type, value"


def event_row(new: UserEvent) -> tuple[str | int | float | None, ...]:
    """EVENT_COLUMNS."""
    return (new.event_id, new.user_id, *new.event, new.recommendation_id, new.type, new.value)


def event_of_row(row: Sequence[Any]) -> UserEvent:
    """The reverse of `event_row`."""
    return UserEvent(row[0], row[1], Event(*row[2:6]), *row[6:9])


def item_text(item: Item) -> str:
    """An item without its id, as stores keep it: JSON without what is as in an empty item."""
    empty = Item(item.item_id)
    fields = {name: value for name, value in item._asdict().items() if value != getattr(empty, name)}
    return json.dumps(fields, ensure_ascii=False)


DAMAGED_ITEM = "%s: the item %r cannot be decoded: it is hidden until it is stored again"


def item_of_text(item_id: str, text: str | bytes, damaged: Damaged) -> Item:
    """The reverse of `item_text`. Tags that many items have share their memory.

    Args:
        item_id: Its id.
        text: What a store has.
        damaged: Gets the id of an item that cannot be decoded, which is hidden then.
    """
    try:
        fields: dict[str, Any] = json.loads(text)
        _check(Item(item_id, **fields))
        fields["tags"] = tuple([sys.intern(tag) for tag in fields.get("tags", ())])
        return Item(item_id, **fields)
    except (AttributeError, RecursionError, TypeError, ValueError):
        damaged.log([item_id])
        return Item(item_id, hidden=True)


def _check(item: Item) -> None:
    """Raises AttributeError, TypeError or ValueError unless the fields of an item have their types, with tags in a
    list."""
    "".join([item.title, *item.tags, *item.metadata, *item.metadata.values()]).encode()
    times = [time for time in (item.available_from, item.available_until) if time is not None]
    if not isinstance(item.tags, list | tuple) or not isinstance(item.hidden, bool):
        raise TypeError
    if not all(type(time) is int and 0 <= time < NEVER for time in times):
        raise ValueError


SHOWN_ITEM_COLUMNS = ", ".join(ShownItem._fields)
SLATE_COLUMNS = (
    "recommendation_id, user_id, item_ids, log_propensities, policy, model_version, timestamp, temperature,"
    " request_time, excluded_item_ids, trend_time, trend_arrival, request_options"
)


# Not `json.dumps`, which makes an encoder at each call that has options.
_encode = json.JSONEncoder(ensure_ascii=False).encode


def _json(values: Sequence[object]) -> str:
    return _encode(values) if values else "[]"


def slate_row(one: Slate) -> tuple[str | int | float | None, ...]:
    """SLATE_COLUMNS as SQL databases have them: lists are JSON."""
    return (
        *(one.recommendation_id, one.user_id),
        *(_json(one.item_ids), _json(one.log_propensities)),
        *(one.policy, one.model_version, one.timestamp, one.temperature, one.request_time),
        *(_json(one.excluded_item_ids), one.trend_time, one.trend_arrival),
        _json(one.request_options),
    )


def slate_of_row(row: Sequence[Any]) -> Slate:
    """The reverse of `slate_row`."""
    items, log_propensities, excluded, options = (tuple(json.loads(row[at])) for at in (2, 3, 9, 12))
    return Slate._make((*row[:2], items, log_propensities, *row[4:9], excluded, *row[10:12], options))
