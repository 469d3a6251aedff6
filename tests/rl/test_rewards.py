import jax.numpy as jnp
import numpy as np
import pytest

from jaxrec.config import RewardWeights
from jaxrec.rl.rewards import (
    SHRINKAGE,
    RewardTables,
    discounts,
    genre_directions,
    reward_terms,
    shrunk_item_ratings,
    total_reward,
)

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
TABLES = RewardTables(jnp.asarray(genre_directions(GENRES)), jnp.asarray(ITEM_RATINGS))


def reward(recommended: int, target: int, target_rating: float, weights: RewardWeights = RewardWeights()) -> float:
    terms = reward_terms(jnp.array([recommended]), jnp.int32(target), jnp.float32(target_rating), TABLES)
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
    ],
)
def test_each_term_by_itself(weights: RewardWeights, expected: float) -> None:
    assert reward(recommended=3, target=1, target_rating=1.0, weights=weights) == pytest.approx(expected)


def test_terms_of_a_batch_of_slates_are_those_of_its_items() -> None:
    slates, targets = np.array([[1, 2, 3], [4, 3, 2]], np.int32), np.array([2, 4], np.int32)
    ratings = np.array([0.1, 0.3], np.float32)
    terms = reward_terms(jnp.asarray(slates), jnp.asarray(targets), jnp.asarray(ratings), TABLES)
    for row in range(2):
        for slot in range(3):
            alone = reward_terms(
                jnp.asarray(slates[row, slot : slot + 1]), jnp.asarray(targets[row]), jnp.asarray(ratings[row]), TABLES
            )
            for of_batch, of_one in zip(terms, alone, strict=True):
                assert of_batch[row, slot] == pytest.approx(float(of_one[0]))


def test_discounts_are_those_of_dcg_scaled_to_one() -> None:
    total = 1 / np.log2(2) + 1 / np.log2(3) + 1 / np.log2(4)
    np.testing.assert_allclose(discounts(3), [1 / total, 1 / np.log2(3) / total, 0.5 / total], rtol=1e-6)


def test_item_ratings_are_shrunk_towards_the_global_mean() -> None:
    items = np.array([1, 1, 1, 2, 3], np.int32)
    ratings = np.array([1.0, 1.0, 0.4, 0.0, -1.0], np.float32)  # item 3's only rating is missing
    mean = (1.0 + 1.0 + 0.4 + 0.0) / 4
    shrunk = shrunk_item_ratings(items, ratings, item_count=4)
    np.testing.assert_allclose(
        shrunk[1:],
        [(2.4 + SHRINKAGE * mean) / (3 + SHRINKAGE), (0.0 + SHRINKAGE * mean) / (1 + SHRINKAGE), mean, mean],
        rtol=1e-6,
    )


def test_without_ratings_every_item_is_rated_alike() -> None:
    shrunk = shrunk_item_ratings(np.array([1, 2], np.int32), np.array([-1.0, -1.0], np.float32), item_count=3)
    np.testing.assert_array_equal(shrunk, np.full(4, 0.5, np.float32))
