"""Fixed windows of a history: `length` events as features, the next event's item as target."""

import dataclasses

import numpy as np

from jaxrec.config import RatingScale
from jaxrec.data.histories import Histories
from jaxrec.data.schema import SECONDS_PER_DAY

MAX_AGE_DAYS = 30.0


@dataclasses.dataclass(frozen=True)
class FixedWindows:
    """`items` [windows, length] int32, `ratings` [windows, length] float32 (0..1), `ages` [windows, length] float32
    (days before the request, at most MAX_AGE_DAYS), `genres` [windows, length, genres] float32, `targets` [windows]
    int32, `users` [windows] int64 (0-based)."""

    items: np.ndarray
    ratings: np.ndarray
    ages: np.ndarray
    genres: np.ndarray
    targets: np.ndarray
    users: np.ndarray


def ages_in_days(times: np.ndarray, request_times: np.ndarray) -> np.ndarray:
    """min(30, (T - t) in days), float32. `times` [windows, length] and `request_times` [windows], int64 seconds."""
    days = (request_times[:, None] - times) / SECONDS_PER_DAY
    return np.minimum(MAX_AGE_DAYS, days).astype(np.float32)


def fixed_windows(
    histories: Histories, genre_matrix: np.ndarray, scale: RatingScale, length: int = 5, stride: int = 1
) -> FixedWindows:
    """Every `stride`-th run of `length` events that has a next event; that event's time is the request time."""
    if length < 1 or stride < 1:
        raise ValueError(f"length and stride must be at least 1, not {length} and {stride}")
    position, total = histories.positions(), np.repeat(histories.lengths(), histories.lengths())
    starts = np.flatnonzero((position % stride == 0) & (position + length < total))
    rows = starts[:, None] + np.arange(length)
    return FixedWindows(
        items=histories.items[rows],
        ratings=scale.to_unit(histories.ratings[rows]),
        ages=ages_in_days(histories.times[rows], histories.times[starts + length]),
        genres=genre_matrix[histories.items[rows]],
        targets=histories.items[starts + length],
        users=histories.users()[starts],
    )
