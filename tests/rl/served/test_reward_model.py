"""The reward model of doubly robust estimates: its regression, its features, and the values that it takes part in."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.rl.ope.estimators import doubly_robust, self_normalized_doubly_robust
from jaxrec.rl.ope.weights import slate_weights
from jaxrec.rl.rewards import rank_discounts
from jaxrec.rl.served.policy import POOL, logged_logprobs
from jaxrec.rl.served.reward_model import (
    FEATURES,
    LEAST,
    RewardModel,
    expected_features,
    fit_reward_model,
    logged_features,
)
from tests.rl.served.logged_world import (
    ITEMS,
    LOGITS,
    NOVELTY,
    RATING,
    SLOTS,
    TEMPERATURE,
    World,
    every_slate,
    new_world,
    shown,
    value,
)


@pytest.fixture(scope="module")
def world() -> World:
    return new_world()


def features_of(values: list[float]) -> np.ndarray:
    """[rows, 1, features]: the second is given, the third is the same everywhere, the others are 0."""
    features = np.zeros((len(values), 1, len(FEATURES)))
    features[:, 0, 0], features[:, 0, 1], features[:, 0, 2] = 1.0, values, 0.1
    return features


def test_the_penalty_weighs_as_one_row() -> None:
    """Rewards 3 + 2 x at x of variance 1 in four rows: the slope is 2 * 4 / (4 + 1). The mean is not shrunk."""
    features, where = features_of([-1.0, 1.0, -1.0, 1.0]), np.ones((4, 1), bool)
    model = fit_reward_model(features, np.array([[1.0], [5.0], [1.0], [5.0]]), where)
    np.testing.assert_allclose(model.coefficients, [[3.0, 1.6, 0.0, 0.0, 0.0]], atol=1e-12)
    np.testing.assert_allclose(model.mean, [3.0])
    np.testing.assert_allclose(model.q(features, where)[:2], [[1.4], [4.6]])
    # Of features on another scale the predictions are the same.
    scaled = features * np.array([1.0, 50.0, 1.0, 1.0, 1.0])
    stretched = fit_reward_model(scaled, np.array([[1.0], [5.0], [1.0], [5.0]]), where)
    np.testing.assert_allclose(stretched.q(scaled, where), model.q(features, where))


def test_a_linear_truth_is_recovered_slot_by_slot() -> None:
    rng = np.random.default_rng(0)
    truth = np.array([[0.3, 0.05, 0.4, -0.2, 0.1], [0.1, 0.0, -0.3, 0.5, 0.2]])
    features = rng.random((20_000, 2, len(FEATURES))) * [1.0, -8.0, 1.0, 1.0, 1.0]
    features[:, :, 0] = 1.0
    rewards = np.einsum("rkf,kf->rk", features, truth) + 0.1 * rng.normal(size=(20_000, 2))
    model = fit_reward_model(features, rewards, np.ones((20_000, 2), bool))
    np.testing.assert_allclose(model.coefficients, truth, atol=0.02)


def test_slots_after_it_count_by_their_mean_where_they_hold_an_item() -> None:
    model = RewardModel(np.array([[0.5], [0.2], [0.1]]), np.array([0.5, 0.2, 0.1]))
    where = np.array([[True, True, True], [True, True, False]])
    np.testing.assert_allclose(model.q(np.ones((2, 3, 1)), where), [[0.8, 0.3, 0.1], [0.7, 0.2, 0.0]])


def test_a_slot_that_held_no_item_earns_nothing() -> None:
    where = np.array([[True, False], [True, False]])
    model = fit_reward_model(np.repeat(features_of([0.0, 1.0]), 2, axis=1), np.array([[1.0, 0.0]] * 2), where)
    np.testing.assert_allclose(model.mean, [1.0, 0.0])
    np.testing.assert_array_equal(model.coefficients[1], 0.0)


def softmax(logits: np.ndarray) -> np.ndarray:
    return np.exp(logits) / np.exp(logits).sum()


def test_features_by_hand(world: World) -> None:
    """State 1 showed items 4 and 2, or item 3 and an empty slot. The probability is that of a first slot."""
    states = shown(world, np.array([1, 1]), np.array([[4, 2], [3, 0]]), np.zeros((2, 2)))
    p = np.concatenate([[0.0], softmax(LOGITS[1, 1:] / TEMPERATURE)])
    logged = logged_features(world.graphdef, world.current, world.scoring, states)
    expected = [[1.0, np.log(p[item]), p[item], RATING[item], NOVELTY[item]] for item in (4, 2, 3)]
    np.testing.assert_allclose([logged[0, 0], logged[0, 1], logged[1, 0]], expected, rtol=1e-5)

    bias = np.asarray(world.new["item_bias"])
    new = np.concatenate([[0.0], softmax((LOGITS[1] + bias)[1:] / TEMPERATURE)])
    found = expected_features(world.graphdef, world.new, world.current, world.scoring, states)
    columns = np.stack([np.ones(ITEMS + 1), np.log(np.maximum(p, np.exp(LEAST))), p, RATING, NOVELTY], axis=1)
    after = np.where(np.arange(ITEMS + 1) == 4, 0.0, new) / (1 - new[4])
    np.testing.assert_allclose(found[0], [new @ columns, after @ columns], rtol=1e-5)
    np.testing.assert_allclose(found[1, 0], new @ columns, rtol=1e-5)


def test_nothing_outside_of_the_pool_is_expected(world: World) -> None:
    """Of 20 items more than the pool holds, the worst alone are rated 1; one that is excluded earns no place in it."""
    items = POOL + 20
    rating = jnp.asarray(np.arange(items + 1) > POOL, jnp.float32)
    tables = world.scoring.tables._replace(item_ratings=rating, item_novelty=jnp.zeros(items + 1))
    vectors = jnp.zeros((items + 1, 2)).at[:, 0].set(-0.01 * jnp.arange(items + 1))
    none = jnp.zeros((items + 1, 1))
    scoring = world.scoring._replace(
        item_vectors=vectors,
        item_bias=jnp.zeros(items + 1).at[0].set(-1e9),
        neighbour_item=none.astype(jnp.int32),
        neighbour_weight=none,
        tables=tables,
    )
    head = {**world.current, "item_bias": jnp.zeros(items + 1)}
    states = shown(world, np.array([0]), np.array([[1, 2]]), np.zeros((1, 2)))
    found = expected_features(world.graphdef, head, head, scoring, states)[0, :, 3]
    assert found.tolist() == [0.0, 0.0]
    states = states._replace(exclude=np.array([[3]], np.int32))
    p = np.exp(-0.01 * np.delete(np.arange(1, POOL + 2), 2) / TEMPERATURE)
    found = expected_features(world.graphdef, head, head, scoring, states)[0, :, 3]
    np.testing.assert_allclose(found, [p[-1] / p.sum(), p[-1] / p[1:].sum()], rtol=1e-4)


def test_any_model_leaves_the_value_as_it_is(world: World) -> None:
    """Summed over every state and slate with its probability, doubly robust is the new policy's value; the model alone
    is not."""
    states, probability = every_slate(world)
    assert probability.sum() == pytest.approx(1, abs=1e-5)
    model = RewardModel(np.array([[0.3, 0.02, -0.5, 0.4, 0.2], [-0.1, 0.0, 0.7, 0.1, -0.6]]), np.array([0.2, 0.3]))
    where = states.slate > 0
    q_logged = model.q(logged_features(world.graphdef, world.current, world.scoring, states), where)
    q_new = model.q(expected_features(world.graphdef, world.new, world.current, world.scoring, states), where)
    new = logged_logprobs(world.graphdef, world.new, world.scoring, states)
    arguments = slate_weights(new, states.log_propensities), states.terms.hit * rank_discounts(SLOTS), q_logged, q_new
    truth = value(world, world.new)
    plain, normalized = doubly_robust(*arguments), self_normalized_doubly_robust(*arguments)
    assert probability @ plain.numerator[:, 0] == pytest.approx(truth, abs=1e-5)
    assert np.sum((probability @ normalized.numerator) / (probability @ normalized.denominator)) == pytest.approx(
        truth, abs=1e-5
    )
    assert probability @ q_new[:, 0] != pytest.approx(truth, abs=0.05)


def test_a_right_model_needs_no_right_propensities(world: World) -> None:
    """The first slot earns what the model says, the second 0.2 whatever is shown; the propensities are made up."""
    coefficients = np.array([[0.3, 0.02, -0.5, 0.4, 0.2], [0.2, 0.0, 0.0, 0.0, 0.0]])
    states, _ = every_slate(world)
    where = states.slate > 0
    features = logged_features(world.graphdef, world.current, world.scoring, states)
    rewards = np.einsum("rkf,kf->rk", features, coefficients)
    model = RewardModel(coefficients, rewards.mean(axis=0))
    q_new = model.q(expected_features(world.graphdef, world.new, world.current, world.scoring, states), where)
    made_up = -3.0 * np.random.default_rng(0).random(states.slate.shape)
    new = logged_logprobs(world.graphdef, world.new, world.scoring, states)
    truth = 0.5 * np.exp(new.sum(axis=1)) @ rewards.sum(axis=1)  # both states are there as often
    arguments = slate_weights(new, made_up), rewards, model.q(features, where), q_new
    assert self_normalized_doubly_robust(*arguments).value() == pytest.approx(truth, abs=1e-5)
    assert doubly_robust(*arguments).value() == pytest.approx(truth, abs=1e-5)
