from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxrec.data.prepared import PreparedData
from jaxrec.evaluation.metrics import ndcg
from jaxrec.evaluation.ranking import rank_cases
from jaxrec.evaluation.scorers import hybrid_scorer
from jaxrec.models.hybrid import Hybrid
from jaxrec.rl.config import LoggedConfig, RewardWeights
from jaxrec.rl.logged.evaluate import CaseResults, case_evaluator, case_states, logged_outcome
from jaxrec.rl.logged.loss import start_params
from jaxrec.rl.logged.methods import REINFORCE
from jaxrec.rl.reward_tables import fit_reward_tables
from jaxrec.rl.rewards import rank_discounts, slate_reward_terms, total_reward
from jaxrec.rl.scoring import frozen_scoring

MAX_LENGTH = 50
CASES = 400


def results(rank: np.ndarray, reward: float = 0.3) -> CaseResults:
    """Cases with these ranks [cases] and rewards around `reward`, all targets rated alike."""
    noise = np.random.default_rng(0).normal(0, 0.05, (2, len(rank)))
    zeros = np.zeros((2, len(rank)))
    top = np.ones((2, len(rank), 10), np.int32)
    return CaseResults(
        np.stack([rank, rank]), reward + noise, {}, zeros, np.full(len(rank), 0.5), top, 50, np.arange(len(rank))
    )


RANKS = np.arange(CASES) % 40 + 1
BETTER, WORSE = np.maximum(RANKS - 2, 1), RANKS + 2
SUPERVISED = results(RANKS)
NOT = "did not improve significantly"


def by_chance(flips: int) -> np.ndarray:
    """Ranks of which a few got better by one: a higher mean, whose interval reaches below 0 for one or two."""
    ranks = RANKS.copy()
    ranks[np.flatnonzero(RANKS == 2)[:flips]] = 1
    return ranks


@pytest.mark.parametrize(
    ("policy", "controls", "used", "says"),
    [
        (results(BETTER, 0.31), (SUPERVISED, SUPERVISED), True, "the new policy is used"),
        (
            results(BETTER, 0.29),
            (SUPERVISED, SUPERVISED),
            False,
            f"on validation over the supervised models the slate reward {NOT}:",
        ),
        (results(WORSE, 0.31), (SUPERVISED, SUPERVISED), False, f"NDCG@10 {NOT} and NDCG@10 fell:"),
        (
            results(by_chance(1), 0.31),
            (SUPERVISED, SUPERVISED),
            False,
            f"over the supervised models the reward-weighted NDCG@10 {NOT}:",
        ),
        (results(BETTER, 0.31), (SUPERVISED, results(BETTER)), False, "the control with permuted rewards improved"),
        (results(BETTER, 0.31), (results(BETTER), results(BETTER)), True, "the policy beyond that +0.0000"),
    ],
)
def test_decision_and_its_reason(
    policy: CaseResults, controls: tuple[CaseResults, CaseResults], used: bool, says: str
) -> None:
    decision = logged_outcome(policy, SUPERVISED, *controls)
    assert decision.used is used
    assert says in decision.reason
    assert decision.differences["ndcg_10"]["mean"] == pytest.approx(
        (ndcg(policy.rank, 10) - ndcg(SUPERVISED.rank, 10)).mean()
    )


BEST = np.maximum(RANKS - 4, 1)


@pytest.mark.parametrize(
    ("policy", "in_use", "used", "starts"),
    [
        (results(BETTER, 0.31), results(BEST, 0.32), False, f"over the policy in use the slate reward {NOT} and "),
        (results(BEST, 0.32), results(BETTER, 0.31), True, ""),
        # Not better than the supervised models, though better than a policy that is worse than these.
        (results(RANKS, 0.3), results(WORSE, 0.29), False, f"over the supervised models the slate reward {NOT} and "),
        # More reward than the policy in use, from which it takes NDCG.
        (
            results(BETTER, 0.33),
            results(BEST, 0.32),
            False,
            f"over the policy in use the reward-weighted NDCG@10 {NOT}",
        ),
    ],
)
def test_a_policy_must_be_better_than_the_one_in_use_too(
    policy: CaseResults, in_use: CaseResults, used: bool, starts: str
) -> None:
    decision = logged_outcome(policy, SUPERVISED, SUPERVISED, SUPERVISED, in_use)
    assert decision.used is used
    verdict = "the new policy is used: " if used else f"keeping the policy in use: on validation {starts}"
    assert decision.reason.startswith(verdict)
    for other, name in ((SUPERVISED, "supervised models"), (in_use, "policy in use")):
        rewards = f"{policy.figures()['reward']:.4f} against {other.figures()['reward']:.4f}"
        assert f"mean slate reward {rewards} of the {name}" in decision.reason
    assert decision.differences["reward"]["mean"] == pytest.approx((policy.reward - SUPERVISED.reward).mean())
    over = decision.differences["reward_over_policy_in_use"]["mean"]
    assert over == pytest.approx((policy.reward - in_use.reward).mean())


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


@pytest.mark.parametrize("with_policy", [False, True])
def test_evaluated_is_what_the_recommender_does(
    small_data: PreparedData, random_hybrid: Callable[[PreparedData, int, bool], Hybrid], with_policy: bool
) -> None:
    """Ranks are those of the evaluation, and rewards those of its top 10, with and without the request time."""
    hybrid = random_hybrid(small_data, 0, True)
    weights, cases = RewardWeights(), small_data.split.validation
    item_ratings = np.linspace(0, 1, len(small_data.catalog) + 1, dtype=np.float32)
    tables = fit_reward_tables(small_data)._replace(item_ratings=jnp.asarray(item_ratings))
    supervised = hybrid.with_policy(None)
    recommender = hybrid if with_policy else supervised
    scoring = frozen_scoring(supervised, tables)
    graphdef, start = start_params(32, len(small_data.catalog), LoggedConfig(policy_width=8), REINFORCE)
    head = nnx.to_pure_dict(nnx.state(hybrid.policy)) if with_policy else start.head
    states = case_states(hybrid, small_data, cases, item_ratings)
    judged = case_evaluator(graphdef, scoring, states, small_data, MAX_LENGTH, weights)(head)

    scorer = hybrid_scorer(recommender)
    targets = jnp.asarray(small_data.histories.items[cases.rows])
    ratings = jnp.asarray(small_data.unit_ratings()[cases.rows])
    for variant, request_time in enumerate((False, True)):
        ranked = rank_cases(scorer, small_data, cases, MAX_LENGTH, request_time)
        np.testing.assert_array_equal(judged.rank[variant], ranked.ranks)
        np.testing.assert_array_equal(judged.top[variant], ranked.top)
        terms = slate_reward_terms(jnp.asarray(ranked.top), targets, ratings, jnp.asarray(states.user_mean), tables)
        np.testing.assert_allclose(judged.reward[variant], total_reward(terms, weights) @ rank_discounts(10), rtol=1e-5)
        np.testing.assert_allclose(
            judged.terms["genre"][variant], terms.genre @ rank_discounts(10), rtol=1e-5, atol=1e-7
        )
    if with_policy:
        assert judged.kl.min() > 0
    else:
        np.testing.assert_array_equal(judged.kl, 0.0)
    np.testing.assert_array_equal(judged.weight, ratings)
    assert jax.tree.all(jax.tree.map(np.isfinite, judged.figures()))
