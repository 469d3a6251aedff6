"""Learning where the best slate is known."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxrec.models.cooccurrence import RECENT_ITEMS
from jaxrec.models.masks import NEVER
from jaxrec.rl.config import METHOD_NAMES, LoggedConfig, RewardWeights
from jaxrec.rl.logged.loss import logged_loss, start_params
from jaxrec.rl.logged.methods import ACTOR_CRITIC, METHODS, PLACKETT_LUCE, REINFORCE, TOP_K, Method
from jaxrec.rl.logged.states import States
from jaxrec.rl.rewards import RewardTables, rank_discounts
from jaxrec.rl.scoring import Scoring, policy_logits, returns
from jaxrec.rl.updates import make_updates, new_learner, policy_optimizer
from tests.rl.enumeration import expected_reward


def test_returns_by_hand() -> None:
    d = rank_discounts(3)
    rewards = jnp.array([[1.0, 0.5, 0.25]])
    expected = [d[0] + 0.5 * d[1] + 0.25 * d[2], 0.5 * d[1] + 0.25 * d[2], 0.25 * d[2]]
    np.testing.assert_allclose(returns(rewards)[0], expected, rtol=1e-6)


# A contextual bandit: in context c the targets are c, c + 1 and c + 2 (modulo 6) with these probabilities, so over all
# contexts every item is equally likely, and a policy that does not look at the context earns CHANCE.
CONTEXTS, SHARES = 6, np.array([0.6, 0.3, 0.1])
BEST = float(rank_discounts(3) @ SHARES)
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
        user_mean=np.full(len(context), 0.5, np.float32),
        logprob_beta=np.log(np.append(SHARES, [0.1] * 3))[(target - 1 - context) % CONTEXTS].astype(np.float32),
        window=np.zeros(len(context), np.int32),
        seen=np.zeros(len(context), np.int32),
        windows=np.zeros((1, 1), np.int32),
        user=np.zeros(1, np.int32),
    )


def bandit_scoring() -> Scoring:
    vectors = jax.random.normal(jax.random.key(5), (CONTEXTS + 1, CONTEXTS))
    bias = jnp.zeros(CONTEXTS + 1).at[0].set(NEVER)
    nobody = jnp.zeros((CONTEXTS + 1, 1))
    half = jnp.full(CONTEXTS + 1, 0.5)
    tables = RewardTables(jnp.zeros((CONTEXTS + 1, 1)), half, half, half)
    return Scoring(0.1 * vectors, bias, nobody.astype(jnp.int32), nobody, tables)


class Bandit:
    """A learner on the bandit, and the exact value of its policy."""

    def __init__(
        self, config: LoggedConfig, shuffled: bool = False, method: Method = REINFORCE, permuted: bool = False
    ) -> None:
        config = dataclasses.replace(config, samples=method.samples)
        self._config = config
        self._states = bandit_states(config.seed, shuffled)
        self._graphdef, start = start_params(CONTEXTS, CONTEXTS, config, method)
        optimizer = policy_optimizer(config.learning_rate, config.updates)
        self._learner = new_learner(start, optimizer)
        self._updates = make_updates(logged_loss(self._graphdef, config, method), optimizer, config.kl_target)
        self._permuted = permuted

    def learn(self, count: int) -> dict[str, np.ndarray]:
        key = jax.random.key(self._config.seed)
        data = bandit_scoring(), self._states, 1.0, self._permuted
        self._learner, metrics = self._updates(self._learner, data, key, count)
        return jax.device_get(metrics)

    def value(self) -> float:
        """The expected slate reward, over all contexts and slates."""
        head = nnx.merge(self._graphdef, self._learner.params.head)
        values = []
        for context in range(CONTEXTS):
            nothing = jnp.zeros((1, RECENT_ITEMS), jnp.int32)
            logits = policy_logits(head, jnp.eye(CONTEXTS)[context][None], nothing, bandit_scoring())[0]
            of_items = jnp.zeros(CONTEXTS + 1).at[1 + (context + np.arange(3)) % CONTEXTS].set(jnp.float32(SHARES))
            values.append(float(expected_reward(logits, of_items, 3)))
        return float(np.mean(values))


FREE = LoggedConfig(
    batch_size=128,
    slate_size=3,
    learning_rate=0.04,
    kl_target=100.0,
    imitation_weight=0.0,
    policy_width=16,
    entropy_floor=0.0,
    coverage_floor=0.0,
    updates=400,
    rewards=HITS,
)


def test_learns_the_best_slate_of_each_context() -> None:
    bandit = Bandit(FREE)
    assert bandit.value() == pytest.approx(CHANCE, abs=0.02)
    bandit.learn(400)
    assert bandit.value() > CHANCE + 0.9 * (BEST - CHANCE)
    assert bandit.value() <= BEST + 1e-6


@pytest.mark.parametrize(("method", "share"), [(PLACKETT_LUCE, 0.9), (TOP_K, 0.6), (ACTOR_CRITIC, 0.8)])
def test_other_methods_learn_too(method: Method, share: float) -> None:
    """The correction of the top K undoes how often the log has an item: it finds the three that are ever taken."""
    bandit = Bandit(FREE, method=method)
    metrics = bandit.learn(FREE.updates)
    assert bandit.value() > CHANCE + share * (BEST - CHANCE)
    if method is TOP_K:
        assert 0 < metrics["ess_share"][-1] < 1
        assert metrics["clipped_share"].max() <= 1


@pytest.mark.parametrize("controls", [{"shuffled": True}, {"permuted": True}])
def test_shuffled_targets_and_permuted_rewards_teach_nothing(controls: dict[str, bool]) -> None:
    bandit = Bandit(FREE, **controls)
    bandit.learn(400)
    assert bandit.value() < CHANCE + 0.15 * (BEST - CHANCE)


def test_floors_hold_entropy_and_coverage() -> None:
    free = Bandit(FREE).learn(400)
    held = Bandit(dataclasses.replace(FREE, entropy_floor=0.9, coverage_floor=0.9)).learn(400)
    assert free["entropy"][-1] < 0.6 * free["entropy"][0]
    assert held["entropy"][-1] > 0.85 * held["entropy"][0]
    assert held["effective_items"][-1] > 0.85 * held["effective_items"][0]


def test_names_of_the_methods_are_those_there_are() -> None:
    assert tuple(METHODS) == METHOD_NAMES


def test_every_update_is_measured() -> None:
    expected = {"reward", "reward_hit", "reward_novelty", "kl", "entropy", "coverage", "ess_share", "clipped_share"}
    for method in METHODS.values():
        metrics = Bandit(dataclasses.replace(FREE, batch_size=8), method=method).learn(2)
        assert expected <= metrics.keys()
        assert all(np.isfinite(values).all() and len(values) == 2 for values in metrics.values())


def test_policy_starts_as_the_supervised_one_and_the_kl_penalty_holds() -> None:
    loose = Bandit(FREE).learn(400)
    near = Bandit(dataclasses.replace(FREE, kl_target=0.05, learning_rate=0.01)).learn(400)
    assert loose["kl"][0] == near["kl"][0] == 0.0
    assert loose["kl"][-100:].mean() > 1.0
    assert 0.025 < near["kl"][-100:].mean() < 0.1


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
