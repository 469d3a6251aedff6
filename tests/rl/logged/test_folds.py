"""Which users are held out, and which of their events are decisions."""

import numpy as np

from jaxrec.data.prepared import PreparedData
from jaxrec.rl.config import LoggedConfig
from jaxrec.rl.logged.folds import fold_of_users, last_events, without_users


def test_folds_are_of_like_size_and_follow_from_the_seed() -> None:
    fold = fold_of_users(40, LoggedConfig(folds=3))
    assert sorted(np.bincount(fold)) == [13, 13, 14]
    np.testing.assert_array_equal(fold, fold_of_users(40, LoggedConfig(folds=3)))
    assert not np.array_equal(fold, fold_of_users(40, LoggedConfig(folds=3, seed=1)))


def test_held_out_users_have_no_training_events_and_no_validation_case(small_data: PreparedData) -> None:
    held_out = np.arange(small_data.histories.user_count) < 10
    others = without_users(small_data, held_out)
    assert (others.split.train_counts[held_out] == 0).all()
    np.testing.assert_array_equal(others.split.train_counts[~held_out], small_data.split.train_counts[~held_out])
    assert set(others.split.validation.users) == set(range(10, small_data.histories.user_count))


def test_the_last_training_events_but_no_first_one(small_data: PreparedData) -> None:
    """28 of each user's 30 events are training events: the last 3 of user 4 are their numbers 25, 26 and 27."""
    counts = np.where(np.arange(small_data.histories.user_count) == 4, small_data.split.train_counts, 0)
    cases = last_events(small_data.histories, counts, events=3, limit=100)
    first = small_data.histories.offsets[4]
    assert cases.users.tolist() == [4, 4, 4]
    assert (cases.rows - first).tolist() == [25, 26, 27]
    everything = last_events(small_data.histories, counts, events=100, limit=100)
    assert (everything.rows - first).tolist() == list(range(1, 28))


def test_a_limit_gives_each_user_fewer(small_data: PreparedData) -> None:
    """Of 40 users at most 125 events: 3 of each, 120 in all; at most 30: one of each for 30 of them."""
    log = small_data.histories, small_data.split.train_counts
    assert np.bincount(last_events(*log, 40, 125).users).tolist() == [3] * 40
    few = last_events(*log, 40, 30)
    assert len(few) == 30
    assert np.bincount(few.users).max() == 1


def test_users_without_training_events_have_no_decision(small_data: PreparedData) -> None:
    counts = np.array([[28, 1, 0][user % 3] for user in range(small_data.histories.user_count)])
    cases = last_events(small_data.histories, counts, 2, 1000)
    assert set(cases.users) == {user for user in range(len(counts)) if counts[user] > 1}
