"""Cuts histories into training, validation and test, as the evaluation protocol says.

A case is one event to be predicted from the events of its user before it. Nothing that is fitted sees an event that
is not in training.
"""

import dataclasses

import numpy as np

from jaxrec.histories import Histories

TEMPORAL_QUANTILE = 0.9
TEMPORAL_MIN_HISTORY = 5


@dataclasses.dataclass(frozen=True)
class Cases:
    """`users` [cases] int64 (0-based) and `rows` [cases] int64: the target's row in the histories' columns."""

    users: np.ndarray
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.users)


@dataclasses.dataclass(frozen=True)
class Split:
    """`train_counts` [users] int64: how many of each user's first events are in training."""

    train_counts: np.ndarray
    validation: Cases
    test: Cases

    def train_rows(self, histories: Histories) -> np.ndarray:
        """[training events] int64: their rows, in order."""
        return np.flatnonzero(histories.positions() < np.repeat(self.train_counts, histories.lengths()))


def leave_one_out(histories: Histories) -> Split:
    """Last event: test; the one before: validation; the rest: training. Users with fewer than 3 events only train."""
    lengths = histories.lengths()
    users = np.flatnonzero(lengths >= 3)
    train_counts = lengths.copy()
    train_counts[users] -= 2
    last = histories.offsets[users + 1] - 1
    return Split(train_counts, validation=Cases(users, last - 1), test=Cases(users, last))


def temporal_cut(times: np.ndarray) -> int:
    """The TEMPORAL_QUANTILE quantile of all timestamps: events at or after it are tests."""
    return int(np.quantile(times, TEMPORAL_QUANTILE, method="higher"))


def temporal(histories: Histories, cut: int, trains: np.ndarray) -> Split:
    """Events before `cut` (seconds) train; each later event with enough history and an item seen in training is a test.

    `trains` [users] bool: whose events may train; the others (too few events before the cut) are only tested.

    Validation is the last event before the cut of each user with enough history; it is held out of training. Users
    who appear only after the cut are tested too, which shows how the model serves users that it never saw.
    """
    users = histories.users()
    positions = histories.positions()
    before = histories.times < cut
    counts = np.bincount(users[before & trains[users]], minlength=histories.user_count)
    validated = np.flatnonzero(counts > TEMPORAL_MIN_HISTORY)
    train_counts = counts.copy()
    train_counts[validated] -= 1
    in_training = positions < np.repeat(train_counts, histories.lengths())
    known = np.zeros(int(histories.items.max(initial=0)) + 1, bool)
    known[histories.items[in_training]] = True
    validation_rows = histories.offsets[validated] + counts[validated] - 1
    validation_known = known[histories.items[validation_rows]]
    test_rows = np.flatnonzero(~before & (positions >= TEMPORAL_MIN_HISTORY) & known[histories.items])
    return Split(
        train_counts,
        validation=Cases(validated[validation_known], validation_rows[validation_known]),
        test=Cases(users[test_rows], test_rows),
    )
