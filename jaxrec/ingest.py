"""Reads `ratings.csv` and `movies.csv` as MovieLens writes them, and says where a file breaks the rules."""

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from jaxrec.schema import GENRES, ITEM, RATING, TIME, TITLE, USER, DataError, RatingScale, infer_rating_scale

RATING_COLUMNS = {"userId": USER, "movieId": ITEM, "rating": RATING, "timestamp": TIME}
MOVIE_COLUMNS = {"movieId": ITEM, "title": TITLE, "genres": GENRES}
LATEST_TIME = 2**33  # the year 2242: larger values are milliseconds by mistake


def read_ratings(path: Path, scale: RatingScale | None = None) -> tuple[pd.DataFrame, RatingScale | None]:
    """Reads userId,movieId,rating,timestamp (further columns are ignored; rating may be absent or empty).

    Returns the validated interactions in the file's order (user_id and item_id int64, or str where an id is not
    a whole number; rating float32, NaN where there is none; timestamp int64 seconds) and the rating scale, inferred
    where none is given. Raises DataError naming file and line for the first bad row.
    """
    raw, lines = _read_csv(path, RATING_COLUMNS, optional=("rating",))
    ids = {USER: _parse_ids(raw[USER], "userId", path, lines), ITEM: _parse_ids(raw[ITEM], "movieId", path, lines)}
    frame = pd.DataFrame(ids)
    frame[TIME] = _parse_times(raw[TIME], path, lines)
    ratings = _parse_ratings(raw[RATING], path, lines) if RATING in raw else np.full(len(raw), np.nan)
    asked, scale = scale, scale or infer_rating_scale(ratings)
    if scale is not None:
        outside = (ratings < scale.minimum) | (ratings > scale.maximum)
        source = "" if asked else " (the scale that the log seems to have; another can be given: --rating-scale)"
        _fail_at(outside, path, lines, "rating", raw.get(RATING), f"is outside {scale}{source}")
    frame[RATING] = ratings.astype(np.float32)
    _reject_duplicates(frame, path, lines)
    return frame[[USER, ITEM, RATING, TIME]], scale


def read_movies(path: Path) -> pd.DataFrame:
    """Reads movieId,title,genres into item_id, title, genres (as written). Raises DataError naming file and line."""
    raw, lines = _read_csv(path, MOVIE_COLUMNS)
    frame = pd.DataFrame({ITEM: _parse_ids(raw[ITEM], "movieId", path, lines), TITLE: raw[TITLE], GENRES: raw[GENRES]})
    repeated = frame.duplicated(ITEM).to_numpy()
    _fail_at(repeated, path, lines, "movieId", raw[ITEM], "occurs a second time")
    return frame


def _read_csv(path: Path, columns: dict[str, str], optional: Sequence[str] = ()) -> tuple[pd.DataFrame, np.ndarray]:
    """The named columns as text, and the line number of each row."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            header = next(reader, None)
            if header is None:
                raise DataError(f"{path}: the file is empty; expected the header {','.join(columns)}")
            missing = [name for name in columns if name not in header and name not in optional]
            if missing:
                came = ",".join(header)
                raise DataError(f"{path}:1: column {', '.join(missing)} is missing; the header is {came!r}")
            rows, lines = [], []
            for row in reader:
                if not row:  # an empty line
                    continue
                if len(row) != len(header):
                    raise DataError(f"{path}:{reader.line_num}: {len(row)} fields, expected {len(header)}")
                rows.append(row)
                lines.append(reader.line_num)
    except UnicodeDecodeError as error:
        line = _line_of_bad_byte(path)
        raise DataError(f"{path}:{line}: not UTF-8 text ({error.reason})") from error
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: not CSV: {error}") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    if not rows:
        raise DataError(f"{path}: no rows after the header")
    table = pd.DataFrame(rows, columns=header, dtype=object)
    present = {name: column for name, column in columns.items() if name in header}
    return table[list(present)].rename(columns=present), np.asarray(lines)


def _line_of_bad_byte(path: Path) -> int:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return number
    return number


def _parse_ids(texts: pd.Series, field: str, path: Path, lines: np.ndarray) -> np.ndarray:
    """int64 where every id is a whole number as text, else the texts themselves. An empty id is an error."""
    texts = texts.str.strip()
    _fail_at((texts == "").to_numpy(), path, lines, field, texts, "is empty; expected an id")
    if texts.str.fullmatch(r"-?(0|[1-9]\d{0,17})").all():
        return texts.to_numpy(dtype=np.int64)
    return texts.to_numpy(dtype=object)


def _parse_times(texts: pd.Series, path: Path, lines: np.ndarray) -> np.ndarray:
    expected = f"is not a time; expected whole seconds since 1970 in 0..{LATEST_TIME}"
    whole = texts.str.fullmatch(r"\d{1,18}").to_numpy(dtype=bool)
    _fail_at(~whole, path, lines, "timestamp", texts, expected)
    times = texts.to_numpy(dtype=np.int64)
    _fail_at(times > LATEST_TIME, path, lines, "timestamp", texts, expected)
    return times


def _parse_ratings(texts: pd.Series, path: Path, lines: np.ndarray) -> np.ndarray:
    """float64, NaN for an empty field."""
    empty = (texts.str.strip() == "").to_numpy()
    numbers = pd.to_numeric(texts.where(~empty), errors="coerce").to_numpy(dtype=np.float64)
    bad = ~empty & ~np.isfinite(numbers)
    _fail_at(bad, path, lines, "rating", texts, "is not a number")
    return numbers


def _reject_duplicates(frame: pd.DataFrame, path: Path, lines: np.ndarray) -> None:
    repeated = frame.duplicated([USER, ITEM, TIME]).to_numpy()
    if repeated.any():
        second = int(np.argmax(repeated))
        key = frame.loc[second, [USER, ITEM, TIME]]
        first = int(np.argmax((frame[[USER, ITEM, TIME]] == key).all(axis=1).to_numpy()))
        raise DataError(
            f"{path}:{lines[second]}: user {key[USER]}, movie {key[ITEM]} at time {key[TIME]} "
            f"repeats line {lines[first]}; expected each event once"
        )


def _fail_at(
    bad: np.ndarray, path: Path, lines: np.ndarray, field: object, texts: pd.Series | None, problem: str
) -> None:
    if bad.any() and texts is not None:
        row = int(np.argmax(bad))
        more = f" (and {int(bad.sum()) - 1} more rows)" if bad.sum() > 1 else ""
        raise DataError(f"{path}:{lines[row]}: {field} {texts.iloc[row]!r} {problem}{more}")
