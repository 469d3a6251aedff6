"""The catalogue's messages: decoding checks every field and raises InvalidRequest."""

from collections.abc import Mapping, Sequence

from serve.api.errors import InvalidRequest, Violations
from serve.api.pages import fitting_count, item_page_token
from serve.api.rules import (
    MAX_AVAILABILITY_TIME,
    MAX_ITEM_BYTES,
    MAX_ITEM_TAGS,
    MAX_METADATA_BYTES,
    MAX_TAG_LENGTH,
    MAX_TITLE_LENGTH,
    MAX_UPSERTED_ITEMS,
    check_id,
    check_length,
    check_time,
)
from serve.api.service import CatalogItem
from serve.model.live_catalog import Item
from serve.pb import recommender_pb2 as pb


def decode_items(request: pb.UpsertItemsRequest) -> list[Item]:
    """The items to store."""
    check_length("items", request.items, MAX_UPSERTED_ITEMS)
    places: dict[str, int] = {}
    items, found = list[Item](), Violations()
    for at, message in enumerate(request.items):
        first = len(found)
        item = _decode_item(message, found)
        place = places.setdefault(item.item_id, at)
        if place != at:
            found.add("item_id", "each id once", f"that of items[{place}]")
        found.put_within(f"items[{at}]", first)
        if message.ByteSize() > MAX_ITEM_BYTES:
            found.add(f"items[{at}]", f"an item of at most {MAX_ITEM_BYTES} bytes", message.ByteSize())
        if found.is_full:
            break
        items.append(item)
    found.raise_any()
    return items


def encode_item(entry: CatalogItem) -> pb.CatalogItem:
    """The message for an item."""
    item = entry.item
    message = pb.Item(
        item_id=item.item_id,
        title=item.title,
        tags=item.tags,
        available_from=item.available_from,
        available_until=item.available_until,
        hidden=item.hidden,
        metadata=item.metadata,
    )
    return pb.CatalogItem(item=message, stored=entry.stored, known=entry.known, available=entry.available)


def encode_items(entries: Sequence[CatalogItem], *, more: bool, model_version: str) -> pb.ListItemsResponse:
    """The message for a page of the catalogue, with as many of the entries as fit; `more`: others come after them."""
    messages = [encode_item(entry) for entry in entries]
    fitting = fitting_count(messages)
    more |= fitting < len(messages)
    next_page = item_page_token(entries[fitting - 1].item.item_id) if more else ""
    return pb.ListItemsResponse(items=messages[:fitting], model_version=model_version, next_page_token=next_page)


def _decode_item(message: pb.Item, found: Violations) -> Item:
    found.check(check_id, "item_id", message.item_id)
    found.check(_check_text, "title", message.title, 0, MAX_TITLE_LENGTH)
    found.check(_check_tags, message.tags)
    since, until = (
        getattr(message, name) if message.HasField(name) else None for name in ("available_from", "available_until")
    )
    if since is not None:
        found.check(check_time, "available_from", since, MAX_AVAILABILITY_TIME)
    if until is not None:
        found.check(check_time, "available_until", until, MAX_AVAILABILITY_TIME)
        if since is not None and until <= since:
            found.add("available_until", f"a time after available_from, which is {since}", until)
    metadata = dict(sorted(message.metadata.items()))
    found.check(_check_metadata, metadata)
    tags = tuple(sorted(set(message.tags)))
    return Item(message.item_id, message.title, tags, since, until, message.hidden, metadata)


def _check_tags(tags: Sequence[str]) -> None:
    check_length("tags", tags, MAX_ITEM_TAGS)
    found = Violations()
    for at, tag in enumerate(tags):
        found.check(_check_text, f"tags[{at}]", tag, 1, MAX_TAG_LENGTH)
        if tag != tag.strip(" "):
            found.add(f"tags[{at}]", "a tag without spaces around it", "one with spaces")
        if found.is_full:
            break
    found.raise_any()


def _check_text(field: str, value: str, least: int, most: int) -> None:
    if not least <= len(value) <= most:
        raise InvalidRequest(field, f"a text of {least} to {most} characters", f"{len(value)} characters")
    # PostgreSQL cannot store it.
    if "\0" in value:
        raise InvalidRequest(field, "a text without the character U+0000", "one with it")


def _check_metadata(metadata: Mapping[str, str]) -> None:
    found = Violations()
    size = sum(len(text.encode()) for entry in metadata.items() for text in entry)
    if size > MAX_METADATA_BYTES:
        found.add("metadata", f"at most {MAX_METADATA_BYTES} bytes of keys and values", size)
    if "" in metadata:
        found.add("metadata", "no empty key", "one")
    if any("\0" in text for entry in metadata.items() for text in entry):
        found.add("metadata", "texts without the character U+0000", "one with it")
    found.raise_any()
