"""Each format is recognized, said, and read to the same interactions; damaged downloads are one clear error."""

import gzip
import json
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from jaxrec.config import PrepareConfig
from jaxrec.data.prepare import prepare
from jaxrec.data.reading.check import ReadOptions
from jaxrec.data.reading.movies import read_movies
from jaxrec.data.reading.read import read_ratings
from jaxrec.data.reading.rules import IdKind, TimeUnit
from jaxrec.data.reading.sources import ColumnNames, find_source
from jaxrec.data.schema import GENRES
from jaxrec.errors import DataError

ROWS = [(1, 10, 4.0, 978300760), (1, 20, 3.0, 978300761), (2, 10, 5.0, 978300762), (2, 30, 1.0, 978300763)]
TITLES = ["Cité, La (1995)", "Two", "Three"]
EVERYTHING = PrepareConfig(1, 1)


def ml_csv(folder: Path) -> None:
    lines = ["userId,movieId,rating,timestamp", *(f"{u},{i},{r},{t}" for u, i, r, t in ROWS)]
    (folder / "ratings.csv").write_text("\n".join(lines) + "\n")
    movies = f'movieId,title,genres\n10,"{TITLES[0]}",Drama|Comedy\n20,Two,War\n30,Three,(no genres listed)\n'
    (folder / "movies.csv").write_text(movies, encoding="utf-8")


def ml_dat(folder: Path) -> None:
    (folder / "ratings.dat").write_text("".join(f"{u}::{i}::{r:g}::{t}\n" for u, i, r, t in ROWS))
    movies = f"10::{TITLES[0]}::Drama|Comedy\n20::Two::War\n30::Three::(no genres listed)\n"
    (folder / "movies.dat").write_text(movies, encoding="latin-1")
    (folder / "users.dat").write_text("1::F::1::10::48067\n")


def ml_100k(folder: Path) -> None:
    (folder / "u.data").write_text("".join(f"{u}\t{i}\t{r:g}\t{t}\n" for u, i, r, t in ROWS))
    flags = {10: {5, 8}, 20: {17}, 30: {0}}  # Comedy and Drama; War; unknown
    lines = [
        f"{item}|{title}|01-Jan-1995||http://x|" + "|".join(str(int(j in flags[item])) for j in range(19))
        for item, title in zip(flags, TITLES, strict=True)
    ]
    (folder / "u.item").write_text("\n".join(lines) + "\n", encoding="latin-1")


