"""Ids, catalogue, histories, filters and splits; and that prepared data survives the disk."""

import dataclasses
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrec.config import FilterOn, PrepareConfig, RatingScale, Repeats, SplitKind, Ties
from jaxrec.data.catalog import split_genres
from jaxrec.data.ids import IdMap
from jaxrec.data.prepare import prepare
from jaxrec.data.prepared import PreparedData
from jaxrec.data.reading.bad_rows import OnBadRows
from jaxrec.data.store import all_movies, check_prepared, read_prepared, unchanged_folder, write_prepared
from jaxrec.errors import DataError
from tests.logs import by_user
from tests.synthetic import random_log

SCALE = RatingScale(1.0, 5.0)
EVERYTHING = PrepareConfig(min_user_ratings=1, min_movie_ratings=1, rating_scale=SCALE)


def log(rows: list[tuple[int, int, float, int]]) -> pd.DataFrame:
    frame = pd.DataFrame(rows, columns=["user_id", "item_id", "rating", "timestamp"])
    return frame.astype({"rating": np.float32, "timestamp": np.int64})


def movies(rows: list[tuple[int, str, str]]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["item_id", "title", "genres"])


SMALL = log([(5, 30, 4, 300), (5, 10, 3, 100), (9, 10, 5, 50), (5, 20, 2, 200), (9, 20, 1, 60), (9, 40, 1, 70)])


def histories_of(data: PreparedData) -> dict[int, list[int]]:
    """Raw item ids by raw user id, in order."""
    offsets = data.histories.offsets
    return {
        user: data.catalog.ids.decode(data.histories.items[offsets[u] : offsets[u + 1]]).tolist()
        for u, user in enumerate(data.users.raw_ids.tolist())
    }


def test_histories_are_in_time_order_per_user() -> None:
    data = prepare(SMALL, None, EVERYTHING)
    assert histories_of(data) == {5: [10, 20, 30], 9: [10, 20, 40]}
    assert data.histories.times.tolist() == [100, 200, 300, 50, 60, 70]
    assert data.histories.gaps().tolist() == [-1, 100, 100, -1, 10, 10]
    assert data.unit_ratings().tolist() == [0.5, 0.25, 0.75, 1.0, 0.0, 0.0]


def test_the_input_frame_is_not_changed() -> None:
    before = SMALL.copy(deep=True)
    prepare(SMALL, None, EVERYTHING)
    pd.testing.assert_frame_equal(SMALL, before)


def test_leave_one_out_by_hand() -> None:
    data = prepare(SMALL, None, EVERYTHING)
    assert data.split.train_counts.tolist() == [1, 1]
    assert data.split.validation.rows.tolist() == [1, 4]
    assert data.split.test.rows.tolist() == [2, 5]
    assert data.train_popularity().tolist() == [
        0,
        2,
        0,
        0,
        0,
    ]  # only movie 10 of each user is left for training


def test_users_with_two_events_only_train() -> None:
    data = prepare(log([(1, 10, 3, 1), (1, 11, 3, 2), (2, 10, 3, 1), (2, 11, 3, 2), (2, 12, 3, 3)]), None, EVERYTHING)
    assert data.split.train_counts.tolist() == [2, 1]
    assert data.split.test.users.tolist() == [1]


def test_temporal_split_by_hand() -> None:
    # The 90 % quantile of the times 0..19 is 18 ("higher"): the events at 18 and 19 are after the cut.
    rows = [(1, time % 9, 3.0, time) for time in range(18)] + [(1, 0, 3.0, 18), (1, 777, 3.0, 19)]
    data = prepare(log(rows), None, dataclasses.replace(EVERYTHING, split=SplitKind.TEMPORAL))
    assert data.split.train_counts.tolist() == [17]  # the last event before the cut is for validation
    assert data.split.validation.rows.tolist() == [17]
    assert data.split.test.rows.tolist() == [18]  # movie 777 is not known from before the cut
    assert 777 not in data.catalog.ids.raw_ids


