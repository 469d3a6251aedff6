"""The fit of a reranker finds the feature that the next item follows, and both gradients of the reward are right."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.data.prepared import PreparedData
from jaxrec.errors import TrainingStopped
from jaxrec.models.masks import NEVER
from jaxrec.models.reranker import CONTEXT, FEATURES
from jaxrec.rl.config import PL_RANK, REINFORCE, LoggedConfig
from jaxrec.rl.logged.fit import SCALE_OF_NOTHING, fit_reranker, measured_scales, reranked_scores, reward_loss
from jaxrec.rl.rewards import rank_discounts
from tests.rl.logged.made_up import decisions

CONFIG = LoggedConfig(updates=150, learning_rate=0.05, reward_weight=0.0, penalty=0.0)


def test_imitation_finds_the_feature_that_the_next_item_follows(small_data: PreparedData) -> None:
    log = decisions(small_data, range(30), strength=1.0)
    fitted = fit_reranker(log, np.zeros(log.mix.shape, np.float32), CONFIG)
    weights = dict(zip(FEATURES, (fitted.weights.direct / fitted.scales.features).tolist(), strict=True))
    assert weights.pop("rating") == pytest.approx(1.0, abs=0.25)
    assert max(map(abs, weights.values())) < 0.25
    assert len(fitted.path) == 2  # after 100 and after 150 updates
    np.testing.assert_array_equal(fitted.path[-1].direct, fitted.weights.direct)


def test_what_varies_by_rounding_alone_is_nothing_also_later(small_data: PreparedData) -> None:
    """A feature and a context of noise: no weight is learned of them, and large ones change no score."""
    log, rng = decisions(small_data, range(4), strength=1.0), np.random.default_rng(0)
    features, context = np.array(log.features), np.array(log.context)
    at, of_request = FEATURES.index("trend"), CONTEXT.index("log_gap")
    features[..., at] = 1e-6 * rng.normal(size=features.shape[:-1])
    context[:, of_request] = 5 + 1e-6 * rng.normal(size=len(context))
    log = log._replace(features=features, context=context)
    fitted = fit_reranker(log, np.zeros(log.mix.shape, np.float32), LoggedConfig(updates=50, reward_weight=0.0))
    assert fitted.scales.features[at] == fitted.scales.context[of_request] == SCALE_OF_NOTHING
    features[..., at] = rng.normal(size=features.shape[:-1])
    context[:, of_request] = -5
    later = reranked_scores(fitted, log._replace(features=features, context=context))
    np.testing.assert_allclose(later, reranked_scores(fitted, log), rtol=1e-5, atol=1e-5)


def test_what_is_no_candidate_changes_nothing(small_data: PreparedData) -> None:
    """Five more places without a candidate, whose features are absurd, at every decision."""
    log = decisions(small_data, range(4), strength=1.0)
    more = ((0, 0), (0, 5))
    padded = log._replace(
        items=np.pad(log.items, more),
        mix=np.pad(log.mix, more, constant_values=NEVER),
        features=np.pad(log.features, (*more, (0, 0)), constant_values=1000.0),
    )
    rewards = np.zeros(log.mix.shape, np.float32)
    for one, other in zip(measured_scales(log), measured_scales(padded), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)
    imitation = LoggedConfig(updates=20, reward_weight=0.0)
    fitted, of_padded = fit_reranker(log, rewards, imitation), fit_reranker(padded, np.pad(rewards, more), imitation)
    np.testing.assert_allclose(of_padded.weights.direct, fitted.weights.direct, rtol=1e-3, atol=1e-5)
    scores = reranked_scores(fitted, log)
    np.testing.assert_allclose(reranked_scores(fitted, padded)[:, : log.mix.shape[1]], scores, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", [PL_RANK, REINFORCE])
def test_the_gradient_of_the_reward_is_that_of_all_slates(method: str) -> None:
    """Four items, one of them no candidate, slates of two: the mean over many draws is the enumerated gradient."""
    logits, rewards = jnp.array([[0.3, -0.2, NEVER, 0.5]]), jnp.array([[1.0, 0.2, 5.0, 0.4]])
    where, config = logits > NEVER / 2, LoggedConfig(method=method, slate_size=2, samples=4)
    discounts = rank_discounts(2)

    def expected_reward(logits: jax.Array) -> jax.Array:
        p, total = jax.nn.softmax(logits[0]), jnp.zeros(())
        for first, second in itertools.permutations((0, 1, 3), 2):
            chance = p[first] * p[second] / (1 - p[first])
            total += chance * (discounts[0] * rewards[0, first] + discounts[1] * rewards[0, second])
        return total

    def loss(logits: jax.Array, key: jax.Array) -> jax.Array:
        return reward_loss(key, logits, rewards, where, config)

    keys = jax.random.split(jax.random.key(0), 4000)
    found = jax.vmap(jax.grad(loss), (None, 0))(logits, keys)
    error = found.std(axis=0) / np.sqrt(len(keys))
    assert (jnp.abs(found.mean(axis=0) + jax.grad(expected_reward)(logits)) <= 4 * error + 1e-6).all()
    assert (found[:, 0, 2] == 0).all()


def test_a_fit_can_be_stopped(small_data: PreparedData) -> None:
    log = decisions(small_data, range(2), strength=0.0)
    with pytest.raises(TrainingStopped, match="stopped after update 100 of 150; the decisions are kept"):
        fit_reranker(log, np.zeros(log.mix.shape, np.float32), CONFIG, lambda: True)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": "bpr"}, "method 'bpr', expected 'pl-rank' or 'reinforce'"),
        ({"folds": 1}, "folds is 1, expected at least 2"),
        ({"method": REINFORCE, "samples": 1}, "samples is 1, expected at least 2"),
        ({"updates": 0}, "updates is 0, expected at least 1"),
        ({"decisions": 2}, "decisions is 2, expected at least 3"),
        ({"reward_weight": -1.0}, r"reward_weight is -1.0, expected a number of at least 0"),
        ({"reward_weight": float("nan")}, "reward_weight is nan"),
        ({"ndcg_budget": 5.0}, "ndcg_budget is 5.0, expected a share from 0 to below 1"),
    ],
)
def test_what_cannot_be_trained_is_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoggedConfig(**values)  # type: ignore[arg-type]
