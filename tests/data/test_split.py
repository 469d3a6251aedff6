"""The three splits: by hand, and that nothing that is fitted sees a test event."""

import dataclasses
from collections.abc import Callable

import numpy as np
import pandas as pd
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from jaxrec.config import FilterOn, PrepareConfig, RatingScale, SplitKind, Ties
from jaxrec.data.histories import Histories, user_blocks
from jaxrec.data.prepare import prepare
from jaxrec.data.prepared import PreparedData
from jaxrec.data.schema import GENRES, ITEM, TITLE
from jaxrec.data.split import TEST, TRAINING, VALIDATION, Cases, temporal_cut, user_held_out, user_roles
from jaxrec.errors import DataError

Row = tuple[int, int, float, int]
SCALE = RatingScale(0.5, 5.0)


def log(rows: list[Row]) -> pd.DataFrame:
    frame = pd.DataFrame(rows, columns=["user_id", "item_id", "rating", "timestamp"])
    return frame.astype({"rating": np.float32, "timestamp": np.int64})


def test_held_out_users_by_hand() -> None:
    offsets = np.array([0, 2, 4, 5, 7])
    items = np.array([1, 2, 1, 2, 1, 1, 3], np.int32)
    histories = Histories(offsets, items, np.ones(7, np.float32), np.arange(7))
    split = user_held_out(histories, np.array([TRAINING, TEST, VALIDATION, VALIDATION]))
    assert split.train_counts.tolist() == [2, 0, 0, 0]
    assert (split.test.users.tolist(), split.test.rows.tolist()) == ([1], [3])
    assert len(split.validation) == 0  # one has no history, and the other's movie 3 is not in training


def test_roles_follow_from_seed_and_id_alone() -> None:
    ids = np.arange(5000)
    roles = user_roles(ids, seed=0)
    assert np.bincount(roles).tolist() == [3980, 505, 515] or abs((roles != TRAINING).mean() - 0.2) < 0.03
    assert (user_roles(ids[::-1], seed=0)[::-1] == roles).all()
    assert (user_roles(ids, seed=1) != roles).any()


def test_the_temporal_cut_is_numpys_higher_quantile() -> None:
    rng = np.random.default_rng(0)
    for size in (1, 2, 10, 11, 1000):
        times = rng.integers(0, 10**9, size)
        assert temporal_cut(times) == np.quantile(times, 0.9, method="higher")


def test_blocks_of_users_cover_all_and_never_cut_a_user() -> None:
    offsets = np.array([0, 3, 3, 4, 20, 22])
    assert list(user_blocks(offsets, 4)) == [(0, 3), (3, 4), (4, 5)]
    assert list(user_blocks(np.array([0]), 4)) == []


def test_leave_one_out_fitted_on_training_drops_what_only_tests_hold() -> None:
    rows = [(1, 10, 3.0, 1), (1, 20, 3.0, 2), (1, 30, 3.0, 3), (2, 10, 3.0, 1), (2, 20, 3.0, 2), (2, 40, 3.0, 3)]
    rows += [(3, 20, 3.0, 1)]
    data = prepare(log(rows), None, PrepareConfig(1, 1, filter_on=FilterOn.TRAINING))
    assert data.catalog.ids.raw_ids.tolist() == [10, 20]
    assert data.split.train_counts.tolist() == [1, 1, 1]
    assert data.split.validation.rows.tolist() == [1, 3]  # the movies 30 and 40 of the tests are not known
    assert len(data.split.test) == 0


STRICT = [
    (SplitKind.LEAVE_ONE_OUT, FilterOn.TRAINING),
    (SplitKind.TEMPORAL, FilterOn.LOG),
    (SplitKind.USER_HELD_OUT, FilterOn.LOG),
]
events = st.tuples(st.integers(1, 25), st.integers(1, 8), st.sampled_from([0.5, 3.0, 5.0]), st.integers(0, 30))
logs = st.lists(events, min_size=5, max_size=80, unique_by=lambda event: (event[0], event[1], event[3]))
movies = pd.DataFrame({ITEM: range(1, 500), TITLE: "T", GENRES: [f"G{i % 7}" for i in range(1, 500)]})


