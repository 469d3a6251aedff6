"""Returns by hand, learning where the best policy is known, and exact resumption."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench.synthetic import acquired_taste, synthetic_environment
from bench.synthetic_exact import all_states, best_policy, build_model, value
from jaxrec.errors import DataError
from jaxrec.models.masks import NEVER
from jaxrec.rl.policy import slate_logprobs
from jaxrec.rl.simulated import train as on_policy
from jaxrec.rl.simulated.environment_policy import Params, act, action_logprobs, probabilities
from jaxrec.rl.simulated.train import (
    LEARNER_FILE,
    LOG_FILE,
    OnPolicyConfig,
    Trained,
    td_lambda_returns,
    train_on_policy,
)

PARAMS = acquired_taste(items_per_topic=3)
ENVIRONMENT = synthetic_environment(PARAMS)
SMALL = OnPolicyConfig(users=128, steps=16, updates=250, hidden=32, updates_per_record=50)


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
    np.testing.assert_allclose(action_logprobs(logits, slates), slate_logprobs(logits, slates), rtol=1e-5)


def share_of_best(discount: float) -> float:
    trained = train_on_policy(ENVIRONMENT, dataclasses.replace(SMALL, discount=discount))
    model = build_model(PARAMS)
    return value_of(trained, trained.params) / value(model, best_policy(model))


def value_of(trained: Trained, params: Params) -> float:
    policy = np.asarray(probabilities(trained.policy, params, ENVIRONMENT, all_states(PARAMS)), np.float64)
    return value(build_model(PARAMS), policy / policy.sum(axis=1, keepdims=True))


def test_learns_what_pays_later_and_greed_does_not() -> None:
    model = build_model(PARAMS)
    greedy = value(model, best_policy(model, discount=0.0)) / value(model, best_policy(model))
    assert 0.9 < share_of_best(0.95) <= 1.0
    assert share_of_best(0.0) <= greedy + 0.02 < 0.75


def test_leash_holds_the_policy_near_its_start() -> None:
    short = dataclasses.replace(SMALL, updates=100)
    loose = train_on_policy(ENVIRONMENT, short).log[-1]
    leashed = train_on_policy(ENVIRONMENT, dataclasses.replace(short, kl_target=0.02)).log[-1]
    assert loose["kl"] > 0.5
    assert 0.005 < leashed["kl"] < 0.06


def test_an_anchor_adds_its_loss_and_changes_nothing_that_is_played() -> None:
    short = dataclasses.replace(SMALL, updates=2, updates_per_record=1)
    without = train_on_policy(ENVIRONMENT, short)
    idle = train_on_policy(ENVIRONMENT, short, anchor=lambda params, key: jnp.float32(3.0))
    jax.tree.map(np.testing.assert_array_equal, idle.params, without.params)
    assert [record["anchor_loss"] for record in idle.log] == [3.0, 3.0]
    assert [record["reward"] for record in idle.log] == [record["reward"] for record in without.log]

    def below(params: dict, key: jax.Array) -> jax.Array:
        return 100.0 * jnp.square(params["value_out"]["bias"] + 1.0).sum()

    pulled = train_on_policy(ENVIRONMENT, short, anchor=below)
    assert pulled.params["value_out"]["bias"][0] < 0 < without.params["value_out"]["bias"][0]
    assert pulled.log[0]["reward"] == without.log[0]["reward"]


def test_permuted_rewards_stay_in_their_step() -> None:
    reward = jnp.arange(24.0).reshape(3, 8)
    permuted = on_policy._among_users(jax.random.key(0), reward)
    np.testing.assert_array_equal(jnp.sort(permuted, axis=1), reward)
    orders = {tuple(row) for row in np.asarray(permuted - reward[:, :1]).tolist()}
    assert len(orders | {tuple(range(8))}) == 4  # each step has an order of its own


def test_permuted_rewards_teach_nothing() -> None:
    short = dataclasses.replace(SMALL, updates=100)
    paid, permuted = (train_on_policy(ENVIRONMENT, short, permuted=each) for each in (False, True))
    start = value_of(paid, paid.policy.start)
    assert value_of(paid, paid.params) > 1.5 * start
    assert value_of(permuted, permuted.params) < 1.05 * start


def test_log_says_what_happened() -> None:
    log = train_on_policy(ENVIRONMENT, dataclasses.replace(SMALL, updates=20, updates_per_record=10)).log
    assert [record["step"] for record in log] == [10, 20]
    for record in log:
        assert record["reward"] == record["reward_taken"]
        assert 0.0 < record["coverage"] <= 1.0
        assert 0.0 < record["entropy"] <= np.log(12) + 1e-5
        assert record["left"] == pytest.approx(0.02, abs=0.01)
    assert log[0]["kl"] < log[1]["kl"]


def test_resumed_run_equals_one_left_in_peace(tmp_path: Path) -> None:
    config = dataclasses.replace(SMALL, updates=30, updates_per_record=10)
    whole = train_on_policy(ENVIRONMENT, config, tmp_path / "whole")
    assert (tmp_path / "whole" / "training.png").stat().st_size > 1000

    class Stop(Exception):
        pass

    saved = 0

    folder, keep = tmp_path / "parts", on_policy._save

    def dying(*arguments: object) -> None:
        nonlocal saved
        if saved == 2:
            raise Stop
        saved += 1
        keep(*arguments)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(on_policy, "_save", dying)
        with pytest.raises(Stop):
            train_on_policy(ENVIRONMENT, config, folder)
    resumed = train_on_policy(ENVIRONMENT, config, folder)
    assert resumed.log == whole.log
    assert (folder / LOG_FILE).read_text() == (tmp_path / "whole" / LOG_FILE).read_text()
    jax.tree.map(np.testing.assert_array_equal, resumed.params, whole.params)

    with pytest.raises(DataError, match="another configuration"):
        train_on_policy(ENVIRONMENT, dataclasses.replace(config, discount=0.5), folder)
    assert (folder / LEARNER_FILE).exists()


def test_items_are_drawn_from_the_softmax() -> None:
    logits = jnp.array([NEVER, 0.5, -1.0, NEVER, 2.0, 0.0])
    environment = ENVIRONMENT._replace(item_count=5)
    _, actions = act(environment, jax.random.key(0), jnp.broadcast_to(logits, (20_000, 6)))
    shares = np.bincount(np.asarray(actions), minlength=6) / 20_000
    p = np.asarray(jax.nn.softmax(logits))
    assert shares[[0, 3]].sum() == 0
    np.testing.assert_allclose(shares, p, atol=4 * 0.5 / np.sqrt(20_000))
