from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxrec.config import RewardWeights, RLConfig
from jaxrec.evaluate import jit_scorer, rank_cases
from jaxrec.models.hybrid import Hybrid
from jaxrec.prepare import PreparedData
from jaxrec.rl.judge import Judged, case_states, decide, make_judge
from jaxrec.rl.reinforce import frozen_scoring, new_learner
from jaxrec.rl.rewards import RewardTables, discounts, genre_directions, reward_terms, total_reward

MAX_LENGTH = 50
EQUAL = {"reward": 0.3, "reward_weighted_ndcg_10": 0.1, "ndcg_10": 0.1}


@pytest.mark.parametrize(
    ("change", "used", "says"),
    [
        ({"reward": 0.31, "reward_weighted_ndcg_10": 0.11}, True, "0.1100 against 0.1000"),
        ({"reward": 0.31, "reward_weighted_ndcg_10": 0.11, "ndcg_10": 0.12}, True, "the policy is used"),
        ({"reward_weighted_ndcg_10": 0.11}, False, "because mean slate reward would"),
        ({"reward": 0.31}, False, "because reward-weighted NDCG@10 would"),
        ({"reward": 0.31, "reward_weighted_ndcg_10": 0.11, "ndcg_10": 0.0999}, False, "because NDCG@10 would"),
        ({"reward": 0.29, "ndcg_10": 0.09}, False, "mean slate reward and reward-weighted NDCG@10 and NDCG@10"),
    ],
)
def test_decision_and_its_reason(change: dict[str, float], used: bool, says: str) -> None:
    decided, reason = decide({**EQUAL, **change}, EQUAL)
    assert decided is used
    assert says in reason


def test_reward_weighted_ndcg_by_hand() -> None:
    """Three cases, ranks 1, 2 and 11 without and 1, 3 and 3 with the request time; ratings 1, 0.5 and 0.25."""
    ranks = np.array([[1, 2, 11], [1, 3, 3]])
    zeros = np.zeros((2, 3))
    judged = Judged(ranks, zeros, {}, zeros, np.array([1.0, 0.5, 0.25]))
    ndcg = [1.0, (1 / np.log2(3) + 0.5) / 2, (0 + 0.5) / 2]
    expected = (1.0 * ndcg[0] + 0.5 * ndcg[1] + 0.25 * ndcg[2]) / 1.75
    assert judged.figures()["reward_weighted_ndcg_10"] == pytest.approx(expected)
    assert judged.figures()["ndcg_10"] == pytest.approx(np.mean(ndcg))
    assert judged.figures()["hit_rate_10"] == pytest.approx((1 + 1 + 0.5) / 3)


@pytest.mark.parametrize("with_policy", [False, True])
def test_judge_sees_what_the_recommender_does(
    small_data: PreparedData, random_hybrid: Callable[[PreparedData, int, bool], Hybrid], with_policy: bool
) -> None:
    """Ranks are those of the evaluation, and rewards those of its top 10, with and without the request time."""
    hybrid = random_hybrid(small_data, 0, True)
    weights, cases = RewardWeights(), small_data.split.validation
    item_ratings = np.linspace(0, 1, len(small_data.catalog) + 1, dtype=np.float32)
    tables = RewardTables(jnp.asarray(genre_directions(small_data.catalog.genre_matrix())), jnp.asarray(item_ratings))
    supervised = hybrid.with_policy(None)
    recommender = hybrid if with_policy else supervised
    scoring = frozen_scoring(supervised, tables)
    graphdef, learner = new_learner(32, len(small_data.catalog), RLConfig(policy_width=8))
    head = nnx.to_pure_dict(nnx.state(hybrid.policy)) if with_policy else learner.head
    states = case_states(hybrid, small_data, cases, item_ratings)
    judged = make_judge(graphdef, scoring, states, small_data, MAX_LENGTH, weights)(head)

    scorer = jit_scorer(recommender, lambda model, events, gap: model.logits(events, gap)[0])
    targets = jnp.asarray(small_data.histories.items[cases.rows])
    ratings = jnp.asarray(small_data.unit_ratings()[cases.rows])
    for variant, request_time in enumerate((False, True)):
        ranked = rank_cases(scorer, small_data, cases, MAX_LENGTH, request_time)
        np.testing.assert_array_equal(judged.rank[variant], ranked.ranks)
        terms = reward_terms(jnp.asarray(ranked.top), targets, ratings, tables)
        np.testing.assert_allclose(judged.reward[variant], total_reward(terms, weights) @ discounts(10), rtol=1e-5)
        np.testing.assert_allclose(judged.terms["genre"][variant], terms.genre @ discounts(10), rtol=1e-5, atol=1e-7)
    if with_policy:
        assert judged.kl.min() > 0
    else:
        np.testing.assert_array_equal(judged.kl, 0.0)
    np.testing.assert_array_equal(judged.weight, ratings)
    assert jax.tree.all(jax.tree.map(np.isfinite, judged.figures()))
