"""Features of items: what a table of them becomes, by hand, and which tables are refused."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from jaxrec.config import FilterOn, PrepareConfig
from jaxrec.data.append import append
from jaxrec.data.content import bin_starts, encode_column, item_content
from jaxrec.data.prepare import prepare
from jaxrec.data.prepared import PreparedData
from jaxrec.data.schema import GENRES, ITEM, TIME, TITLE, USER
from jaxrec.data.store import read_prepared
from jaxrec.errors import DataError

ALL = PrepareConfig(min_user_ratings=1, min_movie_ratings=0)
LOG = pd.DataFrame({USER: np.repeat([1, 2, 3], 6), ITEM: [10, 20, 30, 40, 50, 60] * 3, TIME: range(18)})
"""Items 50 and 60 are each user's validation and test: of the six, 10 to 40 have training events."""
TABLE = (
    "item_id,studio,tags,minutes,note\n"
    "10,A,x|y,90,one\n"
    "20,B,y,100,two\n"
    "30,A,,,three\n"
    '40,"B","y | x",90,four\n'
    "50,C,z|x,95,one\n"
    "70,A,z,10,seven\n"
)


def prepared(folder: Path, table: str = TABLE, **options: object) -> PreparedData:
    (folder / "features.csv").write_text(table, encoding="utf-8")
    return prepare(LOG, config=ALL, features=folder / "features.csv", **options)  # type: ignore[arg-type]


def test_columns_become_features_that_are_fitted_on_items_with_training_events(tmp_path: Path) -> None:
    data = prepared(tmp_path)
    content = item_content(data)
    assert content.names == (
        *("studio=A", "studio=B"),  # C is that of an item without training events
        *("tags=x", "tags=y"),
        *("minutes from 90", "minutes from 100"),
    )
    assert content.matrix.astype(int).tolist() == [
        [0, 0, 0, 0, 0, 0],  # padding
        [1, 0, 1, 1, 1, 0],
        [0, 1, 0, 1, 0, 1],
        [1, 0, 0, 0, 0, 0],  # nothing known but the studio
        [0, 1, 1, 1, 1, 0],
        [0, 0, 1, 0, 1, 0],  # a studio and a tag that no item with training events has, and 95 minutes
        [0, 0, 0, 0, 0, 0],  # not in the table
    ]
    assert content.model_features == 6
    assert content.left_out == ("note",)
    assert data.input["notes"][-2:] == [
        f"{tmp_path / 'features.csv'}: 1 of its 6 ids, such as 70, are no items of the log",
        "features: note: not used, no 2 items with training events share a value",
    ]


def test_genres_come_first_and_years_are_for_new_items_alone() -> None:
    movies = pd.DataFrame(
        {
            ITEM: [10, 20, 30, 40, 50],
            TITLE: ["A (1995)", "B (1999)", "C", "D (1995) ", "E (1997)"],
            GENRES: ["War", "Drama|War", "", "", ""],
        }
    )
    features = pd.DataFrame({"movieId": [10, 20], "studio": ["A", "A"]})
    content = item_content(prepare(LOG, movies, ALL, features=features))
    assert content.names == ("Drama", "War", "studio=A", "year from 1995", "year from 1999")
    assert content.model_names == ("Drama", "War", "studio=A")
    rows = [[0, 0, 0], [0, 1, 1], [1, 1, 1], [0, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]]
    assert content.model_matrix().tolist() == rows
    assert content.matrix[:, 3:].tolist() == [[0, 0], [1, 0], [0, 1], [0, 0], [1, 0], [1, 0], [0, 0]]


def test_without_features_the_content_model_reads_the_genre_matrix(small_data: PreparedData) -> None:
    content = item_content(small_data)
    np.testing.assert_array_equal(content.model_matrix(), small_data.catalog.genre_matrix())
    assert len(content.names) > content.model_features  # years


def test_items_without_any_content_have_one_zero_column_and_no_name() -> None:
    content = item_content(prepare(LOG, config=ALL))
    assert content.names == ()
    assert content.model_matrix().tolist() == [[0.0]] * 7


