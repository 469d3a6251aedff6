"""Bootstrap intervals against known distributions, and by hand."""

import numpy as np
import pytest
import scipy.stats

from bench.estimators import bias_corrected_accelerated, ips, percentile
from jaxrec.rl.ope.estimators import Terms, on_policy, snips
from jaxrec.rl.ope.intervals import IntervalMethod, degrees_of_freedom, interval, replicates, studentized
from jaxrec.rl.ope.weights import importance_weights
from tests.rl.ope.logs import VALUE_LOGGED, VALUE_NEW, draw_bandit


def mean_of(values: np.ndarray) -> Terms:
    return on_policy(values)


def test_studentized_interval_of_a_normal_mean_is_that_of_student() -> None:
    values = np.random.default_rng(0).normal(size=400)
    ours = interval(mean_of(values), samples=20_000)
    low, high = scipy.stats.t.interval(0.95, 399, values.mean(), values.std(ddof=1) / 20)
    assert ours.standard_error == pytest.approx(values.std(ddof=1) / 20)
    np.testing.assert_allclose([ours.low, ours.high], [low, high], atol=0.08 * ours.standard_error)


def test_standard_error_of_a_ratio_by_hand() -> None:
    """SNIPS of weights 1, 1, 2 and rewards 1, 0, 1: θ = 3/4, errors w (r - θ) / sum(w) = 1/16, -3/16, 1/8."""
    weights = importance_weights(np.log([0.1, 0.1, 0.2]), np.log([0.1, 0.1, 0.1]))
    drawn = replicates(snips(weights, np.array([1.0, 0.0, 1.0])), None, 100, 0)
    np.testing.assert_allclose(drawn.influence, [1 / 16, -3 / 16, 1 / 8])
    assert drawn.standard_error == pytest.approx(np.sqrt(3 / 2 * (1 / 16**2 + 9 / 16**2 + 1 / 8**2)))


def test_replicates_of_the_bootstrap_have_the_standard_error() -> None:
    log = draw_bandit(2000, seed=0)
    drawn = replicates(snips(importance_weights(log.new, log.logged), log.reward), None, 4000, 0)
    assert drawn.values.std() == pytest.approx(drawn.standard_error, rel=0.05)
    assert drawn.standard_errors.mean() == pytest.approx(drawn.standard_error, rel=0.05)


def test_rows_of_one_user_do_not_count_as_independent() -> None:
    """Every row ten times: with users the interval is that of the rows once, without them it is too narrow."""
    values = np.random.default_rng(0).normal(size=100)
    users = np.repeat(np.arange(100), 10)
    once, grouped = interval(mean_of(values)), interval(mean_of(np.repeat(values, 10)), users)
    assert (grouped.low, grouped.high) == pytest.approx((once.low, once.high))
    naive = interval(mean_of(np.repeat(values, 10)))
    assert naive.high - naive.low < 0.4 * (once.high - once.low)


def test_order_of_rows_and_names_of_users_do_not_matter() -> None:
    log = draw_bandit(300, seed=0)
    users = np.arange(300) // 3
    terms = snips(importance_weights(log.new, log.logged), log.reward)
    order = np.concatenate([np.arange(2, -1, -1) + 3 * user for user in range(100)])
    turned = Terms(terms.numerator[order], terms.denominator[order])
    names = np.array([f"user {user:03}" for user in users])
    first, second = interval(terms, users), interval(turned, names[order])
    assert (first.low, first.high) == pytest.approx((second.low, second.high))


def test_a_pair_is_told_apart_better_than_its_halves() -> None:
    log = draw_bandit(2000, seed=0)
    near = importance_weights(np.log(0.9 * np.exp(log.logged) + 0.1 * np.exp(log.new)), log.logged)
    new, logged = ips(near, log.reward), on_policy(log.reward)
    gain = interval(new.minus(logged))
    halves = np.hypot(interval(new).standard_error, interval(logged).standard_error)
    assert gain.standard_error < 0.5 * halves


@pytest.mark.parametrize("method", [studentized, percentile, bias_corrected_accelerated])
def test_without_spread_the_interval_is_the_value(method: IntervalMethod) -> None:
    estimate = interval(mean_of(np.full(20, 0.25)), method=method)
    assert (estimate.low, estimate.value, estimate.high) == (0.25, 0.25, 0.25)


@pytest.mark.parametrize("method", [studentized, percentile, bias_corrected_accelerated])
@pytest.mark.parametrize(("rows", "reward"), [(20, 0.1), (37, 0.3), (20, -1e6 / 3)])
def test_rounding_is_no_spread(method: IntervalMethod, rows: int, reward: float) -> None:
    """Sums of 0.1 differ in their last bit; studentized by that, the interval of a constant was inf to inf."""
    estimate = interval(mean_of(np.full(rows, reward)), method=method)
    assert (estimate.low, estimate.value, estimate.high) == pytest.approx((reward, reward, reward), rel=1e-12)
    assert estimate.low <= estimate.value <= estimate.high
    gain = interval(mean_of(np.full(rows, reward)).minus(mean_of(np.full(rows, reward))), method=method)
    assert (gain.low, gain.value, gain.high, gain.standard_error) == (0, 0, 0, 0)


