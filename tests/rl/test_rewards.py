import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.rl.config import RewardWeights
from jaxrec.rl.reward_tables import (
    genre_directions,
)
from jaxrec.rl.rewards import RewardTables, diversity_term, rank_discounts, slate_reward_terms, total_reward

# Items 1 and 2 have five genres each and share two of them; item 3 has one genre, item 4 none.
GENRES = np.array(
    [
        [0, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 1, 0, 0, 0],
        [0, 0, 0, 1, 1, 1, 1, 1],
        [1, 0, 0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 0, 0],
    ],
    np.float32,
)
ITEM_RATINGS = np.array([0.5, 0.6, 0.75, 0.2, 0.9], np.float32)
CENTRED = np.array([0.5, 0.55, 0.6, 0.3, 0.7], np.float32)
NOVELTY = np.array([0.0, 0.1, 0.2, 0.9, 1.0], np.float32)
TABLES = RewardTables(*map(jnp.asarray, (genre_directions(GENRES), ITEM_RATINGS, CENTRED, NOVELTY)))
USER_MEAN = 0.6


def reward(recommended: int, target: int, target_rating: float, weights: RewardWeights = RewardWeights()) -> float:
    logged = jnp.int32(target), jnp.float32(target_rating), jnp.float32(USER_MEAN)
    terms = slate_reward_terms(jnp.array([recommended]), *logged, TABLES)
    return float(total_reward(terms, weights)[0])


def test_worked_example_of_the_reference() -> None:
    """Wrong movie, genre similarity 0.4, rating reward 0.75."""
    assert reward(recommended=2, target=1, target_rating=1.0) == pytest.approx(0.3 * 0.4 + 0.3 * 0.75)
    assert reward(recommended=2, target=1, target_rating=1.0) == pytest.approx(0.345)


def test_a_hit_earns_its_logged_rating_and_all_of_its_genres() -> None:
    assert reward(recommended=1, target=1, target_rating=0.25) == pytest.approx(0.4 + 0.3 * 1 + 0.3 * 0.25)


def test_items_without_genres_have_no_genre_reward() -> None:
    assert reward(recommended=4, target=4, target_rating=1.0) == pytest.approx(0.4 + 0.3 * 1.0)
    assert reward(recommended=4, target=1, target_rating=1.0) == pytest.approx(0.3 * 0.9)
    assert reward(recommended=1, target=4, target_rating=1.0) == pytest.approx(0.3 * 0.6)


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        (RewardWeights(hit=1, genre=0, rating=0), 0.0),
        (RewardWeights(hit=0, genre=1, rating=0), 1 / np.sqrt(5)),
        (RewardWeights(hit=0, genre=0, rating=1), 0.2),
        (RewardWeights(hit=0, genre=0, rating=0, centred_rating=1), 0.3),
        (RewardWeights(hit=0, genre=0, rating=0, novelty=1), 0.9),
        (RewardWeights(hit=0, genre=0, rating=0, diversity=1), 1.0),
    ],
)
def test_each_term_by_itself(weights: RewardWeights, expected: float) -> None:
    assert reward(recommended=3, target=1, target_rating=1.0, weights=weights) == pytest.approx(expected)


def test_new_terms_weigh_nothing_unless_asked_for() -> None:
    assert RewardWeights() == RewardWeights(0.4, 0.3, 0.3, 0.0, 0.0, 0.0)


def test_a_hit_is_rated_beside_the_mean_of_its_user() -> None:
    only = RewardWeights(hit=0, genre=0, rating=0, centred_rating=1)
    assert reward(recommended=1, target=1, target_rating=1.0, weights=only) == pytest.approx(0.5 + (1.0 - 0.6) / 2)
    assert reward(recommended=1, target=1, target_rating=0.6, weights=only) == pytest.approx(0.5)
    assert reward(recommended=2, target=1, target_rating=1.0, weights=only) == pytest.approx(0.6)


def test_diversity_by_hand() -> None:
    """Items 1 and 2 share two of five genres, 1 and 3 one of five and one; item 4 has none."""
    directions = jnp.asarray(genre_directions(GENRES))
    expected = [1.0, 1 - 2 / 5, 1 - (1 / np.sqrt(5) + 0) / 2, 1.0]
    np.testing.assert_allclose(diversity_term(jnp.array([1, 2, 3, 4]), directions), expected, rtol=1e-6)
    np.testing.assert_allclose(diversity_term(jnp.array([1, 1, 1]), directions), [1.0, 0.0, 0.0], atol=1e-6)


def test_terms_of_a_batch_of_slates_are_those_of_its_items() -> None:
    slates, targets = np.array([[1, 2, 3], [4, 3, 2]], np.int32), np.array([2, 4], np.int32)
    ratings, means = np.array([0.1, 0.3], np.float32), np.array([0.5, 0.7], np.float32)
    terms = slate_reward_terms(*map(jnp.asarray, (slates, targets, ratings, means)), TABLES)
    for row in range(2):
        for slot in range(3):
            logged = (jnp.asarray(column[row]) for column in (targets, ratings, means))
            alone = slate_reward_terms(jnp.asarray(slates[row, slot : slot + 1]), *logged, TABLES)
            for name in ("hit", "genre", "rating", "centred_rating", "novelty"):
                assert getattr(terms, name)[row, slot] == pytest.approx(float(getattr(alone, name)[0]))


def test_discounts_are_those_of_dcg_scaled_to_one() -> None:
    total = 1 / np.log2(2) + 1 / np.log2(3) + 1 / np.log2(4)
    np.testing.assert_allclose(rank_discounts(3), [1 / total, 1 / np.log2(3) / total, 0.5 / total], rtol=1e-6)