def fitted(data: PreparedData) -> dict:
    """Everything that is fitted: the catalogue with its genres, the training events, and their popularity."""
    histories, rows = data.histories, data.split.train_rows(data.histories)
    users = data.users.raw_ids[histories.users()[rows]].tolist()
    items = data.catalog.ids.decode(histories.items[rows]).tolist() if len(rows) else []
    times, ratings = histories.times[rows].tolist(), histories.ratings[rows].tolist()
    return {
        "catalog": data.catalog.ids.raw_ids.tolist(),
        "genres": data.catalog.genre_matrix().tolist(),
        "training": sorted(zip(users, items, ratings, times, strict=True)),
        "popularity": data.train_popularity().tolist(),
    }


def held_out(rows: list[Row], split: SplitKind, config: PrepareConfig) -> Callable[[Row], bool]:
    """Which rows of the log are tests (or later), from the definition of the splits alone."""
    if split is SplitKind.TEMPORAL:
        cut = np.quantile([row[3] for row in rows], 0.9, method="higher")
        return lambda row: row[3] >= cut
    if split is SplitKind.USER_HELD_OUT:
        users = np.array(sorted({row[0] for row in rows}))
        role = dict(zip(users.tolist(), user_roles(users, config.seed).tolist(), strict=True))
        return lambda row: role[row[0]] != TRAINING
    by_user: dict[int, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row[3]):
        by_user.setdefault(row[0], []).append(row)
    return lambda row: len(by_user[row[0]]) >= 3 and row in by_user[row[0]][-2:]


@settings(max_examples=80, deadline=None)
@given(logs, st.sampled_from(STRICT), st.integers(1, 2), st.integers(0, 3))
def test_no_test_event_is_visible_to_anything_fitted(
    rows: list[Row], kind: tuple[SplitKind, FilterOn], minimum: int, seed: int
) -> None:
    split, filter_on = kind
    config = PrepareConfig(minimum, minimum, split, Ties.FILE, SCALE, seed, filter_on)
    is_held_out = held_out(rows, split, config)
    # Other movies and ratings in every held-out event; the times stay, as the cut is the protocol's, not fitted.
    changed = [(u, 100 + 3 * i, 5.5 - r, t) if is_held_out((u, i, r, t)) else (u, i, r, t) for u, i, r, t in rows]
    assume(changed != rows)
    results = []
    for chosen in (rows, changed):
        try:
            results.append(fitted(prepare(log(chosen), movies, config)))
        except DataError:
            results.append({})
    assert results[0] == results[1]


@settings(max_examples=30, deadline=None)
@given(logs, st.sampled_from(list(SplitKind)), st.sampled_from(list(FilterOn)))
def test_cases_are_never_in_training_and_have_a_history(rows: list[Row], split: SplitKind, filter_on: FilterOn) -> None:
    config = PrepareConfig(1, 1, split, Ties.FILE, SCALE, 0, filter_on)
    try:
        data = prepare(log(rows), None, config)
    except DataError:
        return
    training = set(data.split.train_rows(data.histories).tolist())
    validation, test = set(data.split.validation.rows.tolist()), set(data.split.test.rows.tolist())
    assert not training & validation
    assert not training & test
    assert not validation & test
    for cases in (data.split.validation, data.split.test):
        starts, stops = data.histories.offsets[cases.users], data.histories.offsets[cases.users + 1]
        assert ((starts <= cases.rows) & (cases.rows < stops)).all()
    if split is not SplitKind.LEAVE_ONE_OUT:
        assert (data.split.test.rows > data.histories.offsets[data.split.test.users]).all()
    assert dataclasses.asdict(config) == dataclasses.asdict(data.config)


def test_at_most_takes_evenly_spaced_cases() -> None:
    cases = Cases(np.arange(9), np.arange(9) * 10)
    assert cases.at_most(9) is cases
    few = cases.at_most(3)
    assert few.users.tolist() == [0, 4, 8]
    assert few.rows.tolist() == [0, 40, 80]
