"""Features of items: what a table of them becomes, by hand, and which tables are refused."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from jaxrec.config import FilterOn, PrepareConfig
from jaxrec.data import content as content_module
from jaxrec.data.append import append
from jaxrec.data.content import item_content, model_feature_names
from jaxrec.data.encoding import ColumnEncoding, Kind, bin_starts, fit_column
from jaxrec.data.prepare import prepare
from jaxrec.data.prepared import PreparedData
from jaxrec.data.schema import GENRES, ITEM, MISSING, TIME, TITLE, USER
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
        *("minutes up to 99", "minutes 100 and above"),
    )
    assert content.matrix.astype(int).tolist() == [
        [0, 0, 0, 0, 0, 0],  # padding
        [1, 0, 1, 1, 1, 0],
        [0, 1, 0, 1, 0, 1],
        [1, 0, 0, 0, 0, 0],  # nothing known but the studio
        [0, 1, 1, 1, 1, 0],
        [0, 0, 1, 0, 1, 0],  # a studio and a tag that no item with training events has, and 95 minutes
        [0, 0, 0, 0, 0, 0],  # 60 is not in the table
        [1, 0, 0, 0, 1, 0],  # 70 is not in the log
    ]
    assert content.model_features == 6
    assert model_feature_names(data) == list(content.names)
    category = "count as missing: a category needs 2 items with training events, and 500 are kept"
    assert data.input["notes"][-3:] == [
        "features: note: not used, no 2 items with training events share a value",
        f"features: studio: 1 of its values, such as 'C', {category}",
        f"features: tags: 1 of its values, such as 'z', {category}",
    ]


def test_items_of_the_table_alone_are_new_items_or_are_counted(tmp_path: Path) -> None:
    assert prepared(tmp_path).catalog.ids.raw_ids.tolist() == [10, 20, 30, 40, 50, 60, 70]
    few = PrepareConfig(min_user_ratings=1, min_movie_ratings=1)
    movies = pd.DataFrame({ITEM: [10, 70], TITLE: ["A", "G"], GENRES: ["", ""]})
    for given in (None, movies):  # a movie without events is not in this catalogue, either
        data = prepare(LOG, given, few, features=tmp_path / "features.csv")
        assert data.catalog.ids.raw_ids.tolist() == [10, 20, 30, 40, 50, 60]
        assert (
            "features: 1 of 6 items, such as 70, are not in the catalogue; prepare with --min-movie-ratings 0 to keep "
            "items with few events or none"
        ) in data.input["notes"]


@pytest.mark.parametrize("word", MISSING)
def test_words_for_nothing_are_missing_values(word: str, tmp_path: Path) -> None:
    table = (
        f"item_id,studio,tags,minutes\n10,{word.upper()},x|{word},90\n20, {word} ,x,{word}\n30,A,{word},91\n40,A,,92\n"
    )
    content = item_content(prepared(tmp_path, table))
    assert content.names == ("studio=A", "tags=x", "minutes up to 90", "minutes 91", "minutes 92 and above")
    assert content.matrix[1:5].astype(int).tolist() == [
        [0, 1, 1, 0, 0],
        [0, 1, 0, 0, 0],
        [1, 0, 0, 1, 0],
        [1, 0, 0, 0, 1],
    ]


def test_a_frame_may_hold_numbers_of_any_type_and_pandas_words_for_nothing() -> None:
    frame = pd.DataFrame(
        {
            ITEM: [10, 20, 30],
            "size": [1.5, float("nan"), 2.5],
            "count": pd.array([3, None, 4], "Int64"),
            "day": [pd.NaT, "x", "x"],
        }
    )
    content = item_content(prepare(LOG, config=ALL, features=frame))
    sizes, counts = ("size below 2.5", "size 2.5 and above"), ("count up to 3", "count 4 and above")
    assert content.names == (*sizes, *counts, "day=x")
    assert content.matrix[1:4].tolist() == [[1, 0, 1, 0, 0], [0, 0, 0, 0, 1], [0, 1, 0, 1, 1]]


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
    assert content.names == ("Drama", "War", "studio=A", "title year up to 1998", "title year 1999 and above")
    assert content.model_features == 3
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
    values = ["1", "2", "0", "9", "large", "1.9"]
    size = fit_column("size", values, np.array([True, True, False, False, False, False]))
    assert size == ColumnEncoding("size", Kind.NUMERIC, starts=(1.0, 2.0), whole=True)
    assert [column.tolist() for column in size.cells(values)] == [[0, 1, 2, 3, 5], [0, 1, 0, 1, 0]]
    assert size.unknown(values) == ["large"]


def test_names_of_bins_are_their_exact_edges() -> None:
    """Edges that agree in the first six digits stay apart."""
    values = [0.1234561, 0.1234562, 0.1234563]
    names = fit_column("size", [repr(value) for value in values], np.ones(3, bool)).features
    assert names == (
        "size below 0.1234562",
        "size 0.1234562 to below 0.1234563",
        "size 0.1234563 and above",
    )
    million = fit_column("votes", [str(10_000_000 + n) for n in range(40)], np.ones(40, bool)).features
    assert million[:2] == ("votes up to 10000003", "votes 10000004 to 10000007")
    assert million[-1] == "votes 10000036 and above"
    assert len(set(million)) == len(million) == 10
    assert fit_column("votes", ["7", "7"], np.ones(2, bool)).features == ("votes: any number",)


def test_what_a_column_is_known_as_stays_when_it_is_fitted_to_more() -> None:
    everyone = np.ones(4, bool)
    number = fit_column("size", ["1", "2", "3", "4"], everyone)
    assert fit_column("size", ["x", "x", "99", "98"], everyone, number) == number
    plain = fit_column("tag", ["a", "a", "b", ""], everyone)
    assert plain.categories == ("a",)
    more = fit_column("tag", ["1", "1", "b|c", "b|c"], everyone, plain)
    assert (more.kind, more.categories) == (Kind.CATEGORICAL, ("1", "a", "b|c"))  # still one value, not a list
    assert fit_column("tag", ["", "", "x", "x"], np.array([True, True, False, False])) is None


def test_no_more_categories_than_the_limit_and_the_known_ones_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaxrec.data.encoding.MOST_CATEGORIES", 2)
    everyone = np.ones(7, bool)
    first = fit_column("tag", ["a", "a", "b", "b", "b", "c", "c"], everyone)
    assert first.categories == ("a", "b")  # b is the most frequent, and a is before c
    assert fit_column("tag", ["c"] * 7, everyone, first).categories == ("a", "b")


def test_prepared_data_keeps_the_features_and_append_adds_to_them(tmp_path: Path) -> None:
    (tmp_path / "features.csv").write_text(TABLE)
    written = prepare(LOG, config=ALL, features=tmp_path / "features.csv", out=tmp_path / "data")
    np.testing.assert_array_equal(item_content(written).matrix, item_content(prepared(tmp_path)).matrix)
    written_names = item_content(written).names
    later = pd.DataFrame({USER: [1, 2, 3], ITEM: [80, 80, 80], TIME: [100, 101, 102]})
    more = pd.DataFrame({ITEM: [80, 10], "studio": ["B", "B"], "minutes": ["99.5", None], "colour": ["red", None]})
    append(tmp_path / "data", later, features=more, out=tmp_path / "data")
    content = item_content(read_prepared(tmp_path / "data"))
    # 50 has training events now; like 10 it has the note "one". Of studio C and 95 minutes it is still the only one.
    assert content.names == (*written_names, "note=one")
    rows = [content.matrix[item].astype(int).tolist() for item in (1, 8)]
    assert rows == [
        [0, 1, 1, 1, 1, 0, 1],
        [0, 1, 0, 0, 1, 0, 0],
    ]  # 10 has another studio now, the rest stays; 80 is new
    assert append(tmp_path / "data", later.assign(timestamp=[200, 201, 202])).features is not None


def test_append_keeps_bins_extends_categories_and_says_what_it_does_not_use(tmp_path: Path) -> None:
    (tmp_path / "features.csv").write_text(TABLE)
    prepare(LOG, config=ALL, features=tmp_path / "features.csv", out=tmp_path / "data")
    stored = json.loads((tmp_path / "data/prepared.json").read_text())["columns"]
    assert [(column["name"], column["kind"]) for column in stored] == [
        ("studio", "categorical"),
        ("tags", "multi-valued"),
        ("minutes", "numeric"),
        ("note", "categorical"),
    ]
    assert stored[2]["starts"] == [90.0, 100.0]
    # Each user goes on with 70, 80, 81 and 82: the last two are held out, and 50, 60, 70 and 80 have training events.
    later = pd.DataFrame({USER: np.repeat([1, 2, 3], 4), ITEM: [70, 80, 81, 82] * 3, TIME: range(100, 112)})
    more = pd.DataFrame(
        {
            ITEM: [70, 80, 90, 50],
            "studio": ["C", "", "Z", None],
            "tags": ["z", "z", "x|w", ""],
            "minutes": ["200", "95", "long", "none"],
            "Studio": ["a", "a", "", ""],
        }
    )
    data = append(tmp_path / "data", later, features=more, out=tmp_path / "data")
    content = item_content(data)
    assert content.names == (
        *("studio=A", "studio=B", "studio=C"),  # 50 and 70 are of C, and have training events now
        *("tags=x", "tags=y", "tags=z"),
        *("minutes up to 99", "minutes 100 and above"),
        "note=one",  # 10 and 50
        "Studio=a",
    )
    assert data.catalog.ids.raw_ids.tolist() == [10, 20, 30, 40, 50, 60, 70, 80, 81, 82, 90]
    assert [content.matrix[item].astype(int).tolist() for item in (5, 7, 8, 11)] == [
        [0, 0, 1, 1, 0, 1, 1, 0, 1, 0],  # what was known of 50
        [0, 0, 1, 0, 0, 1, 0, 1, 0, 1],
        [0, 0, 0, 0, 0, 1, 1, 0, 0, 1],  # 95 is in the bin that it was in, although it would begin one now
        [0, 0, 0, 1, 0, 0, 0, 0, 0, 0],  # 90 has no event
    ]
    category = "count as missing: a category needs 2 items with training events, and 500 are kept"
    assert data.input["notes"][-5:] == [
        "features: Studio: new, the data has studio, tags, minutes, note",
        f"features: studio: 1 of its values, such as 'Z', {category}",
        f"features: tags: 1 of its values, such as 'w', {category}",
        "features: minutes: 1 of its values, such as 'long', count as missing: they are not numbers, as the others are",
        f"features: note: 4 of its values, such as 'two', {category}",
    ]
    assert item_content(read_prepared(tmp_path / "data")).names == content.names


def test_features_of_new_items_alone_can_be_appended_where_the_catalogue_keeps_such(tmp_path: Path) -> None:
    (tmp_path / "features.csv").write_text(TABLE)
    later = pd.DataFrame({USER: [1], ITEM: [10], TIME: [100]})
    new = pd.DataFrame({ITEM: [91], "studio": ["A"]})
    data = append(prepared(tmp_path), later, features=new)
    assert item_content(data).matrix[8].astype(int).tolist() == [1, 0, 0, 0, 0, 0, 0]
    few = prepare(LOG, config=PrepareConfig(1, 1), features=tmp_path / "features.csv")
    with pytest.raises(DataError, match="none of its 1 ids, such as 91, is one of the log's 6 items"):
        append(few, later, features=new)


def test_damaged_encodings_are_refused(tmp_path: Path) -> None:
    (tmp_path / "features.csv").write_text(TABLE)
    prepare(LOG, config=ALL, features=tmp_path / "features.csv", out=tmp_path / "data")
    summary = tmp_path / "data/prepared.json"
    summary.write_text(summary.read_text().replace('"kind": "numeric"', '"kind": "number"'))
    with pytest.raises(DataError, match=r"prepared\.json: columns: not the encodings of features: 'number' is not a"):
        read_prepared(tmp_path / "data")


def test_lists_and_json_lines_are_read_too(tmp_path: Path) -> None:
    path = tmp_path / "features.json"
    path.write_text('{"item_id": 10, "tags": ["x", "y"]}\n{"item_id": 20, "tags": ["y", "x"]}\n')
    content = item_content(prepare(LOG, config=ALL, features=path))
    assert content.names == ("tags=x", "tags=y")
    assert content.matrix[1:3].tolist() == [[1, 1], [1, 1]]


@pytest.mark.parametrize("form", ["json", "csv", "frame"])
def test_a_column_with_a_list_is_multi_valued_however_few_values_it_has(form: str, tmp_path: Path) -> None:
    path = tmp_path / f"features.{form}"
    values = [["x"], ["y"], ["x"], ["y"]]
    frame = pd.DataFrame({ITEM: [10, 20, 30, 40], "tags": values, "codes": [[1], [2], [1], [2]]})
    if form == "json":
        frame.to_json(path, orient="records", lines=True)
    else:
        frame.to_csv(path, index=False)  # as Python writes lists
    data = prepare(LOG, config=ALL, features=frame if form == "frame" else path, out=tmp_path / "data")
    assert item_content(data).names == ("tags=x", "tags=y", "codes=1", "codes=2")
    assert item_content(data).matrix[1:3].tolist() == [[1, 0, 1, 0], [0, 1, 0, 1]]
    assert data.columns is not None
    assert {column.kind for column in data.columns} == {Kind.MULTI_VALUED}
    # Items 60 and 50 are held out no more, and have both tags.
    later = pd.DataFrame({USER: np.repeat([1, 2, 3], 2), ITEM: [70, 80] * 3, TIME: range(100, 106)})
    more = append(data, later, features=pd.DataFrame({ITEM: [50, 60], "tags": [["x", "y"], "y|x"]}))
    assert item_content(more).matrix[5:7].tolist() == [[1, 1, 0, 0], [1, 1, 0, 0]]


def test_a_list_of_one_value_in_a_column_of_another_kind_is_its_value() -> None:
    values = ["1|", "9|", "1"]
    number = ColumnEncoding("size", Kind.NUMERIC, starts=(1.0, 5.0), whole=True)
    assert [column.tolist() for column in number.cells(values)] == [[0, 1, 2], [0, 1, 0]]
    assert number.unknown([*values, "1|2"]) == ["1|2"]
    plain = ColumnEncoding("size", Kind.CATEGORICAL, ("1", "9"))
    assert [column.tolist() for column in plain.cells(values)] == [[0, 1, 2], [0, 1, 0]]


def test_a_note_names_a_column_that_a_few_values_keep_from_being_numeric(tmp_path: Path) -> None:
    items = range(100, 122)  # with validation and test 20 have training events
    log = pd.DataFrame({USER: np.repeat([1, 2, 3], 22), ITEM: [*items] * 3, TIME: range(66)})
    few = ["1", "2"] * 9 + ["about 90", "1_2"] + ["x", "y"]  # 2 of 20 are no numbers
    many = ["1", "2"] * 9 + ["", "about 90"] + ["x", "y"]  # 1 of 19
    text = ["1", "2"] * 8 + ["x"] * 6  # 4 of 20
    table = pd.DataFrame({ITEM: items, "few": few, "many": many, "text": text, "number": ["1", "2"] * 11})
    data = prepare(log, config=ALL, features=table)
    assert [note for note in data.input["notes"] if "no numbers" in note] == [
        "features: few: categorical, since 2 of 20 values are no numbers, such as 'about 90'",
        "features: many: categorical, since 1 of 19 values are no numbers, such as 'about 90'",
    ]
    later = pd.DataFrame({USER: [1], ITEM: [100], TIME: [100]})
    assert not [note for note in append(data, later, features=table).input["notes"] if "no numbers" in note]


def test_digits_with_underscores_are_no_number() -> None:
    size = fit_column("size", ["1_2", "3", "1_2", "3"], np.ones(4, bool))
    assert size is not None
    assert size.features == ("size=1_2", "size=3")


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
    with pytest.raises(DataError, match="features: row 1: item_id is '10'; expected a whole number"):
        prepare(LOG, config=ALL, features=pd.DataFrame({ITEM: ["10"], "a": ["x"]}))
    with pytest.raises(DataError, match="features: row 2: item_id 10 occurs twice"):
        prepare(LOG, config=ALL, features=pd.DataFrame({ITEM: [10, 10], "a": ["x", "y"]}))


def test_a_matrix_that_is_too_large_is_refused_with_its_largest_columns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(content_module, "MOST_CELLS", 8 * 6)  # with the padding 8 rows, and 6 features
    assert item_content(prepared(tmp_path)).matrix.size == 48
    monkeypatch.setattr(content_module, "MOST_CELLS", 47)
    with pytest.raises(
        DataError, match=r"features: 7 items with 6 features .* such as studio \(2\), tags \(2\), minutes"
    ):
        prepared(tmp_path)


def test_features_change_nothing_else(tmp_path: Path) -> None:
    with_features, without = prepared(tmp_path, TABLE.replace("70,A,z,10,seven\n", "")), prepare(LOG, config=ALL)
    np.testing.assert_array_equal(with_features.histories.items, without.histories.items)
    assert with_features.catalog.titles == without.catalog.titles
    assert with_features.config.filter_on is FilterOn.LOG
