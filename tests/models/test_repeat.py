"""The features of items of the history, against values worked out by hand, and the table that is read by them."""

import numpy as np
import pytest

from jaxrec.models.repeat import EDGES, FEATURES, STARTS, TABLE_SIZE, Repeat, repeat_buckets, seen_buckets

DAY = 86_400


@pytest.fixture
def table() -> np.ndarray:
    """[TABLE_SIZE], each bucket its place in thousandths."""
    return (np.arange(TABLE_SIZE) / 1000).astype(np.float32)


def test_features_are_how_often_and_when_an_item_had_events() -> None:
    """Item 4 on days 0, 10 and 20, item 6 on day 21, a request on day 25."""
    items, times = np.array([4, 4, 4, 6]), DAY * np.array([0, 10, 20, 21])
    found, places = repeat_buckets(items, times, 25 * DAY)
    assert found.tolist() == [6, 4]
    # One event for item 6, three for item 4; none and one event later; 4 and 5 days, both in 2**18..2**19 s.
    # Item 4 came every 10 days, and half of that has passed; item 6 has no interval.
    half = 1 + np.searchsorted(EDGES[3][1:], 0.5, side="right")
    timed = len(EDGES[2]) + 1, len(EDGES[3]) + 1
    expected = [[0, 0, timed[0] + 19, timed[1]], [2, 1, timed[0] + 19, timed[1] + half]]
    np.testing.assert_array_equal(places - np.array(STARTS), expected)


def test_without_a_request_time_time_runs_until_the_last_event_and_is_read_from_other_tables() -> None:
    items, times = np.array([4, 6]), DAY * np.array([0, 2])
    _, without = repeat_buckets(items, times, None)
    _, at_last = repeat_buckets(items, times, 2 * DAY)
    shift = [0, 0, len(EDGES[2]) + 1, len(EDGES[3]) + 1]
    np.testing.assert_array_equal(at_last - np.array(shift), without)


def test_events_of_the_same_second_have_no_interval() -> None:
    _, places = repeat_buckets(np.array([4, 4]), np.array([7, 7]), None)
    assert places[0, 3] == STARTS[3]


def test_a_batch_is_what_its_rows_are_alone(table: np.ndarray) -> None:
    rng = np.random.default_rng(0)
    history = rng.integers(1, 6, (8, 20)).astype(np.int32)
    history[3, 5:] = history[5] = 0
    times = np.where(history > 0, np.sort(rng.integers(0, 10**7, history.shape), axis=1), 0)
    time, timed = np.full(8, 2 * 10**7), np.arange(8) % 2 == 0
    items, buckets = seen_buckets(history, times, time, timed)
    seen = Repeat(table).scores_of(history, times, time, timed)
    np.testing.assert_array_equal(seen.items, items)
    assert items.shape == (8, 8)  # five items at most
    assert (items[5] == 0).all()
    for row in (0, 1, 3):
        real = history[row] > 0
        alone = repeat_buckets(history[row, real], times[row, real], 2 * 10**7 if timed[row] else None)
        count = len(alone[0])
        np.testing.assert_array_equal(items[row, :count], alone[0])
        np.testing.assert_array_equal(buckets[row, :count], alone[1])
        np.testing.assert_allclose(seen.scores[row, :count], table[alone[1]].sum(axis=1), rtol=1e-6)
        assert not seen.scores[row, count:].any()


def test_the_tables_by_feature_are_parts_of_the_one(table: np.ndarray) -> None:
    tables = Repeat(table).tables()
    assert [(len(rows), len(rows[0])) for rows in tables] == [(1, 10), (1, 17), (2, 31), (2, 23)]
    np.testing.assert_array_equal(np.concatenate([np.ravel(rows) for rows in tables]), table[1:])
    assert len(tables) == FEATURES


def test_times_of_another_shape_are_refused(table: np.ndarray) -> None:
    history, time = np.ones((2, 4), np.int32), np.zeros(2, np.int64)
    with pytest.raises(ValueError, match=r"times of shape \(2, 0\), expected \(2, 4\)"):
        Repeat(table).scores_of(history, np.zeros((2, 0), np.int64), time, time > 0)


def test_a_table_of_another_length_is_refused(table: np.ndarray) -> None:
    with pytest.raises(ValueError, match=f"a table of {TABLE_SIZE - 1} numbers, expected {TABLE_SIZE}"):
        Repeat(table[:-1])
