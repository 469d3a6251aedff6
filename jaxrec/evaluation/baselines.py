"""Popularity and recent popularity: what a model must beat, and the answer for a user without history."""

import numpy as np

from jaxrec.data.prepared import PreparedData
from jaxrec.data.schema import SECONDS_PER_DAY

RECENT_HALF_LIFE_DAYS = 30.0


def decayed_popularity(data: PreparedData, half_life_days: float = RECENT_HALF_LIFE_DAYS) -> np.ndarray:
    """[items + 1] float64: training events, each halved for every `half_life_days` before the last training event."""
    rows = data.split.train_rows(data.histories)
    times = data.histories.times[rows]
    age_days = (times.max(initial=0) - times) / SECONDS_PER_DAY
    weights = 0.5 ** (age_days / half_life_days)
    return np.bincount(data.histories.items[rows], weights=weights, minlength=len(data.catalog) + 1)


class RecentPopularity:
    """Training events of the `window_days` before each case's own time, so nothing later than the case is counted.

    The whole log's popularity, scaled below one event, breaks ties.
    """

    def __init__(self, data: PreparedData, window_days: float) -> None:
        rows = data.split.train_rows(data.histories)
        rows = rows[np.argsort(data.histories.times[rows], kind="stable")]
        self._times = data.histories.times[rows]
        self._items = data.histories.items[rows]
        popularity = data.train_popularity()
        self._tie_break = popularity / (popularity.sum() + 1.0)
        self._window = window_days * SECONDS_PER_DAY

    def scores(self, times: np.ndarray) -> np.ndarray:
        """[cases, items + 1] float32 for request times [cases] int64."""
        starts = np.searchsorted(self._times, times - self._window, side="left")
        stops = np.searchsorted(self._times, times, side="left")
        counts = [
            np.bincount(self._items[start:stop], minlength=len(self._tie_break))
            for start, stop in zip(starts, stops, strict=True)
        ]
        return (np.stack(counts) + self._tie_break).astype(np.float32)
