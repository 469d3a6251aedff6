"""Reading ratings.csv and movies.csv: what comes out, and that each kind of bad input is named with file and line."""

from pathlib import Path

import numpy as np
import pytest

from jaxrec.config import RatingScale
from jaxrec.data.reading.movies import read_movies
from jaxrec.data.reading.read import read_ratings
from jaxrec.errors import DataError

HEADER = "userId,movieId,rating,timestamp\n"


def write(tmp_path: Path, text: str | bytes, name: str = "ratings.csv") -> Path:
    path = tmp_path / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_reads_types_and_recognizes_the_scale(tmp_path: Path) -> None:
    frame, scale = read_ratings(write(tmp_path, HEADER + "7,31,2.5,100\n3,10,,90\n"))
    assert frame.columns.tolist() == ["user_id", "item_id", "rating", "timestamp"]
    assert frame["user_id"].tolist() == [7, 3]
    assert frame["rating"].tolist()[0] == 2.5
    assert np.isnan(frame["rating"][1])
    assert frame["timestamp"].dtype == np.int64
    assert scale == RatingScale(0.5, 5.0)


def test_whole_ratings_from_one_up_are_on_the_scale_1_to_5(tmp_path: Path) -> None:
    assert read_ratings(write(tmp_path, HEADER + "1,1,1,1\n1,2,4.0,2\n"))[1] == RatingScale(1.0, 5.0)


def test_rating_column_may_be_absent(tmp_path: Path) -> None:
    frame, scale = read_ratings(write(tmp_path, "userId,movieId,timestamp\na,x,5\n"))
    assert scale is None
    assert frame["user_id"].tolist() == ["a"]
    assert np.isnan(frame["rating"][0])


def test_byte_order_mark_and_windows_line_ends_are_read(tmp_path: Path) -> None:
    frame, _ = read_ratings(write(tmp_path, b"\xef\xbb\xbf" + HEADER.replace("\n", "\r\n").encode() + b"1,2,3,4\r\n"))
    assert frame["timestamp"].tolist() == [4]


BAD_RATINGS = {
    "empty file": ("", "ratings.csv: the file is empty"),
    "header only": (HEADER, "ratings.csv: no rows after the header"),
    "missing column": (
        "userId,rating,timestamp\n1,2,3\n",
        "ratings.csv:1: column movieId or item_id (or another, given as --item-col) is missing",
    ),
    "bad rating": (HEADER + "1,2,3,4\n1,3,good,5\n", "ratings.csv:3: rating good is not a number"),
    "infinite rating": (HEADER + "1,3,inf,5\n", "ratings.csv:2: rating inf is not a number"),
    "rating off the scale": (
        HEADER + "1,2,0.5,4\n1,2,3,6\n1,3,7.5,5\n",
        "ratings.csv:4: rating 7.5 is outside 0.5..5",
    ),
    "bad time": (HEADER + "1,2,3,4\n1,3,3,noon\n", "ratings.csv:3: timestamp noon is not a time"),
    "negative time": (HEADER + "1,3,3,-1\n", "ratings.csv:2: timestamp -1 is not a time"),
    "milliseconds among seconds": (
        HEADER + "1,3,3,964982703\n1,4,3,964982703\n1,5,3,964982703000\n",
        "ratings.csv:4: timestamp 964982703000 is not a time; expected whole seconds since 1970",
    ),
    "a time in the future": (HEADER + "1,3,3,4000000000\n", "ratings.csv:2: timestamp 4000000000 is not a time"),
    "a NaN rating": (HEADER + "1,3,NaN,1\n", "ratings.csv:2: rating NaN is not a number"),
    "a NaN time": (HEADER + "1,3,3,NaN\n", "ratings.csv:2: timestamp NaN is not a time"),
    "an empty time": (HEADER + "1,3,3,\n", "ratings.csv:2: timestamp is not a time"),
    "empty id": (HEADER + ",3,3,1\n", "ratings.csv:2: userId is empty; expected an id"),
    "text among whole ids": (
        HEADER + "1,3,3,1\n2,3,3,1\nbob,3,3,1\n",
        "ratings.csv:4: userId bob is not a whole number, as the other ids of its column are; if ids are text, give",
    ),
    "renamed column": (
        "who,movieId,rating,timestamp\n1,2,3,4\n",
        "ratings.csv:1: column userId or user_id (or another, given as --user-col) is missing",
    ),
    "long row": (HEADER + "1,2,3,4\n1,2,3,4,5\n", "ratings.csv:3: 5 fields, expected 4"),
    "fraction of an id": (HEADER + "1,2,3,4\n1.5,2,3,4\n", "ratings.csv:3: userId 1.5 is not a whole number"),
    "several bad rows": (
        HEADER + "".join(f"1,2,x,{i}\n" for i in range(5)),
        "ratings.csv:2: rating x is not a number; {path}:3: rating x is not a number; "
        "{path}:4: rating x is not a number (and 2 more bad rows)",
    ),
    "short row": (HEADER + "1,2,3,4\n1,2,3\n", "ratings.csv:3: 3 fields, expected 4"),
    "wrong encoding": (HEADER.encode() + b"1,2,3,4\n\xff\xfe,1,1,1\n", "ratings.csv:3: not UTF-8"),
    "open quote": (HEADER + '1,"2,3,4\n', "ratings.csv:2: not CSV"),
}


@pytest.mark.parametrize("case", BAD_RATINGS)
def test_bad_ratings_are_named_with_file_and_line(tmp_path: Path, case: str) -> None:
    text, expected = BAD_RATINGS[case]
    path = write(tmp_path, text)
    with pytest.raises(DataError) as caught:
        read_ratings(path)
    assert expected.replace("{path}", str(path)) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_line_numbers_survive_quoted_line_breaks(tmp_path: Path) -> None:
    text = 'movieId,title,genres\n1,"Two\nlines",Drama\n1,Again,Drama\n'
    with pytest.raises(DataError, match=r"movies.csv:4: the id 1 occurs a second time; the first is in line 2"):
        read_movies(write(tmp_path, text, "movies.csv"))


def test_empty_lines_are_skipped_and_lines_still_counted(tmp_path: Path) -> None:
    assert len(read_ratings(write(tmp_path, HEADER + "\n1,2,3,4\n\n"))[0]) == 1
    with pytest.raises(DataError, match=r"ratings\.csv:4: rating x"):
        read_ratings(write(tmp_path, HEADER + "1,2,3,4\n\n1,2,x,4\n"))


def test_quoted_commas_in_titles(tmp_path: Path) -> None:
    movies = read_movies(write(tmp_path, 'movieId,title,genres\n11,"American President, The",Comedy|Drama\n', "m.csv"))
    assert movies["title"].tolist() == ["American President, The"]


def test_missing_file_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        read_ratings(tmp_path / "absent.csv")