def test_temporal_filter_is_fitted_before_the_cut_and_keeps_new_users() -> None:
    old = [(user, (item + user) % 10, 3.0, 100 * user + item) for user in range(1, 10) for item in range(10)]
    new = [(99, item, 3.0, 10_000 + item) for item in range(10)]
    config = dataclasses.replace(EVERYTHING, split=SplitKind.TEMPORAL, min_user_ratings=10, min_movie_ratings=5)
    data = prepare(log(old + new), None, config)
    assert 99 in data.users.raw_ids
    assert data.split.train_counts[data.users.encode([99])[0] - 1] == 0
    assert len(data.split.test) == 5  # the first five events of user 99 are too short a history


def test_temporal_history_of_a_user_too_rare_to_train_is_whole() -> None:
    old = [(user, (item + user) % 10, 3.0, 100 * user + item) for user in range(1, 10) for item in range(10)]
    back = [(99, item, 3.0, 950 + item) for item in range(6)] + [(99, 7, 3.0, 9_000), (99, 8, 3.0, 9_001)]
    late = [(98, item, 3.0, 10_000 + item) for item in range(9)]
    config = dataclasses.replace(EVERYTHING, split=SplitKind.TEMPORAL, min_user_ratings=10, min_movie_ratings=5)
    data = prepare(log(old + back + late), None, config)
    user = data.users.encode([99])[0] - 1
    assert histories_of(data)[99] == [0, 1, 2, 3, 4, 5, 7, 8]
    assert data.split.train_counts[user] == 0
    assert (data.split.test.users == user).sum() == 2


def test_rare_users_and_movies_go_until_none_is_left() -> None:
    rows = [(1, 1, 3.0, 1), (1, 2, 3.0, 2), (2, 1, 3.0, 1), (2, 2, 3.0, 2), (3, 2, 3.0, 1), (3, 3, 3.0, 2)]
    kept = prepare(log(rows), None, dataclasses.replace(EVERYTHING, min_user_ratings=2, min_movie_ratings=2))
    assert kept.users.raw_ids.tolist() == [1, 2]  # movie 3 goes first, which leaves user 3 with one rating
    with pytest.raises(DataError, match="no event is left of 6"):
        prepare(log(rows), None, PrepareConfig())


def test_titles_genres_and_matrix() -> None:
    titles = movies(
        [
            (10, "Toy Story (1995)", "Adventure|Animation|Children|Comedy|Fantasy"),
            (20, "B", "Comedy"),
            (30, "C", "(no genres listed)"),
            (99, "unrated", "War"),
        ]
    )
    data = prepare(SMALL, titles, EVERYTHING)
    assert data.catalog.genres == ("Adventure", "Animation", "Children", "Comedy", "Fantasy")
    assert data.catalog.genre_matrix().tolist() == [[0] * 5, [1] * 5, [0, 0, 0, 1, 0], [0] * 5, [0] * 5]
    assert data.catalog.titles == ("Toy Story (1995)", "B", "C", "40")  # movie 40 is not in movies.csv
    assert split_genres("Comedy|Action| |Comedy") == ("Action", "Comedy")


def test_movies_without_ratings_stay_at_threshold_0() -> None:
    data = prepare(SMALL, movies([(99, "unrated", "War")]), dataclasses.replace(EVERYTHING, min_movie_ratings=0))
    assert data.catalog.ids.raw_ids.tolist() == [10, 20, 30, 40, 99]
    assert data.catalog.genre_matrix()[5].tolist() == [1.0]


def test_ids_cross_one_boundary() -> None:
    ids = IdMap.fit(np.array([40, 10, 40, 30]))
    assert ids.encode([10, 40, 5]).tolist() == [1, 3, 0]
    assert ids.decode(np.array([3, 1])).tolist() == [40, 10]
    with pytest.raises(IndexError, match=r"1\.\.3"):
        ids.decode(np.array([0]))


TIED = log([(1, item, 3.0, 7) for item in (50, 20, 40, 10, 30, 60, 80, 70)])


