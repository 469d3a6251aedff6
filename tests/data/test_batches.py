"""Training windows and evaluation batches: every event once, nothing of the future, padding that is marked."""

import itertools
import tracemalloc
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pandas as pd
import pytest

from jaxrec.config import MISSING_RATING, PrepareConfig
from jaxrec.data.batches import (
    TrainingData,
    case_batches,
    gaps_at,
    pack_windows,
    prefetch,
    training_windows,
)
from jaxrec.data.prepare import prepare
from jaxrec.data.prepared import PreparedData
from jaxrec.data.schema import ITEM, RATING, TIME, UNKNOWN_GAP, USER
from jaxrec.data.split import Cases
from tests.synthetic import random_log


@pytest.fixture(scope="module")
def data() -> PreparedData:
    return prepare(random_log(users=30, items=25, max_events=40, seed=3), None, PrepareConfig(3, 1))


def test_windows_by_hand() -> None:
    users, starts, lengths = training_windows(np.array([1, 2, 6, 7]), max_length=3)
    # 6 events have 5 targets: the last three (start 2), then the first two. 7 events have 6: twice three.
    assert users.tolist() == [1, 2, 2, 3, 3]
    assert starts.tolist() == [0, 2, 0, 3, 0]
    assert lengths.tolist() == [1, 3, 2, 3, 3]


def test_every_training_event_but_the_first_is_a_target_once(data: PreparedData) -> None:
    windows = TrainingData(data, max_length=8, batch_tokens=64)
    seen: Counter[tuple[int, float]] = Counter()
    for batch in windows.epoch(seed=0, epoch=0):
        where = batch.target > 0
        np.testing.assert_array_equal(where, np.arange(where.shape[1]) < batch.events.length[:, None])
        seen.update(zip(batch.target[where].tolist(), batch.target_gap[where].tolist(), strict=True))
    histories = data.histories
    rows = data.split.train_rows(histories)
    rows = rows[histories.positions()[rows] > 0]
    expected = Counter(zip(histories.items[rows].tolist(), histories.gaps()[rows].tolist(), strict=True))
    assert seen == expected
    assert windows.target_count == len(rows)


def test_no_held_out_event_is_in_a_training_batch(data: PreparedData) -> None:
    marked = data.histories.items.copy()
    marked[data.split.test.rows] = marked[data.split.validation.rows] = 10_000
    histories = data.histories.__class__(data.histories.offsets, marked, data.histories.ratings, data.histories.times)
    held_out = PreparedData(data.catalog, data.users, histories, data.split, data.config)
    for batch in TrainingData(held_out, max_length=8, batch_tokens=64).epoch(0, 0):
        assert batch.events.item.max() < 10_000
        assert batch.target.max() < 10_000


def test_padding_is_marked(data: PreparedData) -> None:
    for batch in TrainingData(data, max_length=8, batch_tokens=64).epoch(0, 0):
        padding = np.arange(batch.target.shape[1]) >= batch.events.length[:, None]
        assert np.all(batch.events.item[padding] == 0)
        assert np.all(batch.events.rating[padding] == MISSING_RATING)
        assert np.all(batch.events.gap[padding] == UNKNOWN_GAP)
        assert np.all(batch.events.item[~padding] > 0)


def test_a_row_knows_what_was_taken_before_its_window(data: PreparedData) -> None:
    """Backwards from a window: the items before it are those of its user, and nothing is before a first window."""
    windows, max_length = TrainingData(data, max_length=8, batch_tokens=64), 8
    histories = data.histories
    beginnings = {
        tuple(histories.items[first : first + stop].tolist())
        for first, count in zip(histories.offsets[:-1], data.split.train_counts, strict=True)
        for stop in range(1, count + 1)
    }
    later = 0
    for batch in windows.epoch(0, 0):
        for row in range(len(batch.target)):
            places = np.flatnonzero(batch.starts[row])
            for start, stop in itertools.pairwise([*places, batch.events.length[row]]):
                before = batch.earlier[row][batch.earlier[row] > 0]
                assert len(before) == 0 or (len(places) == 1 and stop == max_length)
                assert (*before[::-1].tolist(), *batch.events.item[row, start:stop].tolist()) in beginnings
                later += len(before) > 0
    assert later


