"""Estimators by hand, their exact expectations over all cases, and how they relate."""

import itertools

import numpy as np
import pytest

from bench.estimators import ips
from jaxrec.rl.ope.estimators import Terms, doubly_robust, on_policy, self_normalized_doubly_robust, snips
from jaxrec.rl.ope.weights import importance_weights, slate_weights
from tests.rl.ope.logs import (
    CORRECTIONS,
    LOGGED,
    MODEL,
    NEW,
    Q_LOGGED,
    Q_NEW,
    REWARDS,
    VALUE_LOGGED,
    VALUE_NEW,
    WEIGHTS,
    draw_bandit,
    every_case,
)


def test_estimators_by_hand() -> None:
    assert ips(WEIGHTS, REWARDS).value() == pytest.approx((2 + 0.5) / 3)
    assert snips(WEIGHTS, REWARDS).value() == pytest.approx((2 + 0.5) / 6.5)
    assert on_policy(REWARDS).value() == pytest.approx(2 / 3)
    assert doubly_robust(WEIGHTS, REWARDS, Q_LOGGED, Q_NEW).value() == pytest.approx(MODEL + sum(CORRECTIONS) / 3)
    assert self_normalized_doubly_robust(WEIGHTS, REWARDS, Q_LOGGED, Q_NEW).value() == pytest.approx(
        MODEL + sum(CORRECTIONS) / 6.5
    )


def test_expectations_are_exact_over_all_cases() -> None:
    """Summed over every context, action and reward with its probability, IPS and DR are the new policy's value."""
    log, probability = every_case()
    weights = importance_weights(log.new, log.logged)
    assert probability.sum() == pytest.approx(1)
    for terms in (ips(weights, log.reward), doubly_robust(weights, log.reward, log.q_logged, log.q_new)):
        assert probability @ terms.numerator[:, 0] == pytest.approx(VALUE_NEW)
    assert probability @ on_policy(log.reward).numerator[:, 0] == pytest.approx(VALUE_LOGGED)
    for terms in (
        snips(weights, log.reward),
        self_normalized_doubly_robust(weights, log.reward, log.q_logged, log.q_new),
    ):
        assert np.sum((probability @ terms.numerator) / (probability @ terms.denominator)) == pytest.approx(VALUE_NEW)


def test_doubly_robust_is_exact_where_the_propensities_are_wrong_but_the_model_is_right() -> None:
    log, probability = every_case()
    wrong = importance_weights(log.new, np.log(np.full(len(log.new), 1 / 3)))
    right = log._replace(model=(log.model - np.array([[0.3, -0.1, 0.05], [0.0, 0.2, -0.15]])[log.context]) / 0.7)
    terms = doubly_robust(wrong, log.reward, right.q_logged, right.q_new)
    assert probability @ terms.numerator[:, 0] == pytest.approx(VALUE_NEW)
    assert probability @ ips(wrong, log.reward).numerator[:, 0] != pytest.approx(VALUE_NEW, abs=0.01)


def test_new_policy_equal_to_the_logged_one_is_on_policy() -> None:
    log = draw_bandit(200, seed=0)
    same = importance_weights(log.logged, log.logged)
    q = log.q_logged  # the mean over one known action
    for terms in (
        ips(same, log.reward),
        snips(same, log.reward),
        doubly_robust(same, log.reward, q, q),
        self_normalized_doubly_robust(same, log.reward, q, q),
    ):
        assert terms.value() == pytest.approx(on_policy(log.reward).value())
        assert terms.minus(on_policy(log.reward)).value() == pytest.approx(0.0, abs=1e-12)


def test_self_normalized_is_exact_for_a_constant_reward() -> None:
    log = draw_bandit(50, seed=1)
    weights = importance_weights(log.new, log.logged)
    assert snips(weights, np.full(50, 0.3)).value() == pytest.approx(0.3)
    assert ips(weights, np.full(50, 0.3)).value() != pytest.approx(0.3, abs=1e-3)


def slates() -> tuple[np.ndarray, np.ndarray]:
    """All slates of 2 of 3 items [slates, 2], and the probability of each under context 0's policies [2, slates, 2]:
    of each slot, given the slot before."""
    pairs = np.array(list(itertools.permutations(range(3), 2)))
    policies = np.stack([LOGGED[0], NEW[0]])
    first = policies[:, pairs[:, 0]]
    return pairs, np.stack([first, policies[:, pairs[:, 1]] / (1 - first)], axis=-1)


