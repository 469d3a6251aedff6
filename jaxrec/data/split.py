"""Splits histories into training, validation and test, as the evaluation protocol says.

A case is one event to be predicted from the events of its user before it. Nothing that is fitted sees an event that
is not in training.
"""

import dataclasses
import hashlib
import math

import numpy as np

from jaxrec.config import FilterOn, PrepareConfig, SplitKind
from jaxrec.data.filtering import FilteredLog, FittedEvents
from jaxrec.data.histories import Block, EventLog, Histories, blocks, release
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

    def repeated(self, histories: Histories) -> np.ndarray:
        """[cases] bool: whether the target is an item of its user's history already."""
        items, starts = histories.items, histories.offsets[self.users]
        found = [items[row] in items[start:row] for start, row in zip(starts, self.rows, strict=True)]
        return np.array(found, bool)


@dataclasses.dataclass(frozen=True)
class Split:
    """`train_counts` [users] int64: how many of each user's first events are in training."""

    train_counts: np.ndarray
    validation: Cases
    test: Cases

    def train_rows(self, histories: Histories) -> np.ndarray:
        """[training events] int64: their rows, in order."""
        return np.flatnonzero(histories.positions() < np.repeat(self.train_counts, histories.lengths()))


@dataclasses.dataclass(frozen=True)
class SplitRule:
    """The split of `config` on one log, and what decides it before the filter.

    `cut`: seconds, of the temporal split; `roles` [log users] int8, of the user-held-out split.
    """

    config: PrepareConfig
    cut: int
    roles: np.ndarray

    @classmethod
    def of(cls, log: EventLog, config: PrepareConfig, cut: int | None = None) -> "SplitRule":
        """The rule for `log`. `cut`: where the log is a part of one whose cut is known."""
        kind = config.split
        if cut is None:
            cut = temporal_cut(log.events.times) if kind is SplitKind.TEMPORAL else 0
        is_by_user = kind is SplitKind.USER_HELD_OUT
        return cls(config, cut, user_roles(log.users.raw_ids, config.seed) if is_by_user else np.empty(0, np.int8))

    def fitted(self, log: EventLog) -> FittedEvents:
        """The events that the filter, and with it the catalogue, is fitted on."""

        def all_events(block: Block) -> np.ndarray:
            return np.ones(int(block.lengths.sum()), bool)

        def training_of_leave_one_out(block: Block) -> np.ndarray:
            return is_training_of_leave_one_out(block.positions(), block.per_event(block.lengths))

        def before_the_cut(block: Block) -> np.ndarray:
            before = log.events.times[block.rows] < self.cut
            release(log.events.times)
            return before

        def of_training_users(block: Block) -> np.ndarray:
            return block.per_event(self.roles[block.users] == TRAINING)

        if self.config.split is SplitKind.TEMPORAL:
            return before_the_cut
        if self.config.split is SplitKind.USER_HELD_OUT:
            return of_training_users
        return training_of_leave_one_out if self.config.filter_on is FilterOn.TRAINING else all_events

    @property
    def keeps_every_user(self) -> bool:
        """Whether users that the filter does not keep are evaluated all the same."""
        return self.config.split is not SplitKind.LEAVE_ONE_OUT

    def split(self, kept: FilteredLog, known: np.ndarray | None = None) -> Split:
        """The split of the kept events. `known` [items + 1] bool: items seen in training; None: of these events."""
        histories = kept.histories
        if self.config.split is SplitKind.TEMPORAL:
            return temporal(histories, self.cut, kept.train_counts > 0, known)
        if self.config.split is SplitKind.USER_HELD_OUT:
            return user_held_out(histories, self.roles[kept.order], known)
        if self.config.filter_on is FilterOn.TRAINING:
            return leave_one_out_fitted(histories, kept.train_counts, kept.last_kept, kept.before_last_kept)
        return leave_one_out(histories)


def leave_one_out(histories: Histories) -> Split:
    """Last event: test; the one before: validation; the rest: training. Users with fewer than 3 events only train.

    Examples:
        >>> four_and_two = Histories(np.array([0, 4, 6]), *np.zeros((3, 6)))
        >>> split = leave_one_out(four_and_two)
        >>> split.train_counts.tolist(), split.validation.rows.tolist(), split.test.rows.tolist()
        ([2, 2], [2], [3])
    """
    lengths = histories.lengths()
    users = np.flatnonzero(lengths >= 3)
    train_counts = lengths.copy()
    train_counts[users] -= 2
    last = histories.offsets[users + 1] - 1
    return Split(train_counts, validation=Cases(users, last - 1), test=Cases(users, last))


