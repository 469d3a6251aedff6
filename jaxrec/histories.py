"""All users' events as ragged columns: user u's events are rows offsets[u] : offsets[u + 1], in time order."""

import dataclasses

import numpy as np
import pandas as pd

from jaxrec.config import Ties
from jaxrec.schema import ITEM, RATING, TIME, UNKNOWN_GAP, USER


@dataclasses.dataclass(frozen=True)
class Histories:
    """`offsets` [users + 1] int64; per event `items` int32, `ratings` float32 (raw, NaN = none), `times` int64."""

    offsets: np.ndarray
    items: np.ndarray
    ratings: np.ndarray
    times: np.ndarray

    @property
    def user_count(self) -> int:
        return len(self.offsets) - 1

    @property
    def event_count(self) -> int:
        return len(self.items)

    def lengths(self) -> np.ndarray:
        """[users] int64: events per user."""
        return np.diff(self.offsets)

    def users(self) -> np.ndarray:
        """[events] int64: the user of each event."""
        return np.repeat(np.arange(self.user_count), self.lengths())

    def positions(self) -> np.ndarray:
        """[events] int64: 0 for a user's first event, 1 for the second, ..."""
        return np.arange(self.event_count) - np.repeat(self.offsets[:-1], self.lengths())

    def gaps(self) -> np.ndarray:
        """[events] float32: seconds since the same user's event before, UNKNOWN_GAP for the first."""
        gaps = np.empty(self.event_count, np.float32)
        gaps[1:] = np.diff(self.times)
        gaps[self.offsets[:-1][self.lengths() > 0]] = UNKNOWN_GAP
        return gaps


def build_histories(
    interactions: pd.DataFrame, users: np.ndarray, items: np.ndarray, ties: Ties, seed: int
) -> Histories:
    """Sorts interactions by user and time. `users`: 0-based index per row; `items`: 1-based index per row (int32).

    Equal timestamps of one user keep the row order (Ties.FILE), or get a seeded random one (Ties.RANDOM).
    """
    times = interactions[TIME].to_numpy(dtype=np.int64)
    tie_break = np.arange(len(times))
    if ties is Ties.RANDOM:
        tie_break = np.random.default_rng(seed).permutation(len(times))
    order = np.lexsort((tie_break, times, users))
    counts = np.bincount(users, minlength=int(users.max(initial=-1)) + 1)
    return Histories(
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        items=items[order].astype(np.int32),
        ratings=interactions[RATING].to_numpy(dtype=np.float32)[order],
        times=times[order],
    )


def filter_rare(interactions: pd.DataFrame, min_user_ratings: int, min_movie_ratings: int) -> pd.DataFrame:
    """Drops users and movies with few ratings, again and again until none is left (the k-core of the literature)."""
    while True:
        by_user = interactions.groupby(USER)[USER].transform("size")
        by_item = interactions.groupby(ITEM)[ITEM].transform("size")
        kept = interactions[(by_user >= min_user_ratings) & (by_item >= min_movie_ratings)]
        if len(kept) == len(interactions):
            return interactions
        interactions = kept
