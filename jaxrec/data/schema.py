"""What an interaction is: column names, the rating scale, and how missing values are written."""

import dataclasses
import math

import numpy as np

from jaxrec.errors import DataError

USER = "user_id"
ITEM = "item_id"
RATING = "rating"
TIME = "timestamp"  # seconds since 1970-01-01T00:00Z
TITLE = "title"
GENRES = "genres"

NO_GENRES = "(no genres listed)"
MISSING_RATING = -1.0  # how "no rating" is written once ratings are scaled to 0..1
SECONDS_PER_DAY = 86_400
UNKNOWN_GAP = -1.0  # how "no earlier event" and "request time not known" are written, in seconds


@dataclasses.dataclass(frozen=True)
class RatingScale:
    """The range of possible ratings, not of those that occur."""

    minimum: float
    maximum: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.minimum) and math.isfinite(self.maximum) and self.minimum < self.maximum):
            raise DataError(f"rating scale {self}: expected two finite numbers, the minimum below the maximum")

    def __str__(self) -> str:
        return f"{self.minimum:g}..{self.maximum:g}"

    def to_unit(self, ratings: np.ndarray) -> np.ndarray:
        """Scales raw ratings to 0..1 (float32); NaN becomes MISSING_RATING.

        >>> RatingScale(1, 5).to_unit(np.array([1.0, 4.0, np.nan])).tolist()
        [0.0, 0.75, -1.0]
        """
        unit = (ratings - self.minimum) / (self.maximum - self.minimum)
        return np.where(np.isnan(ratings), MISSING_RATING, unit).astype(np.float32)


WIDEST_SCALE = RatingScale(0.5, 5.0)


def infer_rating_scale(ratings: np.ndarray) -> RatingScale | None:
    """MovieLens' two scales: 1..5 where every rating is whole and at least 1, else 0.5..5.

    Args:
        ratings: [events] float, NaN where there is none. The least, and one that is not whole, are enough to decide.

    Returns:
        The scale; None where there are no ratings. Ratings outside of 0.5..5 are errors, which decide nothing.

    >>> str(infer_rating_scale(np.array([1.0, 4.0, np.nan]))), str(infer_rating_scale(np.array([1.0, 3.5])))
    ('1..5', '0.5..5')
    """
    present = ratings[~np.isnan(ratings)]
    if not present.size:
        return None
    possible = present[(present >= WIDEST_SCALE.minimum) & (present <= WIDEST_SCALE.maximum)]
    whole = possible.size > 0 and bool(np.all(possible == np.round(possible)) and possible.min() >= 1)
    return RatingScale(1.0, 5.0) if whole else WIDEST_SCALE
