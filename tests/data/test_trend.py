"""Decayed counts: values by hand, the moment itself left out, and the order in which moments are asked for."""

import numpy as np
import pytest

from jaxrec.data.prepared import PreparedData
from jaxrec.data.trend import HALF_LIVES_S, DecayedCounts

DAY = 86_400
HOURS_6, DAY_1 = (HALF_LIVES_S.index(seconds) for seconds in (DAY // 4, DAY))


def test_an_event_halves_with_each_half_life() -> None:
    counts = DecayedCounts(np.array([2, 1, 1]), np.array([0, 0, DAY]), item_count=3)
    (found,) = counts.before(np.array([2 * DAY]))
    np.testing.assert_allclose(found[DAY_1], [0, 1 / 2 + 1 / 4, 1 / 4, 0])
    np.testing.assert_allclose(found[HOURS_6], [0, 1 / 16 + 1 / 256, 1 / 256, 0])


def test_the_moment_itself_is_left_out_before_it_and_counted_until_it() -> None:
    counts = DecayedCounts(np.array([1, 2, 2]), np.array([10, 20, 30]), item_count=2)
    np.testing.assert_array_equal(counts.before(np.array([10]))[0], np.zeros((len(HALF_LIVES_S), 3)))
    np.testing.assert_allclose(counts.before(np.array([11, 20]))[:, DAY_1, 1:], [[1, 0], [1, 0]], atol=1e-3)
    np.testing.assert_allclose(counts.until(20)[DAY_1], [0, 1, 1], atol=1e-3)
    np.testing.assert_array_equal(counts.until(9), np.zeros((len(HALF_LIVES_S), 3)))
    assert counts.last_time == 30


def test_neither_the_order_of_events_nor_that_of_moments_matters() -> None:
    rng = np.random.default_rng(0)
    items, times = rng.integers(1, 9, 300), rng.integers(0, 40 * DAY, 300)
    moments = rng.integers(-DAY, 41 * DAY, 50)
    ages = moments[:, None] - times
    for half_life, seconds in enumerate(HALF_LIVES_S):
        weights = np.where(ages > 0, 0.5 ** (np.maximum(ages, 0) / seconds), 0)
        expected = np.stack([np.bincount(items, of_moment, 9) for of_moment in weights])
        shuffled = rng.permutation(300)
        for events in (np.arange(300), shuffled):
            counts = DecayedCounts(items[events], times[events], item_count=8)
            one_by_one = np.concatenate([counts.before(moments[at, None]) for at in range(50)])
            np.testing.assert_allclose(counts.before(moments)[:, half_life], expected, rtol=1e-5, atol=1e-7)
            np.testing.assert_allclose(one_by_one[:, half_life], expected, rtol=1e-5, atol=1e-7)


def test_events_of_validation_and_test_count_for_later_cases(small_data: PreparedData) -> None:
    histories = small_data.histories
    last = int(np.max(histories.times))
    everything = DecayedCounts.of(small_data).until(last)
    total = (0.5 ** ((last - np.asarray(histories.times)) / HALF_LIVES_S[-1])).sum()
    assert everything[-1].sum() == pytest.approx(total, rel=1e-5)
    assert len(histories.times) > small_data.split.train_counts.sum()


def test_parts_of_a_long_log_are_counted_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    items, times = rng.integers(1, 9, 100), np.sort(rng.integers(0, 40 * DAY, 100))
    whole = DecayedCounts(items, times, item_count=8).until(50 * DAY)
    monkeypatch.setattr("jaxrec.data.trend.EVENTS_AT_A_TIME", 7)
    np.testing.assert_allclose(DecayedCounts(items, times, item_count=8).until(50 * DAY), whole, rtol=1e-6)


def test_without_events_there_is_nothing() -> None:
    counts = DecayedCounts(np.empty(0, np.int32), np.empty(0, np.int64), item_count=2)
    np.testing.assert_array_equal(counts.until(5), np.zeros((len(HALF_LIVES_S), 3)))
    assert counts.last_time == 0
