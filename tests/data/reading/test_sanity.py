"""What is odd about a log is said in one line with what to do, or refused; what was recognized is said, too."""

import gzip
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

from jaxrec.cli.main import main
from jaxrec.config import PrepareConfig, RatingScale
from jaxrec.data.append import append
from jaxrec.data.ids import IdMap, open_ids, write_ids
from jaxrec.data.prepare import prepare
from jaxrec.data.reading.bad_rows import OnBadRows
from jaxrec.data.reading.check import ReadOptions
from jaxrec.data.reading.columns import ColumnNames
from jaxrec.data.reading.read import read_ratings
from jaxrec.data.reading.rules import TimeUnit
from jaxrec.data.reading.sources import TextOptions
from jaxrec.errors import DataError

HEADER = "userId,movieId,rating,timestamp\n"
START = 1_500_000_000
EVERYTHING = PrepareConfig(1, 1)


def log(ratings: list[float], start: int = START, path: Path | None = None) -> pd.DataFrame | Path:
    """One event for each rating: a frame, or a CSV in `path`."""
    rows = [(1 + at // 3, 1 + at % 7, rating, start + at) for at, rating in enumerate(ratings)]
    frame = pd.DataFrame(rows, columns=HEADER.strip().split(","))
    if path is None:
        return frame
    frame.to_csv(path, index=False)
    return path


def notes(source: pd.DataFrame | Path, movies: pd.DataFrame | None = None, **options: object) -> list[str]:
    return list(prepare(source, movies, EVERYTHING, options=ReadOptions(**options)).input["notes"])  # type: ignore[arg-type]


def test_an_ordinary_log_has_no_notes() -> None:
    assert notes(log([4, 3.5, 1, 5] * 5)) == []


def test_a_log_before_1990_is_said_with_its_days() -> None:
    (said,) = notes(log([4, 3.5, 1, 5] * 5, start=86_400))
    assert said.startswith("all times are before 1990, from 1970-01-02 to 1970-01-02, as they were read: seconds;")
    assert "--time-unit" in said


def test_one_constant_rating_is_said() -> None:
    (said,) = notes(log([1.0] * 20))
    assert said.startswith("every rating is 1, so ratings say nothing;")
    assert "--rating-col none" in said


def test_many_zeros_are_said_until_they_are_told() -> None:
    ratings = [0, 8, 10, 0, 3, 7] * 5
    (said,) = notes(log(ratings))
    assert said == "33% of the ratings are 0; if 0 means that there is no rating, give --missing-rating 0"
    data = prepare(log(ratings), None, EVERYTHING, options=ReadOptions(missing_ratings=(0.0,)))
    assert data.input["notes"] == []
    assert data.config.rating_scale == RatingScale(1, 10)
    assert int(np.isnan(data.histories.ratings).sum()) == 10


# The ratings, and the narrowest scale that they fit.
SCALES = [
    ([1, 5, 3], "1..5"),
    ([0.5, 5, 3], "0.5..5"),
    ([1, 4.5, 3], "0.5..5"),
    ([0, 5, 3], "0..5"),
    ([1, 10, 3], "1..10"),
    ([9.5, 7, 3], "0.5..10"),
    ([0, 10, 3], "0..10"),
    ([20, 100, 55], "1..100"),
    ([0, 62.5, 12], "0..100"),
]


@pytest.mark.parametrize(("ratings", "scale"), SCALES)
def test_the_narrowest_scale_is_recognized(ratings: list[float], scale: str) -> None:
    assert str(prepare(log(ratings * 10), None, EVERYTHING).config.rating_scale) == scale


def test_a_few_ratings_outside_are_errors_and_many_are_another_scale(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"log\.csv:2: rating 8 is outside 1..5 \(the scale that the log seems"):
        read_ratings(log([8] + [4, 5, 1] * 100, path=tmp_path / "log.csv"))  # type: ignore[arg-type]
    assert str(read_ratings(log([8, 7, 9, 8] + [4, 5, 1] * 100, path=tmp_path / "log.csv"))[1]) == "1..10"  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"fit none of the known scales .*--rating-scale .*--missing-rating"):
        read_ratings(log([-1, 9, 8] * 50, path=tmp_path / "log.csv"))  # type: ignore[arg-type]


def test_movies_of_few_or_none_of_the_items_are_said_or_refused() -> None:
    source = log([4, 3.5, 1, 5] * 5)
    (said,) = notes(source, pd.DataFrame({"movieId": [1, 2, 99], "title": ["One", "Two", "Other"]}))
    assert said == "movies knows 2 of the log's 7 items (28.6%); check that it is the file of these items"
    with pytest.raises(
        DataError, match="movies: none of its 2 ids, such as 98, is one of the log's 7 items, such as 1;"
    ):
        notes(source, pd.DataFrame({"movieId": [98, 99], "title": ["A", "B"]}))


GENRES = {
    "pipe": "Comedy|Drama",
    "comma": '"Comedy, Drama"',
    "semicolon": "Comedy;Drama",
    "Python list": "\"['Comedy', 'Drama']\"",
    "JSON list": '"[""Comedy"", ""Drama""]"',
    "TMDB": "\"[{'id': 35, 'name': 'Comedy'}, {'id': 18, 'name': 'Drama'}]\"",
}


@pytest.mark.parametrize("form", GENRES)
def test_genres_in_every_form_are_the_same(tmp_path: Path, form: str) -> None:
    source = log([4, 3.5, 1, 5] * 5, path=tmp_path / "log.csv")
    rows = "".join(f"{item},Film {item},{GENRES[form] if item % 2 else 'Horror'}\n" for item in range(1, 8))
    (tmp_path / "movies.csv").write_text("id,title,genres\n" + rows)
    with pytest.raises(DataError, match=r"movies\.csv:1: column movieId or item_id is missing"):
        prepare(source, tmp_path / "movies.csv", EVERYTHING)
    (tmp_path / "movies.csv").write_text("movieId,title,genres\n" + rows)
    catalog = prepare(source, tmp_path / "movies.csv", EVERYTHING).catalog
    assert catalog.genres == ("Comedy", "Drama", "Horror")
    assert catalog.item_genres[0] == ("Comedy", "Drama")


def test_ids_that_pandas_made_floats_are_refused(tmp_path: Path) -> None:
    frame = log([4, 3.5, 1, 5] * 5)
    assert isinstance(frame, pd.DataFrame)
    with_gap = frame.assign(movieId=frame["movieId"].astype(float).where(frame.index != 3))
    with pytest.raises(DataError, match=r"column movieId is DOUBLE; expected whole numbers .*astype\('Int64'\)"):
        notes(with_gap)
    with_gap.to_csv(tmp_path / "log.csv", index=False)
    with pytest.raises(DataError, match=r"column movieId: ids such as 123.0 or 1.23E\+10 are floats.*--ids text"):
        read_ratings(tmp_path / "log.csv")


def test_ids_that_a_spreadsheet_rounded_are_refused(tmp_path: Path) -> None:
    rows = "".join(f"{at},1.2345{at}E+12,4,{START + at}\n" for at in range(9))
    (tmp_path / "log.csv").write_text(HEADER + rows)
    with pytest.raises(DataError, match=r"column movieId: ids such as 123.0 or 1.23E\+10 are floats"):
        read_ratings(tmp_path / "log.csv")


FRAMES = {
    "categories": lambda frame: frame.astype({"userId": str, "movieId": "category"}),
    "pandas' own integers": lambda frame: frame.astype("Int64"),
    "Arrow": lambda frame: frame.astype({"userId": "int64[pyarrow]", "movieId": "string[pyarrow]"}),
    "times with a zone": lambda frame: frame.assign(timestamp=pd.to_datetime(frame["timestamp"], unit="s", utc=True)),
    "days as objects": lambda frame: frame.assign(timestamp=pd.to_datetime(frame["timestamp"], unit="s").dt.date),
    "floats of seconds": lambda frame: frame.astype({"timestamp": float}),
    "a column without a name": lambda frame: frame.assign(**{"x": 1}).rename(columns={"x": 0}),
}


@pytest.mark.parametrize("kind", FRAMES)
def test_frames_of_every_type_are_read(kind: str) -> None:
    frame = log([4, 3, 1, 5] * 5)
    data = prepare(FRAMES[kind](frame), None, EVERYTHING)
    assert isinstance(frame, pd.DataFrame)
    day = START // 86_400 * 86_400
    assert data.users.raw_ids.astype(str).tolist() == [str(user) for user in range(1, 8)]
    assert data.catalog.ids.raw_ids.astype(str).tolist() == [str(item) for item in range(1, 8)]
    assert data.histories.times[0] == (day if kind == "days as objects" else START)


def test_one_long_id_does_not_widen_the_others(tmp_path: Path) -> None:
    ids = IdMap.fit(np.array([f"u{number}" for number in range(5000)] + ["u" + "x" * 511], dtype=object))
    write_ids(ids, tmp_path / "ids.npy")
    assert (tmp_path / "ids.npy").stat().st_size < 40_000
    assert open_ids(tmp_path / "ids.npy").raw_ids.tolist() == ids.raw_ids.tolist()
    write_ids(IdMap(np.array(["", "é日", "a\nb"], dtype=object)), tmp_path / "ids.npy")
    assert open_ids(tmp_path / "ids.npy").raw_ids.tolist() == ["", "é日", "a\nb"]
    write_ids(IdMap(np.empty(0, object)), tmp_path / "ids.npy")
    assert len(open_ids(tmp_path / "ids.npy")) == 0


def parts(folder: Path) -> list[Path]:
    """Two files with the halves of a log, one packed."""
    folder.mkdir()
    rows = [f"{1 + at // 3},{1 + at % 7},4,{START + at}\n" for at in range(20)]
    (folder / "a.csv").write_text(HEADER + "".join(rows[:10]))
    (folder / "b.csv.gz").write_bytes(gzip.compress((HEADER + "".join(rows[10:])).encode()))
    return [folder / "a.csv", folder / "b.csv.gz"]


def test_a_folder_and_several_files_are_one_log(tmp_path: Path) -> None:
    files = parts(tmp_path / "log")
    expected = [START + at for at in range(20)]
    assert read_ratings(tmp_path / "log")[0]["timestamp"].tolist() == expected
    result = CliRunner().invoke(
        main,
        [
            "prepare",
            *map(str, files),
            "--out",
            str(tmp_path / "data"),
            "--min-user-ratings",
            "1",
            "--min-movie-ratings",
            "1",
        ],
    )
    assert result.exit_code == 0, result.output
    assert f"source: CSV with a header: 2 files, {files[0]} and so on" in result.output
    assert "columns: user=userId, item=movieId, rating=rating, time=timestamp\n" in result.output
    assert "encoding: utf-8\ndelimiter: ,\n" in result.output
    assert "note: every rating is 4" in result.output


def test_files_of_different_forms_are_refused(tmp_path: Path) -> None:
    parts(tmp_path / "log")
    (tmp_path / "log/c.csv").write_text("userId,movieId,timestamp\n1,2,3\n")
    with pytest.raises(
        DataError, match=r"c\.csv: its columns are user=userId, item=movieId, time=timestamp, and those of"
    ):
        read_ratings(tmp_path / "log")
    (tmp_path / "log/c.csv").unlink()
    pd.DataFrame({"userId": [1]}).to_parquet(tmp_path / "log/c.parquet")
    with pytest.raises(DataError, match=r"holds Parquet \(c\.parquet\) and text \(a\.csv\); name the files to read"):
        read_ratings(tmp_path / "log")


def test_a_zip_with_one_file_of_data_is_read(tmp_path: Path) -> None:
    source = log([4, 3.5, 1, 5] * 5, path=tmp_path / "events.csv")
    with zipfile.ZipFile(tmp_path / "kaggle.zip", "w") as archive:
        archive.write(source, "events.csv")  # type: ignore[arg-type]
        archive.writestr("README.md", "hello")
    assert len(read_ratings(tmp_path / "kaggle.zip")[0]) == 20


def test_an_encoding_that_is_not_the_files_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_bytes((HEADER + "1,2,3,4\n").encode("utf-16"))
    with pytest.raises(DataError, match=r"log\.csv: not ascii text \(.*\); give another --encoding"):
        read_ratings(path, options=ReadOptions(text=TextOptions(encoding="ascii")))
    with pytest.raises(DataError, match=r"log\.csv: the encoding latin-99 is not known"):
        read_ratings(path, options=ReadOptions(text=TextOptions(encoding="latin-99")))


def write(path: Path, rows: list[str], header: str = "user,item,rating,time") -> Path:
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def test_one_bad_value_of_a_column_is_one_bad_row_whatever_its_form(tmp_path: Path) -> None:
    forms = {
        "2016-01-0{}": "n/a",
        "2016010{}": "20161399",
        "150000000{}": "soon",
        "150000000{}.5": "x",
        "150000000{}123": "1e99",
    }
    for at, (form, bad) in enumerate(forms.items()):
        rows = [f"u{n},i{n % 3},4,{form.format(n)}" for n in range(1, 9)]
        path = write(tmp_path / f"{at}.csv", [*rows, f"u9,i9,4,{bad}"])
        with pytest.raises(DataError, match=rf"{at}\.csv:10: time {bad} is not a time"):
            read_ratings(path)
        data = prepare(path, None, EVERYTHING, out=tmp_path / "data", on_bad_rows=OnBadRows.QUARANTINE)
        assert (data.input["rows"], data.input["bad_rows"]) == (9, 1)


def test_parquet_files_of_different_types_are_widened(tmp_path: Path) -> None:
    first = pd.DataFrame({"user": ["a", "b"], "item": ["x", "y"], "rating": [3, 4], "time": [START, START + 1]})
    first.to_parquet(tmp_path / "a.parquet")
    first.assign(rating=[3.5, 4.5], time=[START + 2.0, START + 3.0]).to_parquet(tmp_path / "b.parquet")
    frame, _ = read_ratings(tmp_path)
    assert frame["rating"].tolist() == [3, 4, 3.5, 4.5]
    assert frame["timestamp"].tolist() == [START + at for at in range(4)]


def test_a_key_that_comes_late_in_json_lines_is_read(tmp_path: Path) -> None:
    rows = [f'{{"user": "u{n}", "item": "i{n % 3}", "time": {START + n}}}' for n in range(150)]
    late = [f'{{"user": "u{n}", "item": "i{n % 3}", "time": {START + n}, "rating": 3.5}}' for n in range(150, 200)]
    (tmp_path / "log.jsonl").write_text("\n".join([*rows, *late]) + "\n")
    frame, scale = read_ratings(tmp_path / "log.jsonl")
    assert frame["rating"].notna().sum() == 50
    assert str(scale) == "0.5..5"


def test_json_values_that_are_no_field_are_bad_and_odd_escapes_lose_no_row(tmp_path: Path) -> None:
    rows = [f'{{"user": "u{n}", "item": "i{n % 3}", "name": "\\ud83d", "time": {START + n}}}' for n in range(6)]
    rows[3] = rows[3].replace('"u3"', '{"id": 3}')
    rows[4] = rows[4].replace('"i1"', "true")
    rows[5] = rows[5].replace('"\\ud83d"', "NaN")
    (tmp_path / "log.jsonl").write_text("\n".join(rows) + "\n")
    data = prepare(tmp_path / "log.jsonl", None, EVERYTHING, out=tmp_path / "data", on_bad_rows=OnBadRows.QUARANTINE)
    assert data.users.raw_ids.tolist() == ["u0", "u1", "u2"]
    assert sorted(pd.read_csv(tmp_path / "data/quarantine.csv")["line"]) == [4, 5, 6]


COLUMNS = {
    "user,item,raitng,time": r"--columns names 'raitng'; expected user, item, rating, time, or -",
    "user,item,time": r"--columns names 3 columns, and the first line has 4",
    "user,user,rating,time": r"names the user_id twice",
    "user,item,rating,-": r"does not name time",
}


@pytest.mark.parametrize("order", COLUMNS)
def test_columns_that_do_not_fit_are_refused(tmp_path: Path, order: str) -> None:
    path = write(tmp_path / "log.csv", [f"u{n},i{n},4,{START}" for n in range(3)], f"u9,i9,4,{START}")
    with pytest.raises(DataError, match=COLUMNS[order]):
        read_ratings(path, options=ReadOptions(columns=ColumnNames(order=tuple(order.split(",")))))


def test_columns_can_leave_ratings_out_and_allow_no_other_names(tmp_path: Path) -> None:
    path = write(tmp_path / "log.csv", [f"u{n},i{n},4,{START}" for n in range(3)], f"u9,i9,4,{START}")
    order = ("user", "item", "rating", "time")
    frame, scale = read_ratings(path, options=ReadOptions(columns=ColumnNames(rating="none", order=order)))
    assert (len(frame), scale) == (4, None)
    with pytest.raises(DataError, match="leave --user-col and the like out"):
        read_ratings(path, options=ReadOptions(columns=ColumnNames(user="user", order=order)))


def test_four_columns_without_a_header_are_movielens_only_with_its_times(tmp_path: Path) -> None:
    (tmp_path / "log.tsv").write_text("".join(f"2009-05-0{n}\tu{n}\ti{n}\t3\n" for n in range(1, 5)))
    with pytest.raises(DataError, match="looks like a row and not like a header"):
        read_ratings(tmp_path / "log.tsv")


ODD_IDS = {
    "float": [1, None, 2.0],
    "bytes": [b"a", b"b", b"c"],
    "list": [[1], [2], [3]],
    "bool": [True, False, True],
}


@pytest.mark.parametrize("kind", ODD_IDS)
def test_objects_that_are_no_ids_are_refused(kind: str) -> None:
    frame = pd.DataFrame({"user": pd.Series(ODD_IDS[kind], dtype=object), "item": ["x", "y", "z"], "time": START})
    with pytest.raises(DataError, match=f"interactions: column user holds {kind}; expected whole numbers or text"):
        prepare(frame, None, EVERYTHING)


def test_times_of_32_bits_are_refused() -> None:
    frame = log([4, 3, 5] * 4)
    assert isinstance(frame, pd.DataFrame)
    with pytest.raises(DataError, match="column timestamp holds 32-bit floats"):
        prepare(frame.astype({"timestamp": np.float32}), None, EVERYTHING)


def test_a_unit_that_is_given_may_have_fractions(tmp_path: Path) -> None:
    path = write(tmp_path / "log.csv", [f"u{n},i{n},4,{START + n}.0" for n in range(3)])
    assert read_ratings(path, options=ReadOptions(time_unit=TimeUnit.SECONDS))[0]["timestamp"].tolist()[0] == START


def test_repeats_of_data_without_ratings_stay_when_rated_events_are_appended() -> None:
    plays = pd.DataFrame(
        {"user": ["u", "u", "u", "v"], "item": ["a", "a", "b", "a"], "time": [START, START, START, START]}
    )
    rated = pd.DataFrame({"user": ["u", "v"], "item": ["b", "b"], "rating": [3.5, 4], "time": [START + 1, START + 2]})
    data = append(prepare(plays, None, EVERYTHING), rated)
    assert (data.histories.event_count, data.input["repeats"], data.input["repeats_left_out"]) == (6, 0, 0)
    assert data.config.rating_scale is None


def test_a_scale_that_is_given_makes_no_ratings() -> None:
    plays = pd.DataFrame({"user": ["u", "u", "v"], "item": ["a", "a", "b"], "time": [START, START, START]})
    data = prepare(plays, None, PrepareConfig(1, 1, rating_scale=RatingScale(1, 5)))
    assert (data.histories.event_count, data.input["repeats"]) == (3, 1)


def test_every_row_bad_says_why(tmp_path: Path) -> None:
    path = write(tmp_path / "log.csv", ["u,,4,5", "v,,4,6"])
    with pytest.raises(DataError, match=r"every row is bad: .*log\.csv:2: item is empty; expected an id; "):
        prepare(path, None, EVERYTHING, out=tmp_path / "data", on_bad_rows=OnBadRows.QUARANTINE)


def test_quotes_that_never_make_a_row_are_given_up_soon(tmp_path: Path) -> None:
    rows = [f'"x{n}' for n in range(3000)]  # each would be searched through all of the next lines
    path = write(tmp_path / "log.csv", [f"u{n},i{n % 3},4,{START}" for n in range(4)] + rows)
    data = prepare(path, None, EVERYTHING, out=tmp_path / "data", on_bad_rows=OnBadRows.QUARANTINE)
    assert (data.input["rows"], data.input["bad_rows"]) == (3004, 3000)


def test_a_rating_of_spaces_or_of_empty_quotes_is_none(tmp_path: Path) -> None:
    path = write(tmp_path / "log.csv", [f"u,a,\t,{START}", f'u,b,"",{START}', f"u,c,,{START}", f"u,d, 4 ,{START}", "u"])
    data = prepare(path, None, EVERYTHING, out=tmp_path / "data", on_bad_rows=OnBadRows.QUARANTINE)
    assert (data.input["rows"], data.input["bad_rows"]) == (5, 1)
    assert int(np.isnan(data.histories.ratings).sum()) == 3
