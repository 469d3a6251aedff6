"""A policy on logged cases: what is evaluated is what the recommender does, with and without a reranker."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxrec.data.prepared import PreparedData
from jaxrec.data.split import Cases
from jaxrec.evaluation.ranking import rank_cases
from jaxrec.evaluation.scorers import hybrid_scorer
from jaxrec.models.hybrid import Hybrid
from jaxrec.rl.cases import CaseResults, case_evaluator, case_states, compare
from jaxrec.rl.config import RewardWeights
from jaxrec.rl.reward_tables import fit_reward_tables
from jaxrec.rl.rewards import rank_discounts, slate_reward_terms, total_reward
from jaxrec.rl.scoring import frozen_scoring, new_head
from jaxrec.rl.states import states_before

MAX_LENGTH = 50


def test_reward_weighted_ndcg_by_hand() -> None:
    """Three cases, ranks 1, 2 and 11 without and 1, 3 and 3 with the request time; ratings 1, 0.5 and 0.25."""
    ranks = np.array([[1, 2, 11], [1, 3, 3]])
    zeros = np.zeros((2, 3))
    top = np.array([[[1, 2], [1, 2], [1, 3]], [[4, 0], [4, 0], [4, 0]]])
    judged = CaseResults(ranks, zeros, {}, zeros, np.array([1.0, 0.5, 0.25]), top, 6, np.arange(3))
    expected_ndcg = [1.0, (1 / np.log2(3) + 0.5) / 2, (0 + 0.5) / 2]
    expected = (1.0 * expected_ndcg[0] + 0.5 * expected_ndcg[1] + 0.25 * expected_ndcg[2]) / 1.75
    assert judged.figures()["reward_weighted_ndcg_10"] == pytest.approx(expected)
    assert judged.figures()["ndcg_10"] == pytest.approx(np.mean(expected_ndcg))
    assert judged.figures()["hit_rate_10"] == pytest.approx((1 + 1 + 0.5) / 3)
    assert judged.figures()["coverage_10"] == pytest.approx((3 / 6 + 1 / 6) / 2)


def test_differences_are_paired_by_user() -> None:
    """One user of two moves from rank 2 to rank 1, in both variants."""
    zeros = np.zeros((2, 2))
    before, after = (
        CaseResults(ranks, zeros, {}, zeros, np.ones(2), np.zeros((2, 2, 10), int), 6, np.arange(2))
        for ranks in (np.array([[2, 5], [2, 5]]), np.array([[1, 5], [1, 5]]))
    )
    gain = compare(after, before)["ndcg_10"]
    assert gain.mean == pytest.approx((1 - 1 / np.log2(3)) / 2)
    assert gain.low == 0.0
    assert gain.high == pytest.approx(1 - 1 / np.log2(3))


@pytest.mark.parametrize(("with_policy", "reranked"), [(False, False), (True, False), (False, True), (True, True)])
def test_evaluated_is_what_the_recommender_does(
    small_data: PreparedData,
    random_hybrid: Callable[[PreparedData, int, bool], Hybrid],
    with_random_reranker: Callable[[Hybrid, PreparedData], Hybrid],
    with_policy: bool,
    reranked: bool,
) -> None:
    """Ranks are those of the evaluation, and rewards those of its top 10, with and without the request time."""
    hybrid = random_hybrid(small_data, 0, True)
    if reranked:
        hybrid = with_random_reranker(hybrid, small_data)
    weights, cases = RewardWeights(), small_data.split.validation
    item_ratings = np.linspace(0, 1, len(small_data.catalog) + 1, dtype=np.float32)
    tables = fit_reward_tables(small_data)._replace(item_ratings=jnp.asarray(item_ratings))
    supervised = hybrid.with_policy(None)
    recommender = hybrid if with_policy else supervised
    scoring = frozen_scoring(supervised, tables)
    graphdef, head = new_head(32, len(small_data.catalog), 8, seed=0, reranks=reranked)
    if with_policy:
        head = nnx.to_pure_dict(nnx.state(hybrid.policy))
    states = case_states(supervised, small_data, cases, item_ratings)
    judged = case_evaluator(graphdef, scoring, states, weights)(head)

    scorer = hybrid_scorer(recommender)
    targets = jnp.asarray(small_data.histories.items[cases.rows])
    ratings = jnp.asarray(small_data.unit_ratings()[cases.rows])
    for variant, request_time in enumerate((False, True)):
        ranked = rank_cases(scorer, small_data, cases, MAX_LENGTH, request_time)
        np.testing.assert_array_equal(judged.rank[variant], ranked.ranks)
        np.testing.assert_array_equal(judged.top[variant], ranked.top)
        terms = slate_reward_terms(jnp.asarray(ranked.top), targets, ratings, jnp.asarray(states.user_mean), tables)
        np.testing.assert_allclose(judged.reward[variant], total_reward(terms, weights) @ rank_discounts(10), rtol=1e-5)
    if with_policy:
        assert judged.kl.min() > 0
    else:
        np.testing.assert_array_equal(judged.kl, 0.0)
    np.testing.assert_array_equal(judged.weight, ratings)
    assert jax.tree.all(jax.tree.map(np.isfinite, judged.figures()))


def test_states_before_cases_are_those_of_their_histories_alone(small_data: PreparedData, small_hybrid: Hybrid) -> None:
    """All events of two users but the first ones as cases: each state is that of the events before it."""
    offsets = small_data.histories.offsets
    rows = np.concatenate([np.arange(offsets[user] + 1, offsets[user + 1]) for user in (3, 5)])
    users = np.repeat([3, 5], [offsets[4] - offsets[3] - 1, offsets[6] - offsets[5] - 1])
    order = np.random.default_rng(0).permutation(len(rows))
    found = states_before(small_hybrid, small_data, Cases(users[order], rows[order]))
    assert found.summary is None
    with pytest.raises(ValueError, match="a case is its user's first event"):
        states_before(small_hybrid, small_data, Cases(users[:1], offsets[3:4]))
    for place in (0, 7, len(order) - 1):
        alone = states_before(small_hybrid, small_data, Cases(users[order][[place]], rows[order][[place]]))
        np.testing.assert_allclose(found.outputs[place], alone.outputs[0], atol=1e-6)
        at = rows[order][place]
        assert found.recent[place, 0] == small_data.histories.items[at - 1]