def test_order_follows_from_seed_and_epoch(data: PreparedData) -> None:
    windows = TrainingData(data, max_length=8, batch_tokens=64)

    def first_targets(seed: int, epoch: int) -> list[int]:
        return [int(batch.target[0, 0]) for batch in windows.epoch(seed, epoch)]

    assert first_targets(0, 1) == first_targets(0, 1)
    assert first_targets(0, 1) != first_targets(0, 2)
    assert first_targets(0, 1) != first_targets(1, 1)


def test_batches_have_one_shape_that_splits_over_devices(data: PreparedData) -> None:
    windows = TrainingData(data, max_length=8, batch_tokens=64, multiple_of=4)
    batches = list(windows.epoch(0, 0))
    assert {batch.target.shape for batch in batches} == {(8, 8)}
    assert len(batches) == windows.steps_per_epoch
    filled = sum(int((batch.target > 0).sum()) for batch in batches)
    assert windows.padding_share() == 1 - filled / (len(batches) * 64)


def test_packing_by_hand() -> None:
    rows, offsets = pack_windows(np.array([2, 5, 3, 1, 4]), row_length=5, rng=np.random.default_rng(0))
    # Longest first: 5 fills a row; 4 leaves 1; 3 leaves 2, which 2 fills; 1 fills what 4 left.
    assert rows.tolist() == [2, 0, 2, 1, 1]
    assert offsets.tolist() == [3, 0, 0, 4, 0]


def test_packing_wastes_little_on_movielens_like_lengths() -> None:
    counts = 20 + np.random.default_rng(0).geometric(1 / 120, size=2000)
    _, _, lengths = training_windows(counts, max_length=100)
    rows, offsets = pack_windows(lengths, 100, np.random.default_rng(0))
    assert 1 - lengths.sum() / ((rows.max() + 1) * 100) < 0.05
    occupied = np.concatenate(
        [row * 100 + offset + np.arange(n) for row, offset, n in zip(rows, offsets, lengths, strict=True)]
    )
    assert len(np.unique(occupied)) == lengths.sum()  # no two windows share a slot


def test_an_interrupted_epoch_goes_on_where_it_stopped(data: PreparedData) -> None:
    windows = TrainingData(data, max_length=8, batch_tokens=64)
    whole, rest = list(windows.epoch(3, 1)), list(windows.epoch(3, 1, first_step=4))
    assert len(rest) == len(whole) - 4
    for ours, theirs in zip(rest, whole[4:], strict=True):
        np.testing.assert_array_equal(ours.target, theirs.target)


def test_prefetching_keeps_the_order_and_passes_errors_on() -> None:
    assert list(prefetch(iter(range(10)), depth=3)) == list(range(10))

    def broken() -> Iterator[int]:
        yield 1
        raise OSError("disk gone")

    batches = prefetch(broken())
    assert next(batches) == 1
    with pytest.raises(OSError, match="disk gone"):
        next(batches)


def test_cases_hold_the_history_and_nothing_later(data: PreparedData) -> None:
    histories, cases = data.histories, data.split.test
    row = 0
    for batch in case_batches(data, cases, max_length=8, size=7):
        for i in range(min(7, len(cases) - row)):
            target_row = cases.rows[row]
            history = histories.items[histories.offsets[cases.users[row]] : target_row]
            length = int(batch.events.length[i])
            assert length == min(8, len(history))
            assert batch.events.item[i, :length].tolist() == history[-8:].tolist()
            assert set(batch.exclude[i].tolist()) - {0} == set(history.tolist())
            assert batch.target[i] == histories.items[target_row]
            assert batch.request_gap[i] == histories.times[target_row] - histories.times[target_row - 1]
            row += 1
    assert row == len(cases)