FORMATS = {
    "csv": (ml_csv, "CSV with a header"),
    "dat": (ml_dat, "MovieLens 1M or 10M (.dat, fields separated by ::)"),
    "100k": (ml_100k, "MovieLens 100K (u.data, fields separated by tabs)"),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", FORMATS)
def test_a_folder_or_its_zip_is_read_with_its_movies(tmp_path: Path, kind: str, packed: bool) -> None:
    write, description = FORMATS[kind]
    source = tmp_path / "ml"
    source.mkdir()
    write(source)
    if packed:
        with zipfile.ZipFile(tmp_path / "ml.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for file in source.iterdir():
                archive.write(file, f"ml/{file.name}")
        source = tmp_path / "ml.zip"
    data = prepare(source, None, EVERYTHING, out=tmp_path / "data")
    assert data.input["source"].startswith(description)
    assert data.input["rows"] == 4
    assert data.catalog.titles == tuple(TITLES)
    assert data.catalog.item_genres == (("Comedy", "Drama"), ("War",), ())
    assert data.users.raw_ids.tolist() == [1, 2]
    assert data.catalog.ids.decode(data.histories.items).tolist() == [10, 20, 10, 30]
    assert data.histories.ratings.tolist() == [4, 3, 5, 1]
    assert data.histories.times.tolist() == [row[3] for row in ROWS]


def test_movies_of_u_data_may_be_a_csv(tmp_path: Path) -> None:
    ml_100k(tmp_path)
    (tmp_path / "u.item").unlink()
    ml_csv(tmp_path)
    (tmp_path / "ratings.csv").unlink()
    assert prepare(tmp_path, None, EVERYTHING, out=tmp_path / "data").catalog.titles == tuple(TITLES)


def test_a_gzipped_csv(tmp_path: Path) -> None:
    ml_csv(tmp_path)
    packed = tmp_path / "ratings.csv.gz"
    packed.write_bytes(gzip.compress((tmp_path / "ratings.csv").read_bytes()))
    assert read_ratings(packed)[0]["item_id"].tolist() == [10, 20, 10, 30]


@pytest.mark.parametrize("parts", [1, 2])
def test_parquet_files_and_folders(tmp_path: Path, parts: int) -> None:
    frame = pd.DataFrame(ROWS, columns=["user_id", "item_id", "rating", "timestamp"])
    frame["timestamp"] = pd.to_datetime(frame["timestamp"], unit="s")
    (tmp_path / "log").mkdir()
    for part in range(parts):
        frame[part::parts].to_parquet(tmp_path / f"log/part-{part}.parquet")
    source = tmp_path / "log" if parts == 2 else tmp_path / "log/part-0.parquet"
    read, _ = read_ratings(source)
    assert sorted(read["timestamp"].tolist()) == [row[3] for row in ROWS]
    assert read["rating"].dtype == np.float32


def test_columns_by_name_and_other_delimiters(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text('who;note;when;what\nann;"a;b";5;x y\nbob;c;6;z\n')
    names = ColumnNames(user="who", item="what", time="when")
    frame, scale = read_ratings(tmp_path / "log.csv", options=ReadOptions(columns=names))
    assert frame["user_id"].tolist() == ["ann", "bob"]
    assert frame["item_id"].tolist() == ["x y", "z"]
    assert scale is None
    wrong = ReadOptions(columns=ColumnNames(user="who", item="what", rating="stars", time="when"))
    with pytest.raises(DataError, match=r"log.csv:1: column stars is missing; the header is 'who,note,when,what'"):
        read_ratings(tmp_path / "log.csv", options=wrong)


TIMES = {
    "seconds": (["978300760", "978300761"], TimeUnit.SECONDS),
    "milliseconds": (["978300760999", "978300761000"], TimeUnit.MILLISECONDS),
    "ISO with a zone": (["2000-12-31T23:12:40+01:00", "2000-12-31 22:12:41Z"], TimeUnit.ISO),
    "ISO without a zone is UTC": (["2000-12-31T22:12:40.5", "2000-12-31 22:12:41"], TimeUnit.ISO),
}


@pytest.mark.parametrize("case", TIMES)
def test_the_unit_of_times_is_recognized(tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Asia/Tokyo")  # the zone of the machine must not matter
    texts, unit = TIMES[case]
    rows = [f"{user},1,3,{text}" for user, text in enumerate(texts)]
    path = tmp_path / "ratings.csv"
    path.write_text("\n".join(["userId,movieId,rating,timestamp", *rows]) + "\n")
    assert read_ratings(path)[0]["timestamp"].tolist() == [978300760, 978300761]
    assert read_ratings(path, options=ReadOptions(time_unit=unit))[0]["timestamp"].tolist() == [978300760, 978300761]


def test_milliseconds_order_events_within_a_second(tmp_path: Path) -> None:
    rows = ["1,30,978300760900", "1,10,978300760100", "1,20,978300760500"]
    (tmp_path / "log.csv").write_text("\n".join(["userId,movieId,timestamp", *rows]) + "\n")
    data = prepare(tmp_path / "log.csv", None, EVERYTHING, out=tmp_path / "data")
    assert data.catalog.ids.decode(data.histories.items).tolist() == [10, 20, 30]


def test_ids_with_leading_zeros_stay_text(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("userId,movieId,timestamp\n1,007,5\n1,012,6\n2,113,7\n")
    frame, _ = read_ratings(tmp_path / "log.csv")
    assert frame["item_id"].tolist() == ["007", "012", "113"]
    assert frame["user_id"].tolist() == [1, 1, 2]
    assert read_ratings(tmp_path / "log.csv", options=ReadOptions(users=IdKind.TEXT))[0]["user_id"].tolist()[0] == "1"


def test_movie_ids_follow_the_kind_of_the_ratings(tmp_path: Path) -> None:
    (tmp_path / "movies.csv").write_text("movieId,title,genres\n7,Seven,Drama\nx,X,Drama\n")
    assert read_movies(tmp_path / "movies.csv")["item_id"].tolist() == ["7", "x"]
    with pytest.raises(DataError, match=r"movies.csv:3: movieId x is not a whole number"):
        read_movies(tmp_path / "movies.csv", ids=IdKind.INTEGER)


def damaged_zip(folder: Path) -> Path:
    ml_csv(folder)
    with zipfile.ZipFile(folder / "ml.zip", "w") as archive:
        archive.write(folder / "ratings.csv", "ml/ratings.csv")
    return folder / "ml.zip"


def truncated_zip(folder: Path) -> Path:
    path = damaged_zip(folder)
    path.write_bytes(path.read_bytes()[:60])
    return path


def zip_with_flipped_bit(folder: Path) -> Path:
    path = damaged_zip(folder)
    content = bytearray(path.read_bytes())
    content[60] ^= 1
    path.write_bytes(content)
    return path


def truncated_gzip(folder: Path) -> Path:
    ml_csv(folder)
    path = folder / "ratings.csv.gz"
    path.write_bytes(gzip.compress((folder / "ratings.csv").read_bytes())[:-9])
    return path


def truncated_parquet(folder: Path) -> Path:
    pd.DataFrame(ROWS, columns=["user_id", "item_id", "rating", "timestamp"]).to_parquet(folder / "log.parquet")
    path = folder / "log.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    return path


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (truncated_zip, "damaged or incomplete archive"),
        (zip_with_flipped_bit, "damaged or incomplete archive"),
        (truncated_gzip, "damaged or incomplete archive"),
        (truncated_parquet, "not Parquet"),
    ],
)
def test_damaged_files_are_one_clear_error(tmp_path: Path, make: object, expected: str) -> None:
    path = make(tmp_path)  # type: ignore[operator]
    with pytest.raises(DataError, match=expected):
        prepare(path, None, EVERYTHING, out=tmp_path / "data")
    assert not (tmp_path / "data").exists()
    assert not [left for left in tmp_path.iterdir() if left.name.startswith(".")]


def test_folders_and_zips_without_ratings_say_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds none of ratings.csv, ratings.dat, u.data and no .parquet or text file"):
        find_source(tmp_path, None, tmp_path)
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("ml/README", "hello")
    with pytest.raises(DataError, match=r"x.zip: holds none of ratings.csv, ratings.dat, u.data; it holds ml/README"):
        find_source(tmp_path / "x.zip", None, tmp_path)


def test_parquet_columns_of_wrong_types_are_named(tmp_path: Path) -> None:
    frame = pd.DataFrame({"userId": [1.5, 2.0], "movieId": [1, 2], "timestamp": [5, 6]})
    frame.to_parquet(tmp_path / "log.parquet")
    with pytest.raises(DataError, match=r"column userId is DOUBLE; expected whole numbers or text as ids"):
        read_ratings(tmp_path / "log.parquet")


def test_genres_of_json_lines_may_be_lists(tmp_path: Path) -> None:
    path = tmp_path / "movies.jsonl"
    rows = [(1, ["War", "Sci-Fi"]), (2, []), (3, None), (4, "Drama|War"), (5, [{"name": "Horror"}]), (6, ['Café "x"'])]
    path.write_text("".join(json.dumps({"movieId": raw, "title": f"t{raw}", "genres": of}) + "\n" for raw, of in rows))
    assert read_movies(path)[GENRES].tolist() == ["War|Sci-Fi", "", "", "Drama|War", "Horror", 'Café "x"']
