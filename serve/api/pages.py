"""Pages of a list: a token says where the next one begins, and belongs to one user's list."""

import base64
import binascii
import hashlib
import struct

from serve.api.errors import InvalidRequest
from serve.api.rules import MAX_PAGE_SIZE

DEFAULT_PAGE_SIZE = 100
_PLACE = struct.Struct("<qq")
_CHECK_BYTES = 8


def checked_page_size(field: str, value: int) -> int:
    """A number of entries, with 0 as the default 100; raises InvalidRequest outside 0..1000."""
    if not 0 <= value <= MAX_PAGE_SIZE:
        raise InvalidRequest(field, f"1 to {MAX_PAGE_SIZE}, or 0 for {DEFAULT_PAGE_SIZE}", value)
    return value or DEFAULT_PAGE_SIZE


def page_token(user_id: str, timestamp: int, arrival: int) -> str:
    """What names the place after an event of a user, in letters and digits, `-` and `_`."""
    place = _PLACE.pack(timestamp, arrival)
    return base64.urlsafe_b64encode(place + _check(user_id, place)).decode()


def decode_page_token(field: str, token: str, user_id: str) -> tuple[int, int] | None:
    """Timestamp and arrival of the event before the page; None for "", the first page.

    Raises:
        InvalidRequest: The text is no token of this user's list. That tells mistakes apart, it is no secret.
    """
    if not token:
        return None
    try:
        decoded = base64.b64decode(token.encode("ascii"), altchars=b"-_", validate=True)
    except (UnicodeEncodeError, binascii.Error):
        decoded = b""
    place, check = decoded[: _PLACE.size], decoded[_PLACE.size :]
    if len(place) != _PLACE.size or check != _check(user_id, place):
        raise InvalidRequest(field, "next_page_token of an answer for this user", "another text")
    timestamp, arrival = _PLACE.unpack(place)
    return timestamp, arrival


def _check(user_id: str, place: bytes) -> bytes:
    return hashlib.blake2b(place + user_id.encode(), digest_size=_CHECK_BYTES).digest()