def test_cases_have_the_numbers_of_the_whole_log(data: PreparedData) -> None:
    """Ratings, gaps and times that are worked out for a batch are those of the whole columns."""
    histories, ratings, gaps = data.histories, data.unit_ratings(), data.histories.gaps()
    every_row = Cases(histories.users(), np.arange(histories.event_count))
    for start, batch in zip(range(0, len(every_row), 16), case_batches(data, every_row, 8, 16, False), strict=True):
        for i, row in enumerate(every_row.rows[start : start + 16]):
            first = max(row - 8, histories.offsets[every_row.users[row]])
            length = row - first
            assert batch.events.rating[i].tolist() == ratings[first:row].tolist() + [MISSING_RATING] * (8 - length)
            assert batch.events.gap[i].tolist() == gaps[first:row].tolist() + [UNKNOWN_GAP] * (8 - length)
            assert (batch.request_gap[i], batch.time[i]) == (gaps[row], histories.times[row])
            of_history = slice(int(histories.offsets[every_row.users[row]]), row)
            count = of_history.stop - of_history.start
            for column, known in ((batch.history, histories.items), (batch.history_time, histories.times)):
                assert column[i, :count].tolist() == known[of_history].tolist()
            assert not batch.history[i, count:].any()
    np.testing.assert_array_equal(gaps_at(histories, every_row.rows), gaps)


def test_histories_are_excluded_or_come_with_their_times(data: PreparedData) -> None:
    """Nothing reads times where items of the history are excluded; nothing is excluded where they are allowed."""
    (without,), (allowed,) = (
        case_batches(data, data.split.test.at_most(8), 8, 8, exclude_seen) for exclude_seen in (True, False)
    )
    np.testing.assert_array_equal(without.exclude, allowed.history)
    assert without.history_time.shape == (8, 0)
    assert allowed.history_time.shape == allowed.history.shape
    np.testing.assert_array_equal(allowed.exclude, np.zeros((8, 1)))


def test_training_events_have_the_numbers_of_the_whole_log(data: PreparedData) -> None:
    histories, ratings, gaps = data.histories, data.unit_ratings(), data.histories.gaps()
    rows = data.split.train_rows(histories)
    columns = histories.items, ratings, gaps
    known = Counter(zip(*(column[rows].tolist() for column in columns), strict=True))
    found = {
        event
        for batch in TrainingData(data, max_length=8, batch_tokens=64).epoch(0, 0)
        for event, where in zip(
            zip(*(column.ravel().tolist() for column in batch.events[:3]), strict=True),
            batch.target.ravel() > 0,
            strict=True,
        )
        if where
    }
    assert found <= set(known)
    assert any(gap == UNKNOWN_GAP for _, _, gap in found)  # of a user's first event


def test_a_long_history_widens_only_its_own_batch() -> None:
    counts = np.array([3, 3, 3, 20])
    log = pd.DataFrame({USER: np.repeat(np.arange(4), counts), ITEM: np.arange(29), TIME: np.arange(29)})
    data = prepare(log, None, PrepareConfig(1, 1))
    widths = [batch.exclude.shape[1] for batch in case_batches(data, data.split.test, max_length=4, size=2)]
    assert widths == [4, 32]  # 2 and 2 earlier items need `max_length`; 19 need the next power of two


def test_memory_of_cases_does_not_grow_with_the_log() -> None:
    """The same ten cases at the beginning of a log, and of one with 50 times as many users."""

    def peak(users: int) -> int:
        log = pd.DataFrame({USER: np.repeat(np.arange(users), 20), ITEM: np.tile(np.arange(20), users)})
        data = prepare(log.assign(**{TIME: np.arange(len(log)), RATING: 3.0}), None, PrepareConfig(1, 1))
        cases = Cases(data.split.test.users[:10], data.split.test.rows[:10])
        tracemalloc.start()
        try:
            assert len(list(case_batches(data, cases, max_length=8))) == 1
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    few, many = peak(100), peak(5000)  # a column of the larger log has 400 kB
    assert abs(many - few) < 10_000