def test_equal_times_keep_the_file_order_or_a_seeded_random_one() -> None:
    assert histories_of(prepare(TIED, None, EVERYTHING))[1] == [50, 20, 40, 10, 30, 60, 80, 70]
    at_random = dataclasses.replace(EVERYTHING, ties=Ties.RANDOM)
    first, again = prepare(TIED, None, at_random), prepare(TIED, None, at_random)
    assert histories_of(first) == histories_of(again)
    assert histories_of(first)[1] != [50, 20, 40, 10, 30, 60, 80, 70]


@pytest.mark.parametrize("split", list(SplitKind))
def test_prepared_data_survives_the_disk(tmp_path: Path, split: SplitKind) -> None:
    frame = log([(user, 3 * item + 1, 3.5, 1000 * item + user) for user in range(8) for item in range(9)])
    data = prepare(frame, movies([(1, 'A "quoted", title', "Drama")]), dataclasses.replace(EVERYTHING, split=split))
    write_prepared(data, tmp_path / "data")
    again = read_prepared(tmp_path / "data")
    assert again.config == data.config
    assert again.summary() == data.summary()
    assert again.catalog.titles == data.catalog.titles
    assert again.catalog.item_genres == data.catalog.item_genres
    for field in dataclasses.fields(data.histories):
        np.testing.assert_array_equal(getattr(again.histories, field.name), getattr(data.histories, field.name))
    np.testing.assert_array_equal(again.split.test.rows, data.split.test.rows)


def test_text_ids_survive_the_disk(tmp_path: Path) -> None:
    frame = log([(user, item, 3.0, item) for user in range(3) for item in range(4)])
    frame["user_id"] = "u" + frame["user_id"].astype(str)
    frame["item_id"] = "00" + frame["item_id"].astype(str)
    write_prepared(prepare(frame, None, EVERYTHING), tmp_path / "data")
    again = read_prepared(tmp_path / "data")
    assert again.catalog.ids.raw_ids.tolist() == ["000", "001", "002", "003"]
    assert again.users.encode(["u2", "x"]).tolist() == [3, 0]


def test_damaged_cut_and_foreign_folders_are_refused(tmp_path: Path) -> None:
    write_prepared(prepare(SMALL, None, EVERYTHING), tmp_path / "data")
    assert check_prepared(tmp_path / "data") > 0
    items = tmp_path / "data/items.npy"
    damaged = bytearray(items.read_bytes())
    damaged[-1] ^= 1
    items.write_bytes(damaged)
    with pytest.raises(DataError, match=r"items\.npy: missing or damaged"):
        check_prepared(tmp_path / "data")
    items.write_bytes(damaged[:-1])
    with pytest.raises(DataError, match=r"items\.npy: 151 bytes, expected 152"):
        read_prepared(tmp_path / "data")
    items.unlink()
    with pytest.raises(DataError, match=r"items\.npy: missing"):
        read_prepared(tmp_path / "data")
    with pytest.raises(DataError, match="expected a folder written by `jaxrec prepare`"):
        read_prepared(tmp_path)


def test_prepared_data_opens_as_memory_maps_without_a_copy(tmp_path: Path) -> None:
    write_prepared(prepare(SMALL, None, EVERYTHING), tmp_path / "data")
    data = read_prepared(tmp_path / "data")
    assert data.log is not None
    for column in (data.histories.items, data.histories.times, data.split.test.rows, data.log.events.ratings):
        assert isinstance(column.base, np.memmap)
        assert not column.flags.writeable


def test_another_schema_version_is_refused(tmp_path: Path) -> None:
    write_prepared(prepare(SMALL, None, EVERYTHING), tmp_path / "data")
    summary = tmp_path / "data/prepared.json"
    summary.write_text(summary.read_text().replace('"schema_version": 4', '"schema_version": 1'))
    with pytest.raises(DataError, match="schema version 1, expected 4; prepare again"):
        read_prepared(tmp_path / "data")


