"""Learning where the best slate is known."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxrec.config import RewardWeights, RLConfig
from jaxrec.models.cooccurrence import RECENT
from jaxrec.models.sequence import NEVER
from jaxrec.rl.learner import (
    Scoring,
    make_updates,
    new_learner,
    policy_logits,
    returns,
)
from jaxrec.rl.rewards import RewardTables, discounts
from jaxrec.rl.states import States
from tests.rl.enumeration import expected_reward


def test_returns_by_hand() -> None:
    d = discounts(3)
    rewards = jnp.array([[1.0, 0.5, 0.25]])
    expected = [d[0] + 0.5 * d[1] + 0.25 * d[2], 0.5 * d[1] + 0.25 * d[2], 0.25 * d[2]]
    np.testing.assert_allclose(returns(rewards)[0], expected, rtol=1e-6)


# A contextual bandit: in context c the targets are c, c + 1 and c + 2 (modulo 6) with these probabilities, so over all
# contexts every item is equally likely, and a policy that does not look at the context earns CHANCE.
CONTEXTS, SHARES = 6, np.array([0.6, 0.3, 0.1])
BEST = float(discounts(3) @ SHARES)
CHANCE = 1 / CONTEXTS
HITS = RewardWeights(hit=1.0, genre=0.0, rating=0.0)


def bandit_states(seed: int, shuffled: bool = False) -> States:
    rng = np.random.default_rng(seed)
    context = rng.integers(0, CONTEXTS, 3000)
    target = 1 + (context + rng.choice(3, len(context), p=SHARES)) % CONTEXTS
    if shuffled:
        target = rng.permutation(target)
    return States(
        query=np.eye(CONTEXTS, dtype=np.float32)[context],
        target=target.astype(np.int32),
        target_rating=np.full(len(context), 0.5, np.float32),
        window=np.zeros(len(context), np.int32),
        seen=np.zeros(len(context), np.int32),
        windows=np.zeros((1, 1), np.int32),
    )


def bandit_scoring() -> Scoring:
    vectors = jax.random.normal(jax.random.key(5), (CONTEXTS + 1, CONTEXTS))
    bias = jnp.zeros(CONTEXTS + 1).at[0].set(NEVER)
    nobody = jnp.zeros((CONTEXTS + 1, 1))
    tables = RewardTables(jnp.zeros((CONTEXTS + 1, 1)), jnp.full(CONTEXTS + 1, 0.5))
    return Scoring(0.1 * vectors, bias, nobody.astype(jnp.int32), nobody, tables)


class Bandit:
    """A learner on the bandit, and the exact value of its policy."""

    def __init__(self, config: RLConfig, shuffled: bool = False) -> None:
        self._config = config
        self._states = bandit_states(config.seed, shuffled)
        self._graphdef, self._learner = new_learner(CONTEXTS, CONTEXTS, config)
        self._updates = make_updates(self._graphdef, config)

    def learn(self, count: int) -> dict[str, np.ndarray]:
        key = jax.random.key(self._config.seed)
        self._learner, metrics = self._updates(self._learner, bandit_scoring(), self._states, key, count)
        return jax.device_get(metrics)

    def value(self) -> float:
        """The expected slate reward, over all contexts and slates."""
        head = nnx.merge(self._graphdef, self._learner.head)
        values = []
        for context in range(CONTEXTS):
            nothing = jnp.zeros((1, RECENT), jnp.int32)
            logits = policy_logits(head, jnp.eye(CONTEXTS)[context][None], nothing, bandit_scoring())[0]
            of_items = jnp.zeros(CONTEXTS + 1).at[1 + (context + np.arange(3)) % CONTEXTS].set(jnp.float32(SHARES))
            values.append(float(expected_reward(logits, of_items, 3)))
        return float(np.mean(values))


FREE = RLConfig(
    batch_size=128,
    slate_size=3,
    learning_rate=0.04,
    kl_target=100.0,
    anchor=0.0,
    policy_width=16,
    steps=400,
    rewards=HITS,
)


def test_learns_the_best_slate_of_each_context() -> None:
    bandit = Bandit(FREE)
    assert bandit.value() == pytest.approx(CHANCE, abs=0.02)
    bandit.learn(400)
    assert bandit.value() > CHANCE + 0.9 * (BEST - CHANCE)
    assert bandit.value() <= BEST + 1e-6


def test_shuffled_rewards_teach_nothing() -> None:
    bandit = Bandit(FREE, shuffled=True)
    bandit.learn(400)
    assert bandit.value() < CHANCE + 0.15 * (BEST - CHANCE)


def test_policy_starts_as_the_supervised_one_and_the_leash_holds() -> None:
    loose = Bandit(FREE).learn(400)
    leashed = Bandit(dataclasses.replace(FREE, kl_target=0.05, learning_rate=0.01)).learn(400)
    assert loose["kl"][0] == leashed["kl"][0] == 0.0
    assert loose["kl"][-100:].mean() > 1.0
    assert 0.025 < leashed["kl"][-100:].mean() < 0.1


def test_baseline_learns_the_mean_return() -> None:
    losses = Bandit(FREE).learn(400)["baseline_loss"]
    assert losses[-50:].mean() < 0.7 * losses[:5].mean()


def test_same_seed_same_policy() -> None:
    values = []
    for seed in (0, 0, 1):
        bandit = Bandit(dataclasses.replace(FREE, seed=seed))
        bandit.learn(20)
        bandit.learn(20)
        values.append(bandit.value())
    assert values[0] == values[1] != values[2]


def test_chunks_of_updates_equal_one_run() -> None:
    whole, parts = Bandit(FREE), Bandit(FREE)
    expected = whole.learn(40)["reward"]
    np.testing.assert_array_equal(np.concatenate([parts.learn(20)["reward"] for _ in range(2)]), expected)
