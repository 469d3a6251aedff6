"""What an interaction is: column names, and the rating scale that a log seems to have."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jaxrec.config import MISSING_RATING, RatingScale  # noqa: F401 - other modules read the former here

if TYPE_CHECKING:
    import numpy as np

USER = "user_id"
ITEM = "item_id"
RATING = "rating"
TIME = "timestamp"  # seconds since 1970-01-01T00:00Z
TITLE = "title"
GENRES = "genres"

NO_GENRES = "(no genres listed)"
SECONDS_PER_DAY = 86_400
UNKNOWN_GAP = -1.0  # how "no earlier event" and "request time not known" are written, in seconds


def infer_rating_scale(ratings: np.ndarray) -> RatingScale | None:
    """MovieLens' two scales: 1..5 where every rating is whole and at least 1, else 0.5..5; None without ratings."""
    import numpy as np  # here, so that the command line can read this module's names without it

    present = ratings[~np.isnan(ratings)]
    if not present.size:
        return None
    present = present[(present >= 0.5) & (present <= 5)]  # others are errors, which decide nothing
    return scale_of(float(present.min()) if present.size else None, bool(np.all(present == np.round(present))))


def scale_of(minimum: float | None, whole: bool) -> RatingScale:
    """The scale of ratings within 0.5..5, by the lowest (None: there is none) and by whether all are whole."""
    return RatingScale(1.0, 5.0) if minimum is not None and minimum >= 1 and whole else RatingScale(0.5, 5.0)