def test_a_failed_write_leaves_the_old_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = prepare(SMALL, None, EVERYTHING)
    write_prepared(data, tmp_path / "data")

    def disk_full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", disk_full)
    with pytest.raises(DataError, match="cannot be written: No space left on device"):
        write_prepared(data, tmp_path / "data")
    assert read_prepared(tmp_path / "data").summary() == data.summary()
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_one_movie_only_is_one_clear_error() -> None:
    with pytest.raises(DataError, match=r"only one item is left \(7\); a recommender needs at least two"):
        prepare(log([(1, 7, 3, 1), (2, 7, 3, 1)]), None, EVERYTHING)


def test_users_with_one_event_only_train() -> None:
    data = prepare(log([(1, 7, 3, 1), (2, 8, 3, 1)]), None, EVERYTHING)
    assert data.split.train_counts.tolist() == [1, 1]
    assert len(data.split.test) == 0


def test_bad_rows_of_a_frame_are_named() -> None:
    with pytest.raises(DataError, match=r"interactions:2: rating 7.0 is outside 1..5"):
        prepare(log([(1, 7, 3, 1), (2, 8, 7, 1), (2, 7, 3, 1)]), None, EVERYTHING)
    config = dataclasses.replace(EVERYTHING, repeats=Repeats.FAIL)
    with pytest.raises(DataError, match=r"interactions:3: repeats line 1"):
        prepare(log([(1, 7, 3, 1), (2, 8, 3, 1), (1, 7, 4, 1)]), None, config)


events = st.tuples(st.integers(1, 4), st.integers(1, 6), st.sampled_from([1.0, 3.0, 4.5]), st.integers(0, 12))
logs = st.lists(events, min_size=1, max_size=40, unique_by=lambda event: (event[0], event[1], event[3]))


@settings(max_examples=40, deadline=None)
@given(logs, st.randoms(), st.sampled_from(list(SplitKind)), st.sampled_from(list(FilterOn)), st.integers(1, 2))
def test_row_order_changes_nothing_but_the_order_among_ties(
    rows: list[tuple[int, int, float, int]], random: object, split: SplitKind, filter_on: FilterOn, minimum: int
) -> None:
    shuffled = rows.copy()
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    scale = RatingScale(0.5, 5.0)
    at_random = PrepareConfig(minimum, minimum, split, Ties.RANDOM, scale, filter_on=filter_on)
    one, other = (outcome(log(chosen), at_random) for chosen in (rows, shuffled))
    assert one == other  # random ties follow from the ids, so that nothing at all may change
    in_file_order = PrepareConfig(1, 1, split, Ties.FILE, scale)
    first, second = (outcome(log(chosen), in_file_order) for chosen in (rows, shuffled))
    assert (first is None) == (second is None)
    if first is not None and second is not None and split is SplitKind.LEAVE_ONE_OUT:
        assert first.keys() == second.keys()
        for user, history in first.items():
            assert sorted(history[0]) == sorted(second[user][0])
            assert [time for time, *_ in history[0]] == [time for time, *_ in second[user][0]]


def outcome(frame: pd.DataFrame, config: PrepareConfig) -> dict | None:
    """By user: its events as (time, item, rating), and its share of the split; None where nothing is left."""
    try:
        return by_user(prepare(frame, None, config))
    except DataError:
        return None


