"""The trends of a server's recommendations, computed again from the events that it had counted."""

import numpy as np
import pytest

from jaxrec.data.prepared import PreparedData
from jaxrec.data.trend import HALF_LIVES_S
from jaxrec.models.hybrid import Hybrid
from jaxrec.models.trend import Trend
from jaxrec.rl.served.trends import ArrivedEvents, Moment, served_trends

HOUR = 3600


def arrived(*events: tuple[int, int, int]) -> ArrivedEvents:
    """Item, time and arrival of each."""
    return ArrivedEvents(*np.array(events, np.int64).reshape(-1, 3).T)


def last_time(data: PreparedData) -> int:
    return int(np.asarray(data.histories.times).max())


def simply_counted(data: PreparedData, events: ArrivedEvents, moment: Moment) -> np.ndarray:
    """[half-lives, items + 1]: one event after the other."""
    counts, end = np.zeros((len(HALF_LIVES_S), len(data.catalog) + 1)), last_time(data)
    own = zip(np.asarray(data.histories.items).tolist(), np.asarray(data.histories.times).tolist(), strict=True)
    later = [(item, at) for item, at, arrival in zip(*events, strict=True) if arrival <= moment.arrival and at > end]
    for item, at in [*own, *later]:
        counts[:, item] += 0.5 ** (max(moment.time - at, 0) / np.array(HALF_LIVES_S))
    return counts


def test_counts_are_those_of_the_run_and_of_what_arrived_later(small_data: PreparedData, small_hybrid: Hybrid) -> None:
    end = last_time(small_data)
    events = arrived(
        (3, end + HOUR, 1),
        (4, end, 2),  # in the run's data, and imported
        (5, end + 2 * HOUR, 5),
        (3, end + 1.5 * HOUR, 6),
        (7, end + 3 * HOUR, 9),
    )
    # Of two servers, the second one is a few seconds behind; and the order of the moments does not matter.
    moments = [
        Moment(end + 4 * HOUR, 9),
        Moment(end + 2 * HOUR + 5, 6),
        Moment(end + 2 * HOUR + 2, 6),
        Moment(end + HOUR, 0),
    ]
    trends = served_trends(small_hybrid, small_data, moments, events)
    assert not trends.at(np.array([0])).any()
    for number, moment in enumerate(moments, start=1):
        expected = small_hybrid.trend(simply_counted(small_data, events, moment).astype(np.float32))
        np.testing.assert_allclose(trends.at(np.array([number]))[0], expected, rtol=2e-4, atol=1e-5)


def test_an_event_dated_ahead_counts_as_of_when_it_arrived(small_data: PreparedData, small_hybrid: Hybrid) -> None:
    end = last_time(small_data)
    moments = [Moment(end + HOUR, 1), Moment(end + 2 * HOUR, 1)]
    ahead, true = (
        served_trends(small_hybrid, small_data, moments, arrived((3, end + hours * HOUR, 1))) for hours in (9, 1)
    )
    np.testing.assert_array_equal(ahead.values, true.values)


def test_moments_share_a_trend_where_memory_is_short(small_data: PreparedData, small_hybrid: Hybrid) -> None:
    end, width = last_time(small_data), 4 * (len(small_data.catalog) + 1)
    events = arrived(*((1 + at, end + at, at) for at in range(1, 9)))
    moments = [Moment(end + at * HOUR, at) for at in range(1, 9)]
    every = served_trends(small_hybrid, small_data, moments, events, most_bytes=8 * width)
    assert every.of_moment.tolist() == list(range(9))
    some = served_trends(small_hybrid, small_data, moments, events, most_bytes=3 * width)
    assert some.of_moment.tolist() == [0, 1, 1, 1, 2, 2, 2, 3, 3]
    np.testing.assert_array_equal(np.asarray(some.values)[1:], np.asarray(every.values)[[1, 4, 7]])


@pytest.mark.parametrize("moments", [[], [Moment(2_000_000_000, 1)]])
def test_without_a_trend_nothing_is_added(
    moments: list[Moment], small_data: PreparedData, small_hybrid: Hybrid
) -> None:
    """Because the log notes none, or because the mix has none."""
    models = small_hybrid.lstm, small_hybrid.content, small_hybrid.cooccurrence
    hybrid = Hybrid(*models, small_hybrid.mix_weights(), Trend.none()) if moments else small_hybrid
    trends = served_trends(hybrid, small_data, moments, arrived((1, 1_999_999_999, 1)))
    assert np.asarray(trends.values).shape == (1, len(small_data.catalog) + 1)
    assert not trends.at(np.arange(len(moments) + 1)).any()
