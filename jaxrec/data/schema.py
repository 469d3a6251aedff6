"""What an interaction is: column names, the rating scale, and the error for data that breaks the rules."""

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
        """Scales raw ratings to 0..1 (float32); NaN becomes MISSING_RATING. On 1..5, 4.0 becomes 0.75."""
        unit = (ratings - self.minimum) / (self.maximum - self.minimum)
        return np.where(np.isnan(ratings), MISSING_RATING, unit).astype(np.float32)


def infer_rating_scale(ratings: np.ndarray) -> RatingScale | None:
    """MovieLens' two scales: 1..5 where every rating is whole and at least 1, else 0.5..5; None without ratings."""
    present = ratings[~np.isnan(ratings)]
    if not present.size:
        return None
    present = present[(present >= 0.5) & (present <= 5)]  # others are errors, which decide nothing
    return scale_of(float(present.min()) if present.size else None, bool(np.all(present == np.round(present))))


def scale_of(minimum: float | None, whole: bool) -> RatingScale:
    """The scale of ratings within 0.5..5, by the lowest (None: there is none) and by whether all are whole."""
    return RatingScale(1.0, 5.0) if minimum is not None and minimum >= 1 and whole else RatingScale(0.5, 5.0)
