"""The gate's decisions, and their reasons."""

from typing import Any

import numpy as np
import pytest

from jaxrec.rl.offline_evaluation.estimators import ips, on_policy, snips
from jaxrec.rl.offline_evaluation.gating import Decision, gate
from jaxrec.rl.offline_evaluation.weights import importance_weights, slate_weights
from tests.rl.offline_evaluation.logs import VALUE_LOGGED, VALUE_NEW, draw_bandit


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
