"""The rules that a request must keep. Each failure names the field, what was expected and what came."""

import math
import time
from collections.abc import Mapping, Sequence
from itertools import repeat

from serve.api.errors import MOST_VIOLATIONS, InvalidRequest, Violations
from serve.model.events import INTERACTION, RatingScale
from serve.serving.errors import LONGEST_SHOWN, shown
from serve.stores.base import MOST_EVENTS, MOST_MERGED, MOST_SLATES

DEFAULT_K = 10
# Each MAX_ is a field of `Limits` in the contract (LIMITS below) and a line of docs/serving.md.
MAX_K = 1_000
MAX_STORED_EVENTS = MOST_EVENTS
MAX_MERGED = MOST_MERGED
MAX_VIOLATIONS = MOST_VIOLATIONS
MAX_MESSAGE_BYTES = 8 * 2**20
"""A history of 10,000 events with ids of 36 characters takes 0.5 MB."""
MAX_SECONDS_AHEAD = 86_400
MAX_HISTORY_EVENTS = 10_000
MAX_EXCLUDED_ITEMS = 10_000
MAX_ALLOWED_ITEMS = 10_000
MAX_TAGS = 100
"""In each list of a filter."""
MAX_RECORDED_EVENTS = 1_000
MAX_IMPRESSIONS = 1_000
MAX_POSITION = 100_000
MAX_RECOMMENDATION_ID_LENGTH = 64
"""Of impressions: with the item an entry of PostgreSQL's index."""
MAX_DELETED_EVENTS = 1_000
MAX_UPSERTED_ITEMS = 1_000
MAX_TITLE_LENGTH = 1_000
MAX_ITEM_TAGS = 100
MAX_TAG_LENGTH = 100
MAX_METADATA_BYTES = 2_048
"""Of an item."""
MAX_ITEM_BYTES = 4_096
"""Of an item as a message. 1,000 items are within the 4 MiB that clients take by default."""
MAX_BATCH_METADATA = 1_000
"""Items of a batch that come with their metadata: as many as one answer has."""
MAX_BATCH_RULED = 1_000
"""Items of a batch that come by rules, or by an own re-ranker: as many as one answer has. To choose so many takes some
tenths of a second. A request that has more rankings than items counts by these."""
MAX_ANSWER_BYTES = 4 * 2**20
"""More is not taken by clients by default."""
MAX_AVAILABILITY_TIME = 253_402_300_799
"""The end of the year 9999."""
MAX_LISTED_TAGS = 10_000
"""In GetModelInfo."""
MAX_GENRE_PREFERENCES = 100
MAX_PAGE_SIZE = 1_000
MAX_PAGE_BYTES = 2 * 2**20
"""About so long is a page at most: clients take 4 MiB by default."""
MAX_NOT_SHOWN_S = 31 * 86_400
MAX_NOT_SHOWN_ANSWERS = MOST_SLATES
MAX_NOT_SHOWN_ITEMS = 10_000
MAX_BATCH = 256
MAX_BATCH_ITEMS = 10_000
MAX_BOOSTS = 100
MAX_PINS = 20
MAX_RULE_TAGS = 10
"""Different tags in the boosts and pins of a request: for each the model ranks its items."""
MAX_BATCH_EVENTS = 100_000
# Characters; `jaxrec prepare` has the same limit. As UTF-8 at most 2,048 bytes: an entry of PostgreSQL's indexes of ids
# (a user with time and arrival, or with a model's version) must stay below 2,704. SQLite and Redis have no such limit.
MAX_ID_LENGTH = 512
FIRST_OF_FINER_UNITS_S = 100_000_000
"""March 1973: a number that as milliseconds is before it is rather a time in seconds that is out of range."""
FINER_UNITS = {"milliseconds": 10**3, "microseconds": 10**6, "nanoseconds": 10**9}
LIMITS = {name.lower(): value for name, value in list(globals().items()) if name.startswith("MAX_")}
"""By the names of `Limits`."""


