"""Logs of the synthetic environment: what they hold, and what is learned from them."""

import jax
import numpy as np
import pytest

from bench.environment_policy import EnvironmentPolicy, new_policy, probabilities
from bench.from_environment_log import (
    EnvironmentLog,
    FromLogConfig,
    collect_log,
    fit_to_log,
    next_item_loss,
    off_policy_loss,
)
from bench.synthetic import SyntheticState, acquired_taste, logging_logprobs, synthetic_environment
from bench.synthetic_exact import all_states, best_policy, build_model, value
from jaxrec.rl.simulated.policy import Params

PARAMS = acquired_taste(items_per_topic=3)
ENVIRONMENT = synthetic_environment(PARAMS)


def logging(state: SyntheticState) -> jax.Array:
    return logging_logprobs(PARAMS, state)


@pytest.fixture(scope="module")
def log() -> EnvironmentLog:
    return collect_log(ENVIRONMENT, logging, jax.random.key(0), users=500, steps=200, discount=0.95)


def share_of_best(policy: EnvironmentPolicy, params: Params) -> float:
    table = np.asarray(probabilities(policy, params, ENVIRONMENT, all_states(PARAMS)), np.float64)
    model = build_model(PARAMS)
    return value(model, table / table.sum(axis=1, keepdims=True)) / value(model, best_policy(model))


def test_log_holds_whole_visits_with_their_propensities(log: EnvironmentLog) -> None:
    """A visit ends with probability 0.02 after each step: 50 steps on average, of at most 200."""
    expected = (1 - 0.98**200) / 0.02
    assert len(log.action) / 500 == pytest.approx(expected, abs=4 * 50 / np.sqrt(500))
    taken, logprob = np.asarray(log.reward), np.asarray(log.logprob)
    assert set(np.unique(taken)) == {0.0, 1.0}
    assert logprob.min() >= np.log(0.1 / 12) - 1e-5  # uniform over 12 items in a tenth of the steps
    # Under the logging policy 1 / propensity is on average the number of items.
    weights = np.exp(-logprob)
    assert weights.mean() == pytest.approx(12, abs=4 * weights.std() / np.sqrt(len(weights)))


def test_returns_are_discounted_sums() -> None:
    alone = collect_log(ENVIRONMENT, logging, jax.random.key(1), users=1, steps=30, discount=0.5)
    rewards, expected = np.asarray(alone.reward), 0.0
    for number in reversed(range(len(rewards))):
        expected = rewards[number] + 0.5 * expected
        assert float(alone.returns[number]) == pytest.approx(expected, rel=1e-5)


def test_off_policy_learning_beats_the_log_and_the_supervised_policy(log: EnvironmentLog) -> None:
    config = FromLogConfig(updates=400)
    policy = new_policy(ENVIRONMENT, 32, 0)
    supervised, _ = fit_to_log(policy, policy.start, log, next_item_loss, config)
    learned, metrics = fit_to_log(policy, supervised, log, off_policy_loss(config), config)
    model = build_model(PARAMS)
    table = np.exp(np.asarray(jax.vmap(logging)(all_states(PARAMS)), np.float64))[:, 1:]
    logged = value(model, table / table.sum(axis=1, keepdims=True)) / value(model, best_policy(model))
    assert logged < share_of_best(policy, supervised) < share_of_best(policy, learned) - 0.05
    assert share_of_best(policy, learned) <= 1.0
    assert ((metrics["effective_share"] > 0) & (metrics["effective_share"] <= 1 + 1e-5)).all()
    assert ((metrics["clipped"] >= 0) & (metrics["clipped"] <= 1)).all()
