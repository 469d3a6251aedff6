"""The range of possible ratings: told, or recognized by the ratings that occur."""

import duckdb
import numpy as np

from jaxrec.config import RatingScale
from jaxrec.errors import DataError

# From narrow to wide. Where all ratings are whole and at least 1, the scale begins at 1.
SCALES = (RatingScale(0.5, 5), RatingScale(0, 5), RatingScale(0.5, 10), RatingScale(0, 10), RatingScale(0, 100))
FEW = 3  # ratings outside of a scale that are errors, whatever their share
FEW_SHARE = 0.01
MANY_ZEROS = 0.1  # share of ratings from which 0 is perhaps no rating


def in_scale(column: str, scale: RatingScale) -> str:
    """SQL: the rating is on the scale, or there is none."""
    return f"coalesce({column} BETWEEN {scale.minimum!r}::FLOAT AND {scale.maximum!r}::FLOAT, true)"


def count_ratings(connection: duckdb.DuckDBPyConnection, table: str) -> np.ndarray:
    """Counts of a table's ratings, by which `choose_scale` decides; those of the parts of a log can be added.

    Returns:
        [3 + 2 scales] float64: ratings, zeros, ratings unlike the least one, and for each of SCALES those outside of
        it, and those inside that are not whole or below 1.
    """
    unlike = "count(*) FILTER (rating > least)"
    pairs = [
        f"count(*) FILTER (NOT {in_scale('rating', scale)}), "
        f"count(*) FILTER ({in_scale('rating', scale)} AND (rating <> round(rating) OR rating < 1))"
        for scale in SCALES
    ]
    query = f"SELECT count(rating), count(*) FILTER (rating = 0), {unlike}, {', '.join(pairs)} FROM {table}"
    found = connection.execute(f"{query}, (SELECT min(rating) AS least FROM {table})").fetchall()[0]
    return np.array(found, np.float64)


def choose_scale(counts: np.ndarray, name: str) -> RatingScale | None:
    """The narrowest scale that all ratings fit but for a few, which are errors.

    Args:
        counts: Those of `count_ratings`.
        name: What messages call the log.

    Returns:
        The scale; None where there are no ratings.

    Raises:
        DataError: Where too many ratings lie outside of every known scale.
    """
    rated = counts[0]
    if not rated:
        return None
    for scale, (outside, fractions) in zip(SCALES, counts[3:].reshape(-1, 2), strict=True):
        if outside <= max(FEW, FEW_SHARE * rated) and 2 * outside < rated:
            return scale if fractions else RatingScale(1, scale.maximum)
    known = ", ".join(map(str, SCALES))
    raise DataError(
        f"{name}: the ratings fit none of the known scales ({known}); give --rating-scale LOWEST HIGHEST, or"
        " --missing-rating VALUE for a value that marks a missing rating, or --rating-col none to read no ratings"
    )


def rating_notes(counts: np.ndarray, scale: RatingScale | None, missing: bool) -> list[str]:
    """What is odd about the ratings, each in one sentence that says what to do. `missing`: a marker was told."""
    notes = []
    rated, zeros, unlike, *_ = counts
    if rated > 1 and not unlike:
        notes.append(
            "every rating is the same, so ratings say nothing; if the column is none of ratings, give --rating-col none"
        )
    elif scale is not None and scale.minimum == 0 and zeros >= MANY_ZEROS * rated and not missing:
        notes.append(
            f"{zeros / rated:.0%} of the ratings are 0; if 0 means that there is no rating, give --missing-rating 0"
        )
    return notes