def leave_one_out_fitted(
    histories: Histories, train_counts: np.ndarray, last_kept: np.ndarray, before_last_kept: np.ndarray
) -> Split:
    """The same where the filter was fitted on training: a held-out event may have been dropped.

    Args:
        histories: The kept events.
        train_counts: [users] int64, kept training events.
        last_kept: [users] bool, whether a user's last event of all is left.
        before_last_kept: [users] bool, the same of the one before.
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
    """[events] bool. `positions`: of each event in its history; `totals`: how long that history is.

    Examples:
        >>> is_training_of_leave_one_out(np.array([0, 1, 2, 0, 1]), np.array([3, 3, 3, 2, 2])).tolist()
        [True, False, False, True, True]
    """
    return (positions < totals - 2) | (totals < 3)


def temporal_cut(times: np.ndarray) -> int:
    """The TEMPORAL_QUANTILE quantile of all timestamps (the higher of two): events at or after it are tests.

    By counting days first, so that no sorted copy of the times is needed.

    >>> temporal_cut(np.arange(100, 0, -1))
    91
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
    day, rank = day_of_cut(days)
    within = []
    for start in starts:
        part = times[start : start + step]
        within.append(part[part // SECONDS_PER_DAY == day])
        release(times)
    return int(np.sort(np.concatenate(within))[rank])


def day_of_cut(days: np.ndarray) -> tuple[int, int]:
    """The day with the cut, and the cut's rank among the sorted times of that day. `days` [days] int64: events of each.

    Examples:
        >>> day_of_cut(np.array([5, 0, 6]))  # the ten-percent quantile from above: the tenth of 11 times
        (2, 4)
    """
    totals = np.cumsum(days)
    rank = math.ceil(TEMPORAL_QUANTILE * (totals[-1] - 1))
    day = int(np.searchsorted(totals, rank, side="right"))
    return day, int(rank - (totals[day] - days[day]))


def temporal(histories: Histories, cut: int, trains: np.ndarray, known: np.ndarray | None = None) -> Split:
    """Events before `cut` train; each later event with enough history and an item seen in training is a test.

    Validation is the last event before the cut of each training user with enough history; it is held out of training.
    Users who appear only after the cut are tested too, which shows how the model serves users that it never saw.

    Args:
        histories: All kept events.
        cut: Seconds since 1970.
        trains: [users] bool, whose events may train; the others (too few before the cut) are only tested.
        known: [items + 1] bool, items seen in training; None: those of these histories' training part.
    """
    counts = np.zeros(histories.user_count, np.int64)
    for block in blocks(histories.offsets):
        counts[block.users] = block.sums(histories.times[block.rows] < cut)
        release(histories.times)
    validated = np.flatnonzero(trains & (counts > TEMPORAL_MIN_HISTORY))
    train_counts = np.where(trains, counts, 0)
    train_counts[validated] -= 1
    known = items_in_training(histories, train_counts) if known is None else known
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
    bounds = [draws < TEST_USERS, draws < TEST_USERS + VALIDATION_USERS]
    return np.select(bounds, [TEST, VALIDATION], TRAINING).astype(np.int8)


def user_held_out(histories: Histories, roles: np.ndarray, known: np.ndarray | None = None) -> Split:
    """All events of the training users train; the last event of each other user is a case, the rest its history.

    A case needs a history of one event and an item seen in training.

    Args:
        histories: All kept events.
        roles: [users] of TRAINING, VALIDATION and TEST.
        known: [items + 1] bool, items seen in training; None: those of these histories' training part.

    Examples:
        >>> pairs = Histories(np.array([0, 2, 4]), np.array([1, 2, 2, 1]), *np.zeros((2, 4)))
        >>> user_held_out(pairs, np.array([TRAINING, TEST])).test.rows.tolist()
        [3]
    """
    lengths = histories.lengths()
    train_counts = np.where(roles == TRAINING, lengths, 0)
    known = items_in_training(histories, train_counts) if known is None else known

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
