"""What an interaction is: the names of its columns, and what its values may be."""

USER = "user_id"
ITEM = "item_id"
RATING = "rating"
TIME = "timestamp"  # seconds since 1970-01-01T00:00Z
TITLE = "title"
GENRES = "genres"

NO_GENRES = "(no genres listed)"
MISSING = ("", "-", "na", "n/a", "<na>", "nan", "nat", "none", "null", "unknown")
"""Words that mean that there is no value, in small letters: of times, genres and features. A rating is missing where it
is empty; a title and an id may be any word."""
SECONDS_PER_DAY = 86_400
UNKNOWN_GAP = -1.0  # how "no earlier event" and "request time not known" are written, in seconds
MAX_ID_LENGTH = 512  # characters of a raw id; the server has the same limit


def is_missing(text: str) -> bool:
    """Whether a text means that there is no value, without regard to case and to spaces around it.

    Examples:
        >>> is_missing(" N/A "), is_missing("Unknown"), is_missing("0")
        (True, True, False)
    """
    return text.strip().lower() in MISSING
