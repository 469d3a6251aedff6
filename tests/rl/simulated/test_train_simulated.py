"""Returns by hand, learning where the best policy is known, and exact resumption."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench.environment_policy import new_policy, probabilities
from bench.synthetic import TRAINING, acquired_taste, synthetic_environment
from bench.synthetic_exact import all_states, best_policy, build_model, value
from jaxrec.config import to_json
from jaxrec.errors import DataError
from jaxrec.models.masks import NEVER
from jaxrec.rl.checkpoint import PolicyCheckpoint
from jaxrec.rl.policy import slate_logprobs
from jaxrec.rl.simulated import train as on_policy
from jaxrec.rl.simulated.policy import Params, draw_actions, drawn_logprobs
from jaxrec.rl.simulated.train import td_lambda_returns, train_simulated

PARAMS = acquired_taste(items_per_topic=3)
ENVIRONMENT = synthetic_environment(PARAMS)
SMALL = dataclasses.replace(TRAINING, users=128, steps=16, updates=250, updates_per_record=50)
POLICY = new_policy(ENVIRONMENT, hidden=32, seed=0)


def test_returns_by_hand() -> None:
    """Three steps of two users; the second one leaves after the second step."""
    reward = jnp.array([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]])
    done = jnp.array([[False, False], [False, True], [False, False]])
    next_value = jnp.array([[10.0, 10.0], [20.0, 20.0], [30.0, 30.0]])
    g3 = 3 + 0.5 * 30
    g2 = 2 + 0.5 * (0.75 * 20 + 0.25 * g3)
    g1 = 1 + 0.5 * (0.75 * 10 + 0.25 * g2)
    of_second = [1 + 0.5 * (0.75 * 10 + 0.25 * 2), 2, g3]
    got = td_lambda_returns(reward, done, next_value, discount=0.5, trace=0.25)
    np.testing.assert_allclose(got, np.stack([[g1, g2, g3], of_second], axis=1), rtol=1e-6)


def test_whole_trace_is_the_discounted_sum() -> None:
    reward, done = jnp.array([1.0, 2.0, 4.0]), jnp.zeros(3, bool)
    got = td_lambda_returns(reward, done, jnp.array([7.0, 7.0, 8.0]), discount=0.5, trace=1.0)
    np.testing.assert_allclose(got, [1 + 2 / 2 + 4 / 4 + 8 / 8, 2 + 4 / 2 + 8 / 4, 4 + 8 / 2])


def test_one_slot_is_a_softmax() -> None:
    logits = jax.random.normal(jax.random.key(0), (5, 7))
    slates = jnp.arange(5, dtype=jnp.int32)[:, None]
    np.testing.assert_allclose(drawn_logprobs(logits, slates), slate_logprobs(logits, slates), rtol=1e-5)


def share_of_best(discount: float) -> float:
    params, _ = train_simulated(ENVIRONMENT, POLICY, dataclasses.replace(SMALL, discount=discount))
    model = build_model(PARAMS)
    return value_of(params) / value(model, best_policy(model))


def value_of(params: Params) -> float:
    policy = np.asarray(probabilities(POLICY, params, ENVIRONMENT, all_states(PARAMS)), np.float64)
    return value(build_model(PARAMS), policy / policy.sum(axis=1, keepdims=True))


def test_learns_what_pays_later_and_greed_does_not() -> None:
    model = build_model(PARAMS)
    greedy = value(model, best_policy(model, discount=0.0)) / value(model, best_policy(model))
    assert 0.9 < share_of_best(0.95) <= 1.0
    assert share_of_best(0.0) <= greedy + 0.02 < 0.75


def distance(params: Params) -> jax.Array:
    """Of the parameters from the start, squared."""
    parts = zip(jax.tree.leaves(params), jax.tree.leaves(POLICY.start), strict=True)
    return sum((jnp.sum(jnp.square(now - before)) for now, before in parts), jnp.float32(0))


def test_the_weight_of_the_penalty_keeps_the_loss_within_its_budget() -> None:
    """The loss is the distance from the start here. Without an anchor the policy goes far beyond the budget. With one
    the weight rises as long as the loss exceeds the budget, and the policy ends near it."""
    short = dataclasses.replace(SMALL, updates=200, likelihood_budget=0.5)

    def anchor(params: Params, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        far = distance(params)
        return far, jax.lax.stop_gradient(far)

    loose, _ = train_simulated(ENVIRONMENT, POLICY, short)
    near, records = train_simulated(ENVIRONMENT, POLICY, short, anchor=anchor)
    assert float(distance(loose)) > 2.0
    assert 0.1 < float(distance(near)) < 0.7
    assert min(record["kl_coefficient"] for record in records) < 0.9 * max(r["kl_coefficient"] for r in records)


def test_an_anchor_that_says_nothing_changes_no_rollout() -> None:
    short = dataclasses.replace(SMALL, updates=2, updates_per_record=1)
    without, records = train_simulated(ENVIRONMENT, POLICY, short)
    nothing = jnp.float32(3.0), jnp.float32(0.0)
    idle, idle_records = train_simulated(ENVIRONMENT, POLICY, short, anchor=lambda params, key: nothing)
    jax.tree.map(np.testing.assert_array_equal, idle, without)
    assert [record["kl"] for record in idle_records] == [3.0, 3.0]
    assert [record["reward"] for record in idle_records] == [record["reward"] for record in records]


def test_permuted_rewards_stay_in_their_step() -> None:
    reward = jnp.arange(24.0).reshape(3, 8)
    permuted = on_policy._permuted_among_users(jax.random.key(0), reward)
    np.testing.assert_array_equal(jnp.sort(permuted, axis=1), reward)
    orders = {tuple(row) for row in np.asarray(permuted - reward[:, :1]).tolist()}
    assert len(orders | {tuple(range(8))}) == 4  # each step has an order of its own


def test_permuted_rewards_teach_nothing() -> None:
    short = dataclasses.replace(SMALL, updates=100)
    own, permuted = (train_simulated(ENVIRONMENT, POLICY, short, permuted=each)[0] for each in (False, True))
    start = value_of(POLICY.start)
    assert value_of(own) > 1.5 * start
    assert value_of(permuted) < 1.05 * start


def test_records_describe_the_rollouts() -> None:
    _, log = train_simulated(ENVIRONMENT, POLICY, dataclasses.replace(SMALL, updates=20, updates_per_record=10))
    assert [record["step"] for record in log] == [10, 20]
    for record in log:
        assert record["reward"] == record["reward_taken"]
        assert 0.0 < record["coverage"] <= 1.0
        assert 0.0 < record["entropy"] <= np.log(12) + 1e-5
        assert record["left"] == pytest.approx(0.02, abs=0.01)
    assert log[0]["kl"] < log[1]["kl"]


class DyingCheckpoint(PolicyCheckpoint):
    """Its process is killed when it is to be written for the third time."""

    writes = 0

    def write(self, step: int, arrays: Any, progress: Mapping[str, Any]) -> None:
        if self.writes == 2:
            raise KeyboardInterrupt
        self.writes += 1
        super().write(step, arrays, progress)


def test_killed_and_resumed_equals_undisturbed(tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, updates=30, updates_per_record=10)
    whole, records = train_simulated(ENVIRONMENT, POLICY, config)
    dying = DyingCheckpoint(tmp_path / "parts")
    dying.open({"configuration": to_json(config)})
    with pytest.raises(KeyboardInterrupt):
        train_simulated(ENVIRONMENT, POLICY, config, dying)
    checkpoint = PolicyCheckpoint(tmp_path / "parts")
    checkpoint.open({"configuration": to_json(config)})
    assert checkpoint.progress() == {"updates": records[:2]}
    resumed, resumed_records = train_simulated(ENVIRONMENT, POLICY, config, checkpoint)
    assert resumed_records == records
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)
    with pytest.raises(DataError, match="was started with other configuration than now"):
        checkpoint.open({"configuration": to_json(dataclasses.replace(config, discount=0.5))})
    assert checkpoint.progress() == {"updates": records}


def test_items_are_drawn_from_the_softmax() -> None:
    logits = jnp.array([NEVER, 0.5, -1.0, NEVER, 2.0, 0.0])
    environment = ENVIRONMENT._replace(item_count=5)
    _, actions = draw_actions(environment, jax.random.key(0), jnp.broadcast_to(logits, (20_000, 6)))
    shares = np.bincount(np.asarray(actions), minlength=6) / 20_000
    p = np.asarray(jax.nn.softmax(logits))
    assert shares[[0, 3]].sum() == 0
    np.testing.assert_allclose(shares, p, atol=4 * 0.5 / np.sqrt(20_000))
