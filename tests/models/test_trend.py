"""The trend of decayed counts: its formula, and what it must not depend on."""

import jax.numpy as jnp
import numpy as np

from jaxrec.models.trend import Trend


def a_trend(typical: float) -> Trend:
    views = np.array([[1.0, 0, 0, 0, 0, 0], [0.25, 0, 0, 0, 0, 0]])
    return Trend(views, np.full(6, typical))


def counts_of(*events: float) -> np.ndarray:
    """The first half-life's counts; the others have none."""
    counts = np.zeros((6, 1 + len(events)), np.float32)
    counts[0, 1:] = events
    return counts


def test_the_formula_by_hand() -> None:
    # 4 events where 12 are usual: each counts 2 * 12 / (4 + 12) = 1.5 times.
    trend = a_trend(12)(counts_of(3, 1, 0))
    expected = [0, np.log(1 + 4.5 / 0.5) + 0.25 * np.sqrt(4.5), np.log(1 + 1.5 / 0.5) + 0.25 * np.sqrt(1.5), 0]
    np.testing.assert_allclose(trend, expected, rtol=1e-6)


def test_without_recent_events_no_item_has_a_trend() -> None:
    np.testing.assert_array_equal(a_trend(12)(counts_of(0, 0)), np.zeros(3))
    np.testing.assert_array_equal(a_trend(0)(counts_of(0, 0)), np.zeros(3))
    np.testing.assert_array_equal(Trend.none()(counts_of(5, 9)), np.zeros(3))


def test_a_hundred_times_the_traffic_is_at_most_twice_the_usual_count() -> None:
    busy, usual = a_trend(10)(counts_of(600, 400)), a_trend(10)(counts_of(6, 4))
    doubled = np.log(1 + 12 / 0.5) + 0.25 * np.sqrt(12)
    assert usual[1] < busy[1] < doubled


def test_a_batch_of_moments_equals_each_alone() -> None:
    moments = np.stack([counts_of(1, 2), counts_of(5, 0)])
    trend = a_trend(4)
    np.testing.assert_allclose(trend(moments), jnp.stack([trend(moments[0]), trend(moments[1])]), rtol=1e-6)
