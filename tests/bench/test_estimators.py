"""Estimators and intervals of the benchmarks, by hand and against scipy."""

import numpy as np
import pytest
import scipy.stats

from bench.estimators import bias_corrected_accelerated, percentile, switch_doubly_robust
from jaxrec.rl.ope.estimators import on_policy
from jaxrec.rl.ope.intervals import IntervalMethod, interval
from jaxrec.rl.ope.weights import importance_weights, slate_weights
from tests.rl.ope.logs import CORRECTIONS, MODEL, Q_LOGGED, Q_NEW, REWARDS, WEIGHTS, draw_bandit


@pytest.mark.parametrize(("threshold", "kept"), [(0.0, 0), (0.5, 1), (2.0, 2), (4.0, 3), (np.inf, 3)])
def test_switch_by_hand(threshold: float, kept: int) -> None:
    trusted = sorted(zip((2, 0.5, 4), CORRECTIONS, strict=True))[:kept]
    expected = MODEL + sum(correction for _, correction in trusted) / 3
    estimate = switch_doubly_robust(WEIGHTS, REWARDS, Q_LOGGED, Q_NEW, threshold + 1e-9)
    assert estimate.value() == pytest.approx(expected)


def test_switch_of_the_logged_policy_is_on_policy() -> None:
    log = draw_bandit(200, seed=0)
    same = importance_weights(log.logged, log.logged)
    terms = switch_doubly_robust(same, log.reward, log.q_logged, log.q_logged, 1.0 + 1e-9)
    assert terms.value() == pytest.approx(on_policy(log.reward).value())
    assert terms.minus(on_policy(log.reward)).value() == pytest.approx(0.0, abs=1e-12)


def test_switching_slates_is_refused() -> None:
    with pytest.raises(ValueError, match="expected"):
        switch_doubly_robust(slate_weights(np.zeros((2, 2)), np.zeros((2, 2))), np.ones((2, 2)), *np.ones((2, 2, 2)), 1)


@pytest.mark.parametrize("method", [percentile, bias_corrected_accelerated])
def test_intervals_agree_with_scipy(method: IntervalMethod) -> None:
    """On the mean of skewed values, with other random draws: the ends agree to a fraction of the standard error."""
    values = np.random.default_rng(3).exponential(size=80)
    name = "percentile" if method is percentile else "BCa"
    expected = scipy.stats.bootstrap((values,), np.mean, method=name, n_resamples=20_000, rng=np.random.default_rng(1))
    ours = interval(on_policy(values), samples=20_000, method=method)
    bounds = expected.confidence_interval
    assert abs(ours.low - bounds.low) < 0.05 * expected.standard_error
    assert abs(ours.high - bounds.high) < 0.05 * expected.standard_error
