"""The catalogue's messages: decoding checks every field and raises InvalidRequest."""

from collections.abc import Mapping, Sequence

from serve.api.errors import InvalidRequest
from serve.api.pages import item_page_token
from serve.api.rules import (
    LATEST_TIME,
    MAX_ITEM_BYTES,
    MAX_ITEM_TAGS,
    MAX_METADATA_BYTES,
    MAX_TAG_LENGTH,
    MAX_TITLE_LENGTH,
    MAX_UPSERTED_ITEMS,
    check_id,
    check_length,
)
from serve.api.service import CatalogItem
from serve.model.live_catalog import Item
from serve.pb import recommender_pb2 as pb

MOST_BYTES = 2 * 2**20
"""About so long is a page at most: clients take 4 MB by default."""


def decode_items(request: pb.UpsertItemsRequest) -> list[Item]:
    """The items to store."""
    check_length("items", request.items, MAX_UPSERTED_ITEMS)
    places: dict[str, int] = {}
    items = []
    for at, message in enumerate(request.items):
        try:
            item = _decode_item(message)
            first = places.setdefault(item.item_id, at)
            if first != at:
                raise InvalidRequest("item_id", "each id once", f"that of items[{first}]")
        except InvalidRequest as error:
            raise error.within(f"items[{at}]") from error
        if message.ByteSize() > MAX_ITEM_BYTES:
            raise InvalidRequest(f"items[{at}]", f"an item of at most {MAX_ITEM_BYTES} bytes", message.ByteSize())
        items.append(item)
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
    response, size = pb.ListItemsResponse(model_version=model_version), 0
    for entry in entries:
        message = encode_item(entry)
        size += message.ByteSize()
        if size > MOST_BYTES and response.items:
            more = True
            break
        response.items.append(message)
    if more:
        response.next_page_token = item_page_token(response.items[-1].item.item_id)
    return response


def _decode_item(message: pb.Item) -> Item:
    check_id("item_id", message.item_id)
    _check_text("title", message.title, 0, MAX_TITLE_LENGTH)
    check_length("tags", message.tags, MAX_ITEM_TAGS)
    for at, tag in enumerate(message.tags):
        _check_text(f"tags[{at}]", tag, 1, MAX_TAG_LENGTH)
        if tag != tag.strip(" "):
            raise InvalidRequest(f"tags[{at}]", "a tag without spaces around it", "one with spaces")
    since, until = (
        _decode_time(name, getattr(message, name)) if message.HasField(name) else None
        for name in ("available_from", "available_until")
    )
    if since is not None and until is not None and until <= since:
        raise InvalidRequest("available_until", f"a time after available_from, which is {since}", until)
    metadata = dict(sorted(message.metadata.items()))
    _check_metadata(metadata)
    tags = tuple(sorted(set(message.tags)))
    return Item(message.item_id, message.title, tags, since, until, message.hidden, metadata)


def _decode_time(field: str, value: int) -> int:
    if not 0 <= value <= LATEST_TIME:
        raise InvalidRequest(field, f"seconds since 1970-01-01T00:00Z in 0..{LATEST_TIME}", value)
    return value


def _check_text(field: str, value: str, least: int, most: int) -> None:
    if not least <= len(value) <= most:
        raise InvalidRequest(field, f"a text of {least} to {most} characters", f"{len(value)} characters")
    # PostgreSQL cannot store it.
    if "\0" in value:
        raise InvalidRequest(field, "a text without the character U+0000", "one with it")


def _check_metadata(metadata: Mapping[str, str]) -> None:
    size = sum(len(text.encode()) for entry in metadata.items() for text in entry)
    if size > MAX_METADATA_BYTES:
        raise InvalidRequest("metadata", f"at most {MAX_METADATA_BYTES} bytes of keys and values", size)
    for key, value in metadata.items():
        if not key:
            raise InvalidRequest("metadata", "no empty key", "one")
        if "\0" in key or "\0" in value:
            raise InvalidRequest("metadata", "texts without the character U+0000", "one with it")
