"""The range of possible ratings, recognized by the ratings that occur."""

import duckdb
import numpy as np

from jaxrec.config import RatingScale
from jaxrec.errors import DataError

# From narrow to wide. Where all ratings are whole and at least 1, the scale begins at 1.
SCALES = (
    RatingScale(0, 1),
    RatingScale(0.5, 5),
    RatingScale(0, 5),
    RatingScale(0.5, 10),
    RatingScale(0, 10),
    RatingScale(0, 100),
)
FEW = 3  # ratings outside of a scale that are errors, whatever their share
FEW_SHARE = 0.01
MANY_ZEROS = 0.1  # share of ratings from which 0 is perhaps no rating


def in_scale(column: str, scale: RatingScale) -> str:
    """SQL: the rating is on the scale, or there is none."""
    return f"coalesce({column} BETWEEN {scale.minimum!r}::FLOAT AND {scale.maximum!r}::FLOAT, true)"


def count_ratings(connection: duckdb.DuckDBPyConnection, table: str) -> np.ndarray:
    """[values, 2] float64: each value that a table's ratings have, and how many have it."""
    query = f"SELECT rating, count(*) FROM {table} WHERE rating IS NOT NULL GROUP BY rating"
    columns = connection.execute(query).fetchnumpy().values()
    return np.stack([np.ma.getdata(column).astype(np.float64) for column in columns], axis=1)


def choose_scale(ratings: np.ndarray, name: str) -> RatingScale | None:
    """The narrowest scale that all ratings fit but for a few, which are errors.

    Args:
        ratings: [values, 2] as of `count_ratings`; a value may occur more than once.
        name: What messages call the log.

    Returns:
        The scale; None where there are no ratings.

    Raises:
        DataError: Where too many ratings lie outside of every known scale.

    Examples:
        >>> str(choose_scale(np.array([[1.0, 7], [4.0, 9]]), "log")), str(choose_scale(np.array([[3.5, 2.0]]), "log"))
        ('1..5', '0.5..5')
        >>> str(choose_scale(np.array([[0.0, 60], [8.0, 40]]), "log"))
        '0..10'
    """
    values, counts = ratings.T
    rated = counts.sum()
    if not rated:
        return None
    for scale in SCALES:
        if scale.maximum == 1 and (values == 1).all():
            continue  # one constant rating, of whatever scale
        inside = (values >= scale.minimum) & (values <= scale.maximum)
        outside = counts[~inside].sum()
        if outside <= max(FEW, FEW_SHARE * rated) and 2 * outside < rated:
            whole = (values[inside] == np.round(values[inside])) & (values[inside] >= 1)
            return RatingScale(1, scale.maximum) if whole.all() else scale
    known = ", ".join(map(str, SCALES))
    raise DataError(
        f"{name}: the ratings fit none of the known scales ({known}); give --rating-scale LOWEST HIGHEST, or"
        " --missing-rating VALUE for a value that marks a missing rating, or --rating-col none to read no ratings"
    )


def rating_notes(ratings: np.ndarray, scale: RatingScale | None, missing: bool) -> list[str]:
    """What is odd about the ratings, each in one sentence that says what to do.

    Args:
        ratings: [values, 2] as of `count_ratings`.
        scale: That of the ratings.
        missing: The user said which values mean that there is no rating.

    Returns:
        Sentences.
    """
    values, counts = ratings.T
    rated, zeros = counts.sum(), counts[values == 0].sum()
    if rated > 1 and len(values) == 1:
        return [
            f"every rating is {values[0]:g}, so ratings say nothing; if the column does not hold ratings, give"
            " --rating-col none"
        ]
    if scale is not None and scale.minimum == 0 and scale.maximum > 1 and zeros >= MANY_ZEROS * rated and not missing:
        return [
            f"{zeros / rated:.0%} of the ratings are 0; if 0 means that there is no rating, give --missing-rating 0"
        ]
    return []
