"""Fixed windows: the reference example to the digit, and which windows there are."""

import numpy as np
import pytest

from jaxrec.config import RatingScale
from jaxrec.data.catalog import Catalog
from jaxrec.data.histories import Histories
from jaxrec.data.ids import IdMap
from tests.data.windows import fixed_windows

GENRES = (
    *("Action", "Adventure", "Animation", "Children", "Comedy", "Crime", "Documentary", "Drama", "Fantasy"),
    *("Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western"),
)
STEP = round(8.33 * 86_400)  # one event every 8.33 days


def test_reference_example() -> None:
    movies = np.array([8, 12, 45, 67, 72, 98])
    item_genres = (
        ("Adventure", "Children"),
        ("Comedy", "Horror"),
        ("Comedy", "Drama"),
        ("Drama",),
        ("Western",),
    )
    catalog = Catalog(IdMap(movies), ("",) * 6, (*item_genres, GENRES))
    histories = Histories(
        offsets=np.array([0, 6]),
        items=catalog.ids.encode(movies),
        ratings=np.array([4.0, 5.0, 3.5, 4.5, 5.0, 2.0], np.float32),
        times=np.arange(6) * STEP,
    )
    windows = fixed_windows(histories, catalog.genre_matrix(), RatingScale(1.0, 5.0), length=5)
    assert catalog.genres == GENRES
    assert catalog.ids.decode(windows.items).tolist() == [[8, 12, 45, 67, 72]]
    assert windows.ratings.tolist() == [[0.75, 1.0, 0.625, 0.875, 1.0]]
    assert np.round(windows.ages, 1).tolist() == np.array([[30, 30, 25, 16.7, 8.3]], np.float32).tolist()
    assert windows.genres.shape == (1, 5, 18)
    assert windows.genres[0, 0].tolist() == [0, 1, 0, 1] + [0] * 14
    assert catalog.ids.decode(windows.targets).tolist() == [98]


@pytest.mark.parametrize(("stride", "starts"), [(1, [1, 2, 3, 11, 12]), (2, [1, 3, 11]), (3, [1, 11])])
def test_windows_never_cross_users(stride: int, starts: list[int]) -> None:
    items = np.array([1, 2, 3, 4, 5, 11, 12, 13, 14, 21, 22])  # users with 5, 4 and 2 events
    histories = Histories(np.array([0, 5, 9, 11]), items, np.full(11, 3.0, np.float32), np.arange(11) * 100)
    windows = fixed_windows(histories, np.zeros((23, 1), np.float32), RatingScale(1, 5), length=2, stride=stride)
    assert windows.items[:, 0].tolist() == starts
    assert windows.targets.tolist() == [start + 2 for start in starts]


def test_missing_rating_and_bad_arguments() -> None:
    histories = Histories(np.array([0, 3]), np.array([1, 2, 3]), np.array([np.nan, 5, 1], np.float32), np.arange(3))
    windows = fixed_windows(histories, np.zeros((4, 1), np.float32), RatingScale(1, 5), length=2)
    assert windows.ratings.tolist() == [[-1.0, 1.0]]
    with pytest.raises(ValueError, match="at least 1"):
        fixed_windows(histories, np.zeros((4, 1), np.float32), RatingScale(1, 5), length=0)