@pytest.mark.parametrize(
    ("values", "bins", "starts"),
    [
        ([3, 1, 1, 2], 4, [1, 2, 3]),  # no more values than bins
        ([1, 2, 3, 4, 5, 6, 7, 8], 4, [1, 3, 5, 7]),  # two each
        ([1, 2, 3, 4, 4, 4, 4, 5], 3, [1, 4, 5]),  # 4 fills one by itself; 5 follows it
    ],
)
def test_bins_hold_about_equally_many_and_common_values_are_alone(
    values: list[float], bins: int, starts: list[float]
) -> None:
    assert bin_starts(np.array(values, float), bins).tolist() == starts


def test_a_number_outside_the_known_range_is_in_the_nearest_bin() -> None:
    fitted = np.array([True, True, False, False, False])
    names, matrix = encode_column("size", ["1", "2", "0", "9", "large"], fitted)
    assert names == ["size from 1", "size from 2"]
    assert matrix.tolist() == [[1, 0], [0, 1], [1, 0], [0, 1], [0, 0]]


def test_prepared_data_keeps_the_features_and_append_adds_to_them(tmp_path: Path) -> None:
    (tmp_path / "features.csv").write_text(TABLE)
    written = prepare(LOG, config=ALL, features=tmp_path / "features.csv", out=tmp_path / "data")
    np.testing.assert_array_equal(item_content(written).matrix, item_content(prepared(tmp_path)).matrix)
    later = pd.DataFrame({USER: [1, 2, 3], ITEM: [80, 80, 80], TIME: [100, 101, 102]})
    more = pd.DataFrame({ITEM: [80, 10], "studio": ["B", "B"], "colour": ["red", None]})
    append(tmp_path / "data", later, features=more, out=tmp_path / "data")
    content = item_content(read_prepared(tmp_path / "data"))
    of_b = content.matrix[:, content.names.index("studio=B")]
    assert of_b.tolist() == [0, 1, 1, 0, 1, 0, 0, 1]  # 10 has another studio now, and 80 is new
    assert "studio=A" not in content.names  # that is one item's now
    assert append(tmp_path / "data", later.assign(timestamp=[200, 201, 202])).features is not None


def test_lists_and_json_lines_are_read_too(tmp_path: Path) -> None:
    path = tmp_path / "features.json"
    path.write_text('{"item_id": 10, "tags": ["x", "y"]}\n{"item_id": 20, "tags": ["y", "x"]}\n')
    content = item_content(prepare(LOG, config=ALL, features=path))
    assert content.names == ("tags=x", "tags=y")
    assert content.matrix[1:3].tolist() == [[1, 1], [1, 1]]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("item_id,a\n10,x\n20,y\n10,z\n", r"features.csv:4: the id 10 occurs a second time; the first is in line 2"),
        ("item_id,a\n10,x\n,y\n", r"features.csv:3: the id is empty"),
        ("item_id,a\n10,x\nten,y\n", r"features.csv:3: movieId ten is not a whole number"),
        ("item_id,a\n1,x\n2,y\n", r"none of its 2 ids, such as 1, is one of the log's 6 items, such as 10"),
        ("name,a\nten,x\n", r"column movieId or item_id is missing; the header is 'name,a'"),
        ("item_id,a,a\n10,x,y\n", r"column 'a' occurs twice"),
        ("item_id,a\n", r"no rows after the header"),
        ("item_id\n10\n", r"no column beside item_id"),
        ("item_id,a\n10,x,y\n", r"features.csv:2"),
    ],
)
def test_bad_tables_are_refused(table: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        prepared(tmp_path, table)


def test_ids_of_a_frame_must_be_of_the_logs_type_and_distinct() -> None:
    with pytest.raises(DataError, match="features: item_id is"):
        prepare(LOG, config=ALL, features=pd.DataFrame({ITEM: ["10"], "a": ["x"]}))
    with pytest.raises(DataError, match="features: item_id 10 occurs twice"):
        prepare(LOG, config=ALL, features=pd.DataFrame({ITEM: [10, 10], "a": ["x", "y"]}))


def test_features_change_nothing_else(tmp_path: Path) -> None:
    with_features, without = prepared(tmp_path), prepare(LOG, config=ALL)
    np.testing.assert_array_equal(with_features.histories.items, without.histories.items)
    assert with_features.catalog.titles == without.catalog.titles
    assert with_features.config.filter_on is FilterOn.LOG
