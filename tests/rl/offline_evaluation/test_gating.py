"""Intervals against known distributions, and the gate's decisions with their reasons."""

from typing import Any

import numpy as np
import pytest
import scipy.stats

from jaxrec.rl.offline_evaluation.estimators import Terms, ips, on_policy, snips
from jaxrec.rl.offline_evaluation.gating import Decision, gate
from jaxrec.rl.offline_evaluation.intervals import (
    Method,
    bias_corrected_accelerated,
    interval,
    percentile,
    replicates,
    studentized,
)
from jaxrec.rl.offline_evaluation.weights import importance_weights, slate_weights
from tests.rl.offline_evaluation.logs import VALUE_LOGGED, VALUE_NEW, draw_bandit


def mean_of(values: np.ndarray) -> Terms:
    return on_policy(values)


@pytest.mark.parametrize("method", [percentile, bias_corrected_accelerated])
def test_intervals_agree_with_scipy(method: Method) -> None:
    """On the mean of skewed values, with other random draws: the ends agree to a fraction of the standard error."""
    values = np.random.default_rng(3).exponential(size=80)
    name = "percentile" if method is percentile else "BCa"
    expected = scipy.stats.bootstrap((values,), np.mean, method=name, n_resamples=20_000, rng=np.random.default_rng(1))
    ours = interval(mean_of(values), samples=20_000, method=method)
    bounds = expected.confidence_interval
    assert abs(ours.low - bounds.low) < 0.05 * expected.standard_error
    assert abs(ours.high - bounds.high) < 0.05 * expected.standard_error


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
def test_without_spread_the_interval_is_the_value(method: Method) -> None:
    estimate = interval(mean_of(np.full(20, 0.25)), method=method)
    assert (estimate.low, estimate.value, estimate.high) == (0.25, 0.25, 0.25)


def test_rare_rewards_leave_the_upper_bound_open() -> None:
    """One reward in 50 rows: a third of the resamples have none, and no spread to studentize with."""
    estimate = interval(mean_of(np.eye(50)[0]))
    assert estimate.low < estimate.value < estimate.high == np.inf


def test_one_group_has_no_interval() -> None:
    with pytest.raises(ValueError, match="1 group"):
        interval(mean_of(np.arange(5.0)), np.zeros(5))


def decide(rows: int, seed: int = 0, **changes: Any) -> Decision:
    log = draw_bandit(rows, seed)
    weights = importance_weights(log.new, log.logged)
    return gate(snips(weights, log.reward), on_policy(log.reward), weights, **changes)


def test_gate_lets_a_better_policy_pass() -> None:
    decision = decide(3000)
    assert decision.used
    log = draw_bandit(3000, 0)
    expected = (np.exp(log.new - log.logged).sum() ** 2) / np.sum(np.exp(2 * (log.new - log.logged)))
    assert decision.effective_sample_size == pytest.approx(expected)
    assert decision.new is not None
    assert decision.logged is not None
    assert decision.gain is not None
    assert decision.gain.low < VALUE_NEW - VALUE_LOGGED < decision.gain.high
    assert decision.gain.value == pytest.approx(decision.new.value - decision.logged.value)
    assert "the new policy may be used: it is worth 0." in decision.reason
    assert "over 3000 decisions (effective sample size" in decision.reason


def test_gate_refuses_a_worse_policy_and_one_without_gain() -> None:
    log = draw_bandit(3000, 0)
    weights = importance_weights(log.new, log.logged)
    worse = gate(snips(weights, 1 - log.reward), on_policy(1 - log.reward), weights)
    assert not worse.used
    assert worse.gain is not None
    assert worse.gain.high < 0
    assert "the logged policy stays in use: a gain above 0 is not shown" in worse.reason
    same = importance_weights(log.logged, log.logged)
    nothing = gate(snips(same, log.reward), on_policy(log.reward), same)
    assert not nothing.used
    assert nothing.effective_sample_size == pytest.approx(3000)
    gain = VALUE_NEW - VALUE_LOGGED
    assert not gate(snips(weights, log.reward), on_policy(log.reward), weights, least_gain=2 * gain).used


def test_gate_refuses_where_the_log_says_too_little() -> None:
    few = decide(60, minimum_effective=50.0)
    assert not few.used
    assert few.gain is None
    assert "the effective sample size is" in few.reason
    assert "of 60 decisions, expected at least 50" in few.reason
    users = decide(3000, groups=np.arange(3000) % 20)
    assert "of 3000 decisions of 20 users, expected at least 100" in users.reason
    one = decide(3000, groups=np.zeros(3000))
    assert "3000 decisions of 1 users, expected at least two" in one.reason
    assert "the log has 0 decisions" in decide(0).reason


def test_gate_refuses_wrong_propensities() -> None:
    """A log whose policy says less of each action than it did: every weight is 1.2 times too large."""
    log = draw_bandit(3000, 0)
    weights = importance_weights(log.new, log.logged - np.log(1.2))
    decision = gate(ips(weights, log.reward), on_policy(log.reward), weights)
    assert not decision.used
    assert decision.mean_weight == pytest.approx(1.2, abs=0.05)
    assert "the propensities are not those of the policy that made the log" in decision.reason


def test_gate_judges_slates() -> None:
    """Two slots that are drawn from the bandit each: the second slot's weight is a product, its sample size less."""
    first, second = draw_bandit(4000, 0), draw_bandit(4000, 1)
    new, logged = (np.stack(pair, axis=1) for pair in ((first.new, second.new), (first.logged, second.logged)))
    discounts = np.array([0.7, 0.3])
    rewards = np.stack([first.reward, second.reward], axis=1) * discounts
    weights = slate_weights(new, logged)
    decision = gate(snips(weights, rewards), on_policy(rewards), weights, discounts=discounts)
    assert decision.used
    assert decision.gain is not None
    assert decision.gain.low < VALUE_NEW - VALUE_LOGGED < decision.gain.high
    alone = importance_weights(second.new, second.logged)
    single = gate(snips(alone, second.reward), on_policy(second.reward), alone)
    assert decision.effective_sample_size < single.effective_sample_size


def test_policy_that_never_does_what_was_logged_is_refused() -> None:
    log = draw_bandit(100, 0)
    weights = importance_weights(np.full(100, -np.inf), log.logged)
    decision = gate(snips(weights, log.reward), on_policy(log.reward), weights)
    assert not decision.used
    assert decision.effective_sample_size == 0
