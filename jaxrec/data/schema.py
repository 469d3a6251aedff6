"""What an interaction is: the names of its columns, and what its values may be."""

USER = "user_id"
ITEM = "item_id"
RATING = "rating"
TIME = "timestamp"  # seconds since 1970-01-01T00:00Z
TITLE = "title"
GENRES = "genres"

NO_GENRES = "(no genres listed)"
SECONDS_PER_DAY = 86_400
UNKNOWN_GAP = -1.0  # how "no earlier event" and "request time not known" are written, in seconds
MAX_ID_LENGTH = 512  # characters of a raw id; the server has the same limit
