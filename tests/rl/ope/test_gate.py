"""The gate's decisions, and their reasons."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from bench.estimators import ips, switch_doubly_robust
from jaxrec.rl.ope.estimators import Terms, on_policy, snips
from jaxrec.rl.ope.gate import GateDecision, gate
from jaxrec.rl.ope.intervals import interval
from jaxrec.rl.ope.weights import ImportanceWeights, importance_weights, slate_weights
from tests.rl.ope.logs import VALUE_LOGGED, VALUE_NEW, draw_bandit


def decide(rows: int, seed: int = 0, **changes: Any) -> GateDecision:
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


def test_gate_evaluates_slates() -> None:
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


# Three actions, of which the new policy prefers the rare ones, to its harm: 0.144 instead of 0.271.
RARE, PREFERRED, WORTH = np.array([0.9, 0.09, 0.01]), np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.5, -0.4])


def rare_log(rows: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Log-probabilities of what was drawn, under the new policy and the logged one, and rewards, all [rows]."""
    action = np.random.default_rng(seed).choice(3, rows, p=RARE)
    return np.log(PREFERRED[action]), np.log(RARE[action]), WORTH[action]


@pytest.mark.parametrize("estimator", [ips, snips])
def test_capped_weights_let_no_worse_policy_pass(estimator: Callable[[ImportanceWeights, np.ndarray], Terms]) -> None:
    """The cap takes away the actions at which the new policy is bad: what is left shows a gain."""
    new, logged, rewards = rare_log(10_000, 0)
    capped = importance_weights(new, logged, cap=5.0)
    assert PREFERRED @ WORTH < RARE @ WORTH
    assert interval(snips(capped, rewards).minus(on_policy(rewards)), samples=200).low > 0
    decision = gate(estimator(capped, rewards), on_policy(rewards), capped)
    assert not decision.used
    assert "1.1% of the weights are capped; only uncapped weights over whole slates" in decision.reason
    free = importance_weights(new, logged)
    assert "are capped" in gate(estimator(capped, rewards), on_policy(rewards), free).reason
    assert "are capped" in gate(estimator(free, rewards), snips(capped, rewards), free).reason
    unused = importance_weights(new, logged, cap=1000.0)
    assert "a gain above 0 is not shown" in gate(estimator(unused, rewards), on_policy(rewards), unused).reason


def test_lookback_and_switching_let_nothing_pass() -> None:
    log, other = draw_bandit(3000, 0), draw_bandit(3000, 1)
    new, logged, rewards = (
        np.stack(pair, axis=1)
        for pair in ((log.new, other.new), (log.logged, other.logged), (log.reward, other.reward))
    )
    near = slate_weights(new, logged, lookback=1)
    assert "look back over 1 slot(s)" in gate(snips(near, rewards), on_policy(rewards), near).reason
    whole = slate_weights(new, logged, lookback=2)
    assert gate(snips(whole, rewards), on_policy(rewards), whole).used
    weights = importance_weights(log.new, log.logged)
    switched = switch_doubly_robust(weights, log.reward, log.q_logged, log.q_new, threshold=2.0)
    assert "are switched to the model" in gate(switched, on_policy(log.reward), weights).reason
    kept = switch_doubly_robust(weights, log.reward, log.q_logged, log.q_new, threshold=10.0)
    assert gate(kept, on_policy(log.reward), weights).used


def test_what_the_log_never_did_counts_as_the_least_reward() -> None:
    """A policy that is worse by 0.071, since 18 % of what it does earn nothing and never were logged. The mean weight
    is 0.82, within 4 standard errors of 1 in small logs; self-normalized, the rest speaks for the whole."""
    logged, new, worth = np.array([0.92, 0.08, 0.0]), np.array([0.05, 0.77, 0.18]), np.array([0.6, 0.67, 0.0])
    assert new @ worth < logged @ worth - 0.05
    alone = 0
    for seed in range(6):
        rng = np.random.default_rng(seed)
        action = rng.choice(3, 1700, p=logged)
        rewards = (rng.random(1700) < worth[action]).astype(float)
        weights = importance_weights(np.log(new[action]), np.log(logged[action]))
        decision = gate(snips(weights, rewards), on_policy(rewards), weights)
        assert not decision.used
        alone += "the log may lack what the new policy does (mean weight 0." in decision.reason
    assert alone > 2