def test_a_frame_and_a_file_give_the_same(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [(user, int(item), 3.5, int(time)) for user in range(1, 30) for item, time in rng.integers(1, 99, (15, 2))]
    frame = log(rows).drop_duplicates(["user_id", "item_id", "timestamp"], ignore_index=True)
    frame.columns = ["userId", "movieId", "rating", "timestamp"]
    frame.to_csv(tmp_path / "ratings.csv", index=False)
    frame.to_parquet(tmp_path / "ratings.parquet")
    frame.columns = ["user_id", "item_id", "rating", "timestamp"]
    config = PrepareConfig(min_user_ratings=2, min_movie_ratings=3)
    expected = prepare(frame, None, config)
    for name in ("ratings.csv", "ratings.parquet"):
        in_memory = prepare(tmp_path / name, None, config)
        on_disk = prepare(tmp_path / name, None, config, out=tmp_path / "data")
        for data in (in_memory, on_disk):
            assert by_user(data) == by_user(expected)
            assert data.config == expected.config
            assert data.summary() == expected.summary()


def test_a_frame_is_written_out_of_core_too(tmp_path: Path) -> None:
    titles = movies([(10, "Ten", "Drama"), (99, "unrated", "War")])
    data = prepare(SMALL, titles, EVERYTHING, out=str(tmp_path / "data"))
    assert data.folder == tmp_path / "data"
    assert by_user(data) == by_user(prepare(SMALL, titles, EVERYTHING))
    assert data.catalog.titles[0] == "Ten"
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_the_scale_of_the_configuration_decides() -> None:
    ten = log([(1, 7, 10, 1), (1, 8, 1, 2)])
    data = prepare(ten, None, PrepareConfig(1, 1, rating_scale=RatingScale(1, 10)))
    assert data.unit_ratings().tolist() == [1.0, 0.0]


def test_files_without_a_folder_for_them_are_refused() -> None:
    with pytest.raises(ValueError, match="expected a folder for them"):
        prepare(SMALL, None, EVERYTHING, on_bad_rows=OnBadRows.QUARANTINE)
    with pytest.raises(ValueError, match="expected a folder for them"):
        prepare(SMALL, None, EVERYTHING, add_files=lambda data, folder: None)


def test_opened_data_is_written_again_with_all_its_movies(tmp_path: Path) -> None:
    titles = movies([(10, "Ten", "Drama|War"), (99, "unrated", "War")])
    prepare(SMALL, titles, EVERYTHING, out=tmp_path / "data")
    write_prepared(read_prepared(tmp_path / "data"), tmp_path / "again")
    movies_csv = Path("log/movies.csv")
    assert (tmp_path / "again" / movies_csv).read_bytes() == (tmp_path / "data" / movies_csv).read_bytes()
    pd.testing.assert_frame_equal(all_movies(read_prepared(tmp_path / "again")), titles, check_dtype=False)


def test_movies_of_another_type_of_ids_or_with_repeats_are_refused() -> None:
    titles = movies([(10, "Ten", "Drama"), (20, "Twenty", "War")])
    as_text = titles.astype({"item_id": str})
    for minimum in (0, 1):
        config = dataclasses.replace(EVERYTHING, min_movie_ratings=minimum)
        with pytest.raises(DataError, match=r"movies: row 1: item_id is '10'; expected a whole number"):
            prepare(SMALL, as_text, config)
        with pytest.raises(DataError, match=r"movies: row 1: item_id is 10; expected text that is not empty"):
            prepare(SMALL.astype({"item_id": str}), titles, config)
    assert prepare(SMALL.astype({"item_id": str}), as_text, EVERYTHING).catalog.titles[:2] == ("Ten", "Twenty")
    with pytest.raises(DataError, match="movies: row 3: item_id 10 occurs twice"):
        prepare(SMALL, pd.concat([titles, titles[:1]]), EVERYTHING)
    with pytest.raises(DataError, match="movies: column title or genres is missing"):
        prepare(SMALL, titles.drop(columns=["title", "genres"]), EVERYTHING)


def test_the_ids_of_a_frame_are_of_its_type() -> None:
    as_text, as_objects = SMALL.astype({"user_id": str}), SMALL.astype({"user_id": object})
    assert prepare(as_text, None, EVERYTHING).users.raw_ids.tolist() == ["5", "9"]
    assert prepare(as_objects, None, EVERYTHING).users.raw_ids.tolist() == [5, 9]


def test_data_whose_folder_was_written_anew_is_refused(tmp_path: Path) -> None:
    log = random_log(users=20, items=10, max_events=12, seed=0)
    first = prepare(log, None, PrepareConfig(1, 1), out=tmp_path / "data")
    assert unchanged_folder(first) == tmp_path / "data"
    assert unchanged_folder(prepare(log, None, PrepareConfig(1, 1))) is None
    prepare(log.iloc[:-1], None, PrepareConfig(1, 1), out=tmp_path / "data")
    with pytest.raises(DataError, match="was written anew since it was read"):
        unchanged_folder(first)
