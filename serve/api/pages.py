"""Pages of a list: a token says where the next one begins, and belongs to one list, as that of a user's events."""

import base64
import binascii
import hashlib
import struct
from collections.abc import Sequence

from google.protobuf.message import Message

from serve.api.errors import InvalidRequest
from serve.api.rules import MAX_PAGE_BYTES, MAX_PAGE_SIZE

DEFAULT_PAGE_SIZE = 100
_PLACE = struct.Struct("<qq")
_CHECK_BYTES = 8
_CATALOGUE = "\0catalogue"  # no user's id
_MODELS = "\0models"


def checked_page_size(field: str, value: int) -> int:
    """A number of entries, with 0 as the default 100; raises InvalidRequest outside 0..1000."""
    if not 0 <= value <= MAX_PAGE_SIZE:
        raise InvalidRequest(field, f"1 to {MAX_PAGE_SIZE}, or 0 for {DEFAULT_PAGE_SIZE}", value)
    return value or DEFAULT_PAGE_SIZE


def fitting_count(messages: Sequence[Message]) -> int:
    """How many of the first messages a page has: at least one, unless there is none."""
    size = 0
    for at, message in enumerate(messages):
        size += message.ByteSize()
        if at and size > MAX_PAGE_BYTES:
            return at
    return len(messages)


def page_token(user_id: str, timestamp: int, arrival: int) -> str:
    """What names the place after an event of a user, in letters and digits, `-` and `_`."""
    return _token(user_id, _PLACE.pack(timestamp, arrival))


def decode_page_token(field: str, token: str, user_id: str) -> tuple[int, int] | None:
    """Timestamp and arrival of the event before the page; None for "", the first page.

    Raises:
        InvalidRequest: The text is no token of this user's list. That tells mistakes apart, it is no secret.
    """
    if not token:
        return None
    place = _place(token, user_id)
    if place is None or len(place) != _PLACE.size:
        raise InvalidRequest(field, "next_page_token of an answer for this user", "another text")
    timestamp, arrival = _PLACE.unpack(place)
    return timestamp, arrival


def item_page_token(item_id: str) -> str:
    """What names the place after an item of the catalogue, in the same characters."""
    return _token(_CATALOGUE, item_id.encode())


def decode_item_page_token(field: str, token: str) -> str:
    """The id of the item before the page; "" for "", the first page.

    Raises:
        InvalidRequest: The text is no token of the catalogue.
    """
    try:
        place = _place(token, _CATALOGUE) if token else b""
        item_id = None if place is None else place.decode()
    except UnicodeDecodeError:
        item_id = None
    if item_id is None or "\0" in item_id:
        raise InvalidRequest(field, "next_page_token of an answer", "another text")
    return item_id


def model_page_token(model_version: str, folder: str) -> str:
    """What names the place after a model version, in the same characters."""
    return _token(_MODELS, f"{model_version}\0{folder}".encode("utf-8", "surrogateescape"))


def decode_model_page_token(field: str, token: str) -> tuple[str, str] | None:
    """Version and folder before the page; None for "", the first page.

    Raises:
        InvalidRequest: The text is no token of the models.
    """
    if not token:
        return None
    place = _place(token, _MODELS)
    version, separator, folder = (place or b"").decode("utf-8", "surrogateescape").rpartition("\0")
    if not separator:
        raise InvalidRequest(field, "next_page_token of an answer", "another text")
    return version, folder


def _token(name: str, place: bytes) -> str:
    return base64.urlsafe_b64encode(place + _check(name, place)).decode()


def _place(token: str, name: str) -> bytes | None:
    """Of a token of this list; None: it is none."""
    try:
        decoded = base64.b64decode(token.encode("ascii"), altchars=b"-_", validate=True)
    except (UnicodeEncodeError, binascii.Error):
        return None
    place, check = decoded[:-_CHECK_BYTES], decoded[-_CHECK_BYTES:]
    return place if check == _check(name, place) else None


def _check(name: str, place: bytes) -> bytes:
    return hashlib.blake2b(place + name.encode(), digest_size=_CHECK_BYTES).digest()