@pytest.mark.parametrize(("ends", "expected"), [((0.6, 0.7), (0.5, 0.7)), ((np.inf, np.inf), (-np.inf, np.inf))])
def test_interval_holds_the_value(ends: tuple[float, float], expected: tuple[float, float]) -> None:
    """Whatever a method makes of the resamples; a bound that is no number is none."""
    estimate = interval(mean_of(np.array([0.0, 1.0])), samples=10, method=lambda replicates, level: ends)
    assert (estimate.low, estimate.high) == expected


def test_rare_rewards_leave_the_upper_bound_open() -> None:
    """One reward in 50 rows: a third of the resamples have none, and no spread to studentize with."""
    estimate = interval(mean_of(np.eye(50)[0]))
    assert estimate.low < estimate.value < estimate.high == np.inf


def test_one_group_has_no_interval() -> None:
    with pytest.raises(ValueError, match="1 group"):
        interval(mean_of(np.arange(5.0)), np.zeros(5))


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    """200 logs of 300 rows, the value and the paired gain; the binomial standard error of a share is 1.5 %."""
    covered = np.zeros((200, 2), bool)
    for seed in range(200):
        log = draw_bandit(300, seed)
        new, logged = snips(importance_weights(log.new, log.logged), log.reward), on_policy(log.reward)
        for column, (terms, truth) in enumerate(((new, VALUE_NEW), (new.minus(logged), VALUE_NEW - VALUE_LOGGED))):
            found = interval(terms, samples=400, seed=seed)
            covered[seed, column] = found.low <= truth <= found.high
    np.testing.assert_allclose(covered.mean(axis=0), 0.95, atol=0.045)


def test_heavy_tails_widen_the_interval() -> None:
    """Ten values of which one is far from the others: t with 2.7 degrees of freedom has 1.49 times the quantile of t
    with 9, and the bound is that much further away than that of the bootstrap alone."""
    values = np.array([10.0] + [0.0] * 9)
    drawn = replicates(mean_of(values), None, 2000, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.where(drawn.values == drawn.value, 0.0, (drawn.values - drawn.value) / drawn.standard_errors)
    low, _ = studentized(drawn, 0.95)
    alone = drawn.value - np.quantile(t, 0.975, method="higher") * drawn.standard_error
    ratio = scipy.stats.t.ppf(0.975, 2.727272727) / scipy.stats.t.ppf(0.975, 9)
    assert ratio == pytest.approx(1.49, abs=0.01)
    assert drawn.value - low == pytest.approx(ratio * (drawn.value - alone))


def test_degrees_of_freedom_are_those_of_the_variance_of_the_variance() -> None:
    """2 s^4 / m is the variance of s^2, by 40,000 samples of 50 values of an exponential distribution (g = 6)."""
    values = np.random.default_rng(0).exponential(size=(40_000, 50))
    expected = 2 / np.var(values.var(axis=1, ddof=1))  # the variance of the distribution is 1
    whole = np.random.default_rng(1).exponential(size=2_000_000)
    whole = whole - whole.mean()
    excess = np.mean(whole**4) / np.mean(whole**2) ** 2 - 3
    assert 2 / (2 / 49 + excess / 50) == pytest.approx(expected, rel=0.05)
    assert degrees_of_freedom(whole) == pytest.approx(2 / (2 / (len(whole) - 1) + excess / len(whole)))


def test_heavy_tails_are_covered_more_often_than_by_the_bootstrap_alone() -> None:
    """Means of 60 values of a lognormal distribution with sigma 1.5, 300 logs: the bootstrap alone covers the truth in
    less than nine of ten; the standard error of a share is 1.7 %."""
    truth, covered = np.exp(1.5**2 / 2), np.zeros((300, 2), bool)
    for seed in range(300):
        drawn = replicates(mean_of(np.random.default_rng(seed).lognormal(0, 1.5, 60)), None, 400, seed)
        low, high = studentized(drawn, 0.95)
        freedom = degrees_of_freedom(drawn.influence)
        factor = scipy.stats.t.ppf(0.975, freedom) / scipy.stats.t.ppf(0.975, 59)
        alone = drawn.value - (drawn.value - low) / factor, drawn.value + (high - drawn.value) / factor
        covered[seed] = low <= truth <= high, alone[0] <= truth <= alone[1]
    wider, alone_share = covered.mean(axis=0)
    assert alone_share < 0.91
    assert wider > alone_share + 0.01
