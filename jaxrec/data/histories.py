"""All users' events as ragged columns: user u's events are rows offsets[u] : offsets[u + 1], in time order."""

import dataclasses

import numpy as np

from jaxrec.data.schema import UNKNOWN_GAP


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
