"""What an interaction is: column names, and the rating scale that a log seems to have."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jaxrec.config import RatingScale

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
WIDEST_SCALE = RatingScale(0.5, 5.0)


def infer_rating_scale(ratings: np.ndarray) -> RatingScale | None:
    """MovieLens' two scales: 1..5 where every rating is whole and at least 1, else 0.5..5.

    Args:
        ratings: [events] float, NaN where there is none. The least, and one that is not whole, are enough to decide.

    Returns:
        The scale; None where there are no ratings. Ratings outside of 0.5..5 are errors, which decide nothing.

    Examples:
        >>> import numpy as np
        >>> str(infer_rating_scale(np.array([1.0, 4.0, np.nan]))), str(infer_rating_scale(np.array([1.0, 3.5])))
        ('1..5', '0.5..5')
    """
    import numpy as np  # here, so that the command line can read this module's names without it

    present = ratings[~np.isnan(ratings)]
    if not present.size:
        return None
    possible = present[(present >= WIDEST_SCALE.minimum) & (present <= WIDEST_SCALE.maximum)]
    whole = possible.size > 0 and bool(np.all(possible == np.round(possible)) and possible.min() >= 1)
    return RatingScale(1.0, 5.0) if whole else WIDEST_SCALE
