"""What is learned from held-out decisions, what of it stacking and rewards give, and when it is used."""

import dataclasses

import numpy as np
import pytest

from jaxrec.data.prepared import PreparedData
from jaxrec.errors import TrainingError
from jaxrec.rl.config import BUDGET_WEIGHTS, LoggedConfig, RewardWeights
from jaxrec.rl.logged.learn import IMITATION, MIX, PERMUTED, RERANKED, Results, learn_reranker, outcome, results
from tests.rl.logged.made_up import decisions

CONFIG = LoggedConfig(folds=2, updates=100, samples=2)


def test_results_by_hand(small_data: PreparedData) -> None:
    """Three candidates, ranked 2, 3, 1: the target, the last one, comes first; it was the mix's third."""
    log = decisions(small_data, range(1), strength=0.0, each=2)
    log = log._replace(
        items=log.items[:, :3],
        mix=np.array([[3.0, 2.0, 1.0]] * 2, np.float32),
        place=np.array([2, -1]),
        rank=np.array([3, 17]),
    )
    rewards = np.array([[0.1, 0.2, 0.7]] * 2, np.float32)
    config = dataclasses.replace(CONFIG, slate_size=2)
    found = results(log, np.array([[0.0, -1.0, 5.0]] * 2), rewards, np.array([1.0, 0.5]), config)
    assert found.ndcg.tolist() == [1.0, 0.0]  # of the second one the target is no candidate, and keeps its rank
    assert found.reward_weighted_ndcg.tolist() == pytest.approx([1.0 / 0.75, 0.0])
    first, second = 1.0, 1 / np.log2(3)
    assert found.reward == pytest.approx((0.7 * first + 0.1 * second) / (first + second))
    of_mix = results(log, log.mix, rewards, np.array([1.0, 0.5]), config)
    assert of_mix.ndcg[0] == pytest.approx(0.5)  # 1 / log2(3 + 1)


def test_a_feature_that_says_what_comes_next_is_used(small_data: PreparedData) -> None:
    folds = [decisions(small_data, users, strength=1.5) for users in (range(15), range(15, 30))]
    validation = decisions(small_data, range(30, 40), strength=1.5)
    learned = learn_reranker(folds, validation, small_data, CONFIG)
    found = learned.outcome
    assert found.used
    assert found.reason.startswith("the new policy is used: for users that neither the models nor the policy know")
    assert found.differences["ndcg_by_stacking"]["low"] > 0.05
    assert abs(found.differences["reward_by_permuted_rewards"]["mean"]) < 0.003
    assert found.differences["ndcg"]["mean"] == pytest.approx(
        found.figures[RERANKED]["ndcg"] - found.figures[MIX]["ndcg"]
    )
    assert [point.name for point in learned.curves] == [IMITATION, RERANKED, PERMUTED]
    assert learned.curves[1].ndcg == pytest.approx(found.differences["ndcg"]["mean"])
    assert [point.reward_weight for point in learned.frontier] == [0.0, CONFIG.reward_weight]
    assert learned.frontier[1] == learned.curves[1]


def test_without_anything_to_learn_the_mix_stays(small_data: PreparedData) -> None:
    folds = [decisions(small_data, users, strength=0.0) for users in (range(15), range(15, 30))]
    found = learn_reranker(folds, decisions(small_data, range(30, 40), 0.0), small_data, CONFIG).outcome
    assert not found.used
    assert found.reason.startswith("what ranks now stays: NDCG@10 did not improve significantly for held-out users")


def test_a_budget_chooses_the_weight_that_earns_most_within_it(small_data: PreparedData) -> None:
    """Novelty is all that pays, and what comes next is not novel: the more weight, the more it costs."""
    config = dataclasses.replace(CONFIG, rewards=RewardWeights(hit=0.0, genre=0.0, rating=0.0, novelty=1.0))
    folds = [decisions(small_data, users, strength=1.5, each=10) for users in (range(15), range(15, 30))]
    log = decisions(small_data, range(30, 40), 1.5, each=10)
    learned = learn_reranker(folds, log, small_data, dataclasses.replace(config, ndcg_budget=0.02))
    weights = [point.reward_weight for point in learned.frontier]
    assert weights == [0.0, *BUDGET_WEIGHTS]
    chosen = learned.curves[1].reward_weight
    mix = learned.outcome.figures[MIX]["ndcg"]
    floor = 0.98 * learned.outcome.figures[IMITATION]["ndcg"] - mix
    within = [point for point in learned.frontier if point.ndcg >= floor - 1e-9]
    assert chosen == max(within, key=lambda point: point.reward).reward_weight
    assert f"weight {chosen:g}, chosen for a budget of 2.00% of NDCG@10" in learned.outcome.reason


def test_a_budget_of_nothing_leaves_imitation_at_least(small_data: PreparedData) -> None:
    config = dataclasses.replace(CONFIG, updates=10, ndcg_budget=0.0)
    folds = [decisions(small_data, users, strength=1.0, each=4) for users in (range(9), range(9, 18))]
    learned = learn_reranker(folds, decisions(small_data, range(18, 22), 1.0, each=4), small_data, config)
    assert learned.curves[1].ndcg >= learned.frontier[0].ndcg - 1e-9
    assert learned.reward_weight in (0.0, *BUDGET_WEIGHTS)


def test_a_weight_of_the_rewards_that_is_too_large_is_named(small_data: PreparedData) -> None:
    """Times the reward it is beyond float32, whose largest number is 3.4e38; alone it is not."""
    folds = [decisions(small_data, users, strength=1.0, each=4) for users in (range(9), range(9, 18))]
    log = decisions(small_data, range(18, 22), 1.0, each=4)
    large = dataclasses.replace(CONFIG, updates=5, reward_weight=1e38)
    assert [point.reward_weight for point in learn_reranker(folds, log, small_data, large).frontier] == [0.0, 1e38]
    with pytest.raises(TrainingError, match=r"^with rewards of weight 1e\+38: .* is not finite at update"):
        learn_reranker(folds, log, small_data, dataclasses.replace(large, rewards=RewardWeights(hit=1e3)))


def test_a_policy_that_falls_on_validation_is_not_used() -> None:
    users = np.arange(200)
    low, high = (Results(*(np.full(200, value) for _ in range(3))) for value in (0.1, 0.2))
    found = {MIX: low, IMITATION: high, RERANKED: high, PERMUTED: high}
    assert outcome(found, users, high, low, users, CONFIG).used
    refused = outcome(found, users, low, high, users, CONFIG)
    assert not refused.used
    assert refused.reason.startswith("what ranks now stays: NDCG@10 fell significantly on validation: ")
