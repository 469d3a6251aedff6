"""The rules that a request must keep. Each failure names the field, what was expected and what came."""

import math
from collections.abc import Sequence

from serve.api.errors import InvalidRequest
from serve.model.events import RatingScale

DEFAULT_K = 10
MAX_K = 1_000
MAX_HISTORY_EVENTS = 10_000
MAX_EXCLUDED_ITEMS = 10_000
MAX_RECORDED_EVENTS = 1_000
MAX_BATCH = 256
MAX_BATCH_ITEMS = 10_000
MAX_BATCH_EVENTS = 100_000
MAX_ID_LENGTH = 256


def check_id(field: str, value: str) -> None:
    """Raises InvalidRequest unless a raw id has 1 to 256 characters, none of them U+0000."""
    if not 1 <= len(value) <= MAX_ID_LENGTH:
        raise InvalidRequest(field, f"an id of 1 to {MAX_ID_LENGTH} characters", f"{len(value)} characters")
    # PostgreSQL cannot store it.
    if "\0" in value:
        raise InvalidRequest(field, "an id without the character U+0000", "one with it")


def check_time(field: str, value: int) -> None:
    """Raises InvalidRequest unless a time is in 0..2**63 - 1."""
    if not 0 <= value < 2**63:
        raise InvalidRequest(field, "seconds since 1970-01-01T00:00Z, not negative and below 2**63", value)


def check_rating(field: str, value: float, scale: RatingScale | None) -> None:
    """Raises InvalidRequest unless a rating is finite and on the scale."""
    if scale is None:
        if not math.isfinite(value):
            raise InvalidRequest(field, "a finite number", f"{value:g}")
    elif not scale.contains(value):
        raise InvalidRequest(field, f"a rating in {scale.minimum:g}..{scale.maximum:g}", f"{value:g}")


def check_length(field: str, values: Sequence[object], most: int) -> None:
    """Raises InvalidRequest unless a list has at most `most` entries."""
    if len(values) > most:
        raise InvalidRequest(field, f"at most {most} entries", len(values))


def checked_count(field: str, value: int) -> int:
    """A number of answers, with 0 as the default 10; raises InvalidRequest outside 0..1000."""
    if not 0 <= value <= MAX_K:
        raise InvalidRequest(field, f"1 to {MAX_K}, or 0 for {DEFAULT_K}", value)
    return value or DEFAULT_K
