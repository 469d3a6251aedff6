"""Cuts histories into training, validation and test, as the evaluation protocol says.

A case is one event to be predicted from the events of its user before it. Nothing that is fitted sees an event that
is not in training.
"""

import dataclasses
import hashlib
import math

import numpy as np

from jaxrec.data.histories import Histories, blocks, release
from jaxrec.data.schema import SECONDS_PER_DAY

TEMPORAL_QUANTILE = 0.9
TEMPORAL_MIN_HISTORY = 5
TEST_USERS = 0.1
VALIDATION_USERS = 0.1
TRAINING, VALIDATION, TEST = 0, 1, 2


@dataclasses.dataclass(frozen=True)
class Cases:
    """`users` [cases] int64 (0-based) and `rows` [cases] int64: the target's row in the histories' columns."""

    users: np.ndarray
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.users)

    def at_most(self, limit: int) -> "Cases":
        """These cases, or evenly spaced ones where there are more than `limit`."""
        if len(self) <= limit:
            return self
        chosen = np.linspace(0, len(self) - 1, limit).astype(np.int64)
        return Cases(self.users[chosen], self.rows[chosen])


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


def leave_one_out_fitted(
    histories: Histories, train_counts: np.ndarray, last_kept: np.ndarray, before_last_kept: np.ndarray
) -> Split:
    """The same where the roles were given before the filter: an event of a held-out role may be missing.

    `train_counts` [users]: kept training events; the flags [users] say which of the two held-out events are left.
    """
    held_out = histories.lengths() - train_counts
    tested = np.flatnonzero((held_out > 0) & last_kept)
    validated = np.flatnonzero((held_out > 0) & before_last_kept)
    return Split(
        train_counts,
        validation=Cases(validated, histories.offsets[validated] + train_counts[validated]),
        test=Cases(tested, histories.offsets[tested + 1] - 1),
    )


def is_training_of_leave_one_out(positions: np.ndarray, totals: np.ndarray) -> np.ndarray:
    """[events] bool. `positions`: of each event in its history; `totals`: how long that history is."""
    return (positions < totals - 2) | (totals < 3)


def temporal_cut(times: np.ndarray) -> int:
    """The TEMPORAL_QUANTILE quantile of all timestamps (the higher of two): events at or after it are tests.

    By counting days first, so that no sorted copy of the times is needed.
    """
    step = 4_000_000
    starts = range(0, len(times), step)
    days = np.zeros(1, np.int64)
    for start in starts:
        found = np.bincount(times[start : start + step] // SECONDS_PER_DAY)
        longer, shorter = (found, days) if len(found) > len(days) else (days, found)
        days = longer.copy()
        days[: len(shorter)] += shorter
        release(times)
    rank = math.ceil(TEMPORAL_QUANTILE * (len(times) - 1))
    totals = np.cumsum(days)
    day = int(np.searchsorted(totals, rank, side="right"))
    within = []
    for start in starts:
        part = times[start : start + step]
        within.append(part[part // SECONDS_PER_DAY == day])
        release(times)
    return int(np.sort(np.concatenate(within))[rank - (totals[day] - days[day])])


def temporal(histories: Histories, cut: int, trains: np.ndarray) -> Split:
    """Events before `cut` (seconds) train; each later event with enough history and an item seen in training is a test.

    `trains` [users] bool: whose events may train; the others (too few before the cut) are only tested. Validation is
    the last event before the cut of each training user with enough history; it is held out of training. Users who
    appear only after the cut are tested too, which shows how the model serves users that it never saw.
    """
    counts = np.zeros(histories.user_count, np.int64)
    for block in blocks(histories.offsets):
        counts[block.users] = block.sums(histories.times[block.rows] < cut)
        release(histories.times)
    validated = np.flatnonzero(trains & (counts > TEMPORAL_MIN_HISTORY))
    train_counts = np.where(trains, counts, 0)
    train_counts[validated] -= 1
    known = items_in_training(histories, train_counts)
    validation_rows = histories.offsets[validated] + counts[validated] - 1
    validation_known = known[histories.items[validation_rows]]
    test_users, test_rows = [], []
    for block in blocks(histories.offsets):
        positions = block.positions()
        late = (positions >= block.per_event(counts[block.users])) & (positions >= TEMPORAL_MIN_HISTORY)
        tested = np.flatnonzero(late & known[histories.items[block.rows]])
        test_users.append(block.per_event(block.users)[tested])
        test_rows.append(histories.offsets[block.users[0]] + tested)
        release(histories.items)
    return Split(
        train_counts,
        validation=Cases(validated[validation_known], validation_rows[validation_known]),
        test=Cases(_joined(test_users), _joined(test_rows)),
    )


def user_roles(raw_ids: np.ndarray, seed: int) -> np.ndarray:
    """[users] int8: TEST for about TEST_USERS of the users, VALIDATION for about VALIDATION_USERS, else TRAINING.

    A role follows from seed and raw id alone, so that other users, and later events, do not change it.
    """
    draws = np.array([_draw(f"{seed} {raw}") for raw in raw_ids.tolist()])
    return np.select([draws < TEST_USERS, draws < TEST_USERS + VALIDATION_USERS], [TEST, VALIDATION], TRAINING)


def user_held_out(histories: Histories, roles: np.ndarray) -> Split:
    """All events of the training users train; the last event of each other user is a case, the rest its history.

    A case needs a history of one event and an item seen in training.
    """
    lengths = histories.lengths()
    train_counts = np.where(roles == TRAINING, lengths, 0)
    known = items_in_training(histories, train_counts)

    def cases(role: int) -> Cases:
        users = np.flatnonzero((roles == role) & (lengths >= 2))
        rows = histories.offsets[users + 1] - 1
        seen = known[histories.items[rows]]
        return Cases(users[seen], rows[seen])

    return Split(train_counts, validation=cases(VALIDATION), test=cases(TEST))


def items_in_training(histories: Histories, train_counts: np.ndarray) -> np.ndarray:
    """[largest item + 1] bool: the items of each user's first `train_counts` events."""
    known = np.zeros(0, bool)
    for block in blocks(histories.offsets):
        items = histories.items[block.rows]
        known = np.concatenate([known, np.zeros(max(0, int(items.max(initial=0)) + 1 - len(known)), bool)])
        known[items[block.positions() < block.per_event(train_counts[block.users])]] = True
        release(histories.items)
    return known


def _draw(text: str) -> float:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) / 2**64


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts) if parts else np.empty(0, np.int64)