def test_at_worst_by_hand() -> None:
    """Weights 1/2 and 1/4 of rewards 1 and 3: 1.25 / 0.75 normalized; at worst 3/8 of the weight and 5/8 of reward 1,
    which is (0.5 * 1 + 0.25 * 3) / 2 + 5/8. Terms that are not normalized stay."""
    weights = importance_weights(np.log([0.2, 0.1]), np.log([0.4, 0.4]))
    rewards = np.array([1.0, 3.0])
    assert snips(weights, rewards).value() == pytest.approx(1.25 / 0.75)
    assert snips(weights, rewards).at_worst().value() == pytest.approx(1.25 / 2 + 5 / 8)
    assert ips(weights, rewards).at_worst().value() == pytest.approx(1.25 / 2)
    assert snips(weights, -rewards).at_worst().value() == pytest.approx(-1.25 / 2 - 3 * 5 / 8)


def test_rows_and_discounts_must_fit() -> None:
    log, short = draw_bandit(3000, 0), draw_bandit(30, 0)
    weights, few = importance_weights(log.new, log.logged), importance_weights(short.new, short.logged)
    new, logged = snips(weights, log.reward), on_policy(log.reward)
    for arguments in (
        (snips(few, short.reward), logged, weights),
        (new, on_policy(short.reward), weights),
        (new, logged, few),
    ):
        with pytest.raises(ValueError, match="expected the same rows"):
            gate(*arguments)
    with pytest.raises(ValueError, match=r"discounts of shape \(2,\), expected one for each of 1 slot"):
        gate(new, logged, weights, discounts=np.array([0.7, 0.3]))
    for wrong in (np.nan, 0.0, -1.0):
        with pytest.raises(ValueError, match="expected finite, at least 0 and not all of them 0"):
            gate(new, logged, weights, discounts=np.array([wrong]))


def test_effective_sample_size_that_is_no_number_is_refused() -> None:
    log = draw_bandit(3000, 0)
    weights = importance_weights(log.new, log.logged)
    broken = weights._replace(log=np.where(np.arange(3000) == 7, np.nan, weights.log))
    decision = gate(snips(weights, log.reward), on_policy(log.reward), broken)
    assert not decision.used
    assert not decide(3000, minimum_effective=float("nan")).used


def test_gain_without_a_finite_bound_is_not_shown() -> None:
    """Rewards that all are 0.1 have no spread but that of rounding; compared with nothing, the gain is 0.1 exactly."""
    same = importance_weights(np.log(np.full(200, 0.5)), np.log(np.full(200, 0.5)))
    rewards = np.full(200, 0.1)
    exact = gate(snips(same, rewards), on_policy(np.zeros(200)), same)
    assert exact.gain is not None
    assert (exact.gain.low, exact.gain.high) == pytest.approx((0.1, 0.1))
    unequal = importance_weights(np.log(np.linspace(0.4, 0.6, 200)), np.log(np.full(200, 0.5)))
    open_bound = gate(snips(unequal, np.eye(200)[0]), on_policy(np.zeros(200)), unequal, least_gain=-np.inf)
    assert open_bound.gain is not None
    assert open_bound.gain.high == np.inf
    flipped = gate(snips(unequal, -np.eye(200)[0]), on_policy(np.zeros(200)), unequal, least_gain=-np.inf)
    assert flipped.gain is not None
    assert flipped.gain.low == -np.inf
    assert not flipped.used