def check_id(field: str, value: str, most: int = MAX_ID_LENGTH) -> None:
    """Raises InvalidRequest unless a raw id has 1 to `most` characters, without U+0000 and spaces around it."""
    if not 1 <= len(value) <= most:
        raise InvalidRequest(field, f"an id of 1 to {most} characters", f"{len(value)} characters")
    # PostgreSQL cannot store it.
    if "\0" in value:
        raise InvalidRequest(field, "an id without the character U+0000", "one with it")
    if value != value.strip(" "):
        raise InvalidRequest(field, "an id without spaces around it", "one with spaces")


def check_ids(field: str, ids: Sequence[str]) -> None:
    """Raises InvalidRequest unless `check_id` accepts each id of a list."""
    # All at once first, without a step of Python's for each: a batch can have millions of ids.
    lengths = set(map(len, ids))
    is_long = bool(lengths) and not 1 <= min(lengths) <= max(lengths) <= MAX_ID_LENGTH
    if not is_long and "\0" not in "".join(ids) and list(map(str.strip, ids, repeat(" "))) == list(ids):
        return
    found = Violations()
    for at, one in enumerate(ids):
        found.check(check_id, f"{field}[{at}]", one)
        if found.is_full:
            break
    found.raise_any()


def latest_time() -> int:
    """The latest time that is valid now: a day after the server's clock, in seconds."""
    return int(time.time()) + MAX_SECONDS_AHEAD


def check_time(field: str, value: int, latest: int) -> None:
    """Raises InvalidRequest unless a time is in 0..`latest`: `latest_time`, once for all times of a request, or for the
    availability of items MAX_AVAILABILITY_TIME."""
    if not 0 <= value <= latest:
        came = str(value)
        for unit, per_second in FINER_UNITS.items():
            if FIRST_OF_FINER_UNITS_S <= value // per_second <= latest:
                came = f"{value}, which looks like {unit}"
        ends = "the end of the year 9999" if latest == MAX_AVAILABILITY_TIME else "a day from now"
        raise InvalidRequest(field, f"seconds since 1970-01-01T00:00Z in 0..{latest} ({ends})", came)


def check_event_time(field: str, value: int, latest: int) -> None:
    """Raises InvalidRequest unless the time of an event is there and `check_time` accepts it.

    A message without the field reads as 0, so that the first second of 1970 is no time of an event.
    """
    if 0 < value <= latest:
        return
    if value == 0:
        raise InvalidRequest(field, "the event's time in seconds since 1970-01-01T00:00Z", "none")
    check_time(field, value, latest)


def check_rating(field: str, value: float, scale: RatingScale | None) -> None:
    """Raises InvalidRequest unless a rating is finite and on the scale."""
    if scale is None:
        if not math.isfinite(value):
            raise InvalidRequest(field, "a finite number", f"{value:g}")
    elif not scale.contains(value):
        raise InvalidRequest(field, f"a rating in {scale.minimum:g}..{scale.maximum:g}", f"{value:g}")


def checked_weight(field: str, name: str, event_types: Mapping[str, float]) -> float:
    """The weight of a type of events, with "" as the default; raises InvalidRequest for one that is not known."""
    weight = event_types.get(name or INTERACTION)
    if weight is None:
        names = ", ".join(sorted(event_types))
        known = names if len(names) <= LONGEST_SHOWN else f"{names[:LONGEST_SHOWN]}..."
        raise InvalidRequest(field, f"one of {known}", shown(name))
    return weight


def check_length(field: str, values: Sequence[object], most: int) -> None:
    """Raises InvalidRequest unless a list has at most `most` entries."""
    if len(values) > most:
        raise InvalidRequest(field, f"at most {most} entries", len(values))


def checked_ids(field: str, ids: Sequence[str], most: int) -> list[str]:
    """The ids of things to delete, each once; raises InvalidRequest unless they are 1 to `most` valid ones."""
    check_length(field, ids, most)
    if not ids:
        raise InvalidRequest(field, "at least one id", "none")
    check_ids(field, ids)
    return list(dict.fromkeys(ids))


def checked_count(field: str, value: int) -> int:
    """A number of answers, with 0 as the default 10; raises InvalidRequest outside 0..1000."""
    if not 0 <= value <= MAX_K:
        raise InvalidRequest(field, f"1 to {MAX_K}, or 0 for {DEFAULT_K}", value)
    return value or DEFAULT_K
