"""Tables of the reward terms by hand, and that only training events count."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from jaxrec.data.prepared import PreparedData
from jaxrec.rl.reward_tables import (
    SHRINKAGE,
    fit_reward_tables,
    novelties,
    running_user_means,
    shrunk_item_ratings,
)


def test_novelty_by_hand() -> None:
    """Seven users, of whom none, one, three and all interacted with the item, and all of them twice."""
    np.testing.assert_allclose(novelties(np.array([0, 1, 3, 7, 14]), users=7), [1.0, 2 / 3, 1 / 3, 0.0, 0.0], rtol=1e-6)


def test_a_users_mean_knows_only_what_came_before() -> None:
    offsets, ratings = np.array([0, 4, 5]), np.array([1.0, -1.0, 0.0, 0.5, 0.2], np.float32)
    mean = 0.6
    start, after_one, after_two = (
        (total + SHRINKAGE * mean) / (count + SHRINKAGE) for total, count in ((0.0, 0), (1.0, 1), (1.0, 2))
    )
    np.testing.assert_allclose(
        running_user_means(offsets, ratings, mean), [start, after_one, after_one, after_two, start], rtol=1e-6
    )
    changed = ratings.copy()
    changed[3:] = 1.0
    np.testing.assert_array_equal(
        running_user_means(offsets, changed, mean)[:4], running_user_means(offsets, ratings, mean)[:4]
    )


def test_tables_of_data_are_fitted_on_training_events(small_data: PreparedData) -> None:
    tables = fit_reward_tables(small_data)
    held_out = np.concatenate([small_data.split.validation.rows, small_data.split.test.rows])
    ratings = small_data.histories.ratings.copy()
    ratings[held_out] = 0.5
    changed = dataclasses.replace(small_data, histories=dataclasses.replace(small_data.histories, ratings=ratings))
    for table, again in zip(tables, fit_reward_tables(changed), strict=True):
        np.testing.assert_array_equal(table, again)
        assert float(jnp.min(table)) >= 0
        assert float(jnp.max(table)) <= 1 + 1e-6
    items = np.asarray(tables.item_centred)
    assert abs(items[1:].mean() - 0.5) < 0.01
    assert items.std() > 0.001


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