def test_slate_expectations_are_exact_under_the_cascade() -> None:
    """Rewards of the second slot depend on the first item: IPS, SNIPS and DR with any model still give the value."""
    pairs, probabilities = slates()
    rewards = np.stack([pairs[:, 0] / 4, (pairs[:, 0] + 1) * pairs[:, 1] / 8], axis=1)
    logged, new = probabilities.prod(axis=-1)
    value = float(new @ rewards.sum(axis=1))
    weights = slate_weights(np.log(probabilities[1]), np.log(probabilities[0]))
    assert logged @ ips(weights, rewards).numerator[:, 0] == pytest.approx(value)
    normalized = snips(weights, rewards)
    assert np.sum((logged @ normalized.numerator) / (logged @ normalized.denominator)) == pytest.approx(value)

    model = np.array([[0.5, 0.1, 0.3], [0.2, 0.4, 0.6]])  # [slot, item]; the model of the second knows no first item
    second = np.array([[NEW[0, j] / (1 - NEW[0, i]) if i != j else 0.0 for j in range(3)] for i in range(3)])
    q_logged = np.stack([model[0, pairs[:, 0]], model[1, pairs[:, 1]]], axis=1)
    q_new = np.stack([np.full(len(pairs), NEW[0] @ model[0]), second[pairs[:, 0]] @ model[1]], axis=1)
    robust = doubly_robust(weights, rewards, q_logged, q_new)
    assert logged @ robust.numerator[:, 0] == pytest.approx(value)
    both = self_normalized_doubly_robust(weights, rewards, q_logged, q_new)
    assert np.sum((logged @ both.numerator) / (logged @ both.denominator)) == pytest.approx(value)


def test_ignoring_the_slots_above_is_biased_under_the_cascade() -> None:
    """What `lookback` 1 costs: the weights of the second slot alone give another value."""
    pairs, probabilities = slates()
    rewards = np.stack([pairs[:, 0] / 4, (pairs[:, 0] + 1) * pairs[:, 1] / 8], axis=1)
    logged, new = probabilities.prod(axis=-1)
    weights = slate_weights(np.log(probabilities[1]), np.log(probabilities[0]), lookback=1)
    biased = float(logged @ ips(weights, rewards).numerator[:, 0])
    assert abs(biased - new @ rewards.sum(axis=1)) > 0.02


def test_slate_of_one_slot_is_a_single_action() -> None:
    log = draw_bandit(30, seed=2)
    single = importance_weights(log.new, log.logged)
    slate = slate_weights(log.new[:, None], log.logged[:, None])
    for estimator in (ips, snips):
        assert estimator(slate, log.reward[:, None]).value() == pytest.approx(estimator(single, log.reward).value())
    assert doubly_robust(slate, log.reward[:, None], log.q_logged[:, None], log.q_new[:, None]).value() == (
        pytest.approx(doubly_robust(single, log.reward, log.q_logged, log.q_new).value())
    )


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match=r"row 1, slot 0: nan"):
        ips(WEIGHTS, np.array([1.0, np.nan, 0.0]))
    with pytest.raises(ValueError, match="no weight"):
        snips(importance_weights(np.full(3, -np.inf), np.zeros(3)), REWARDS).value()


def test_shapes_must_be_equal() -> None:
    """Rewards of whole slates [rows] against weights of slots [rows, slots] would count each reward in every slot."""
    slate = slate_weights(np.zeros((3, 2)), np.zeros((3, 2)))
    for estimator in (ips, snips):
        for weights, rewards in ((slate, REWARDS), (WEIGHTS, REWARDS[:, None]), (WEIGHTS, REWARDS[:1])):
            with pytest.raises(ValueError, match=r"rewards of shape .*, expected .* as the weights"):
                estimator(weights, rewards)
    for robust in (doubly_robust, self_normalized_doubly_robust):
        with pytest.raises(ValueError, match=r"q_logged of shape \(1,\)"):
            robust(WEIGHTS, REWARDS, Q_LOGGED[:1], Q_NEW)
        with pytest.raises(ValueError, match=r"q_new of shape \(3, 1\)"):
            robust(WEIGHTS, REWARDS, Q_LOGGED, Q_NEW[:, None])
    with pytest.raises(ValueError, match=r"shapes \(3, 1\) \(numerator\) and \(3, 2\)"):
        Terms(np.ones((3, 1)), np.ones((3, 2))).value()
    with pytest.raises(ValueError, match="terms of 3 and of 2 rows"):
        on_policy(REWARDS).minus(on_policy(REWARDS[:2]))


def test_doubly_robust_slates_need_whole_products() -> None:
    """Cascade-DR adds up over slots only if each weight is the product of all ratios above."""
    ratio, rewards = np.log(np.full((3, 2), 0.2)), np.ones((3, 2))
    for weights in (
        slate_weights(ratio, ratio - 1.0, lookback=1),
        slate_weights(ratio, ratio - 1.0, cap=2.0),
    ):
        for robust in (doubly_robust, self_normalized_doubly_robust):
            with pytest.raises(ValueError, match="expected uncapped weights over whole slates"):
                robust(weights, rewards, rewards, rewards)


def test_terms_do_not_change_their_input() -> None:
    rewards = REWARDS.copy()
    terms = snips(WEIGHTS, rewards)
    terms.minus(on_policy(rewards)).value()
    np.testing.assert_array_equal(rewards, REWARDS)
    assert isinstance(terms, Terms)
