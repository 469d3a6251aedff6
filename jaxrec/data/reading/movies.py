"""Reads movies.csv, movies.dat and u.item into item_id, title, genres."""

import csv
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from jaxrec.data.catalog import checked_movies
from jaxrec.data.reading.rules import IdKind
from jaxrec.data.schema import GENRES, ITEM, NO_GENRES, TITLE
from jaxrec.errors import DataError

ID_COLUMNS = ("movieId", "item_id")
# The flags of u.item, in order; the first, "unknown", is no genre. The names are those of the other MovieLens files.
U_ITEM_GENRES = (
    "Action",
    "Adventure",
    "Animation",
    "Children",
    "Comedy",
    "Crime",
    "Documentary",
    "Drama",
    "Fantasy",
    "Film-Noir",
    "Horror",
    "Musical",
    "Mystery",
    "Romance",
    "Sci-Fi",
    "Thriller",
    "War",
    "Western",
)
U_ITEM_FIELDS = 5 + 1 + len(U_ITEM_GENRES)  # id, title, release, video release, URL, unknown, genres
MovieRow = tuple[int, str, str, str]  # line, id, title, genres


def read_movies(path: Path, name: str | None = None, ids: IdKind = IdKind.AUTO) -> pd.DataFrame:
    """Reads item_id (int64, or str), title and genres (joined by `|`). `name`: what messages call the file.

    CSV with movieId,title,genres in UTF-8, or `.dat` and `u.item` in Latin-1. With `ids` INTEGER an id that is not a
    whole number is an error; with AUTO all are text then. Raises DataError naming file and line.
    """
    name = name or str(path)
    try:
        if path.suffix == ".dat":
            rows = list(_dat_rows(path, name))
        elif path.name == "u.item":
            rows = list(_u_item_rows(path, name))
        else:
            rows = list(_csv_rows(path, name))
    except OSError as error:
        raise DataError(f"{name}: cannot be read: {error.strerror}") from error
    if not rows:
        raise DataError(f"{name}: no rows after the header")
    seen: dict[str, int] = {}
    for line, raw, _, _ in rows:
        if not raw:
            raise DataError(f"{name}:{line}: movieId is empty; expected an id")
        if raw in seen:
            raise DataError(f"{name}:{line}: movieId {raw} occurs a second time; the first is in line {seen[raw]}")
        seen[raw] = line
    frame = pd.DataFrame({TITLE: [row[2] for row in rows], GENRES: [row[3] for row in rows]})
    frame.insert(0, ITEM, _ids([(line, raw) for line, raw, _, _ in rows], ids, name))
    return frame


def movies_like(
    movies: Path | pd.DataFrame | None, raw_items: np.ndarray, name: str | None = None
) -> pd.DataFrame | None:
    """Movies of a file or a frame, with ids of the type of a log's raw item ids. `name`: as for `read_movies`.

    Raises DataError where the ids are of another type, or occur twice.
    """
    if movies is None:
        return None
    if isinstance(movies, pd.DataFrame):
        return checked_movies(movies, raw_items)
    return read_movies(movies, name, IdKind.INTEGER if raw_items.dtype == np.int64 else IdKind.TEXT)


def _ids(raw: list[tuple[int, str]], kind: IdKind, name: str) -> np.ndarray:
    odd = next(((line, text) for line, text in raw if not _is_whole(text)), None)
    if kind is IdKind.TEXT or (odd is not None and kind is IdKind.AUTO):
        return np.array([text for _, text in raw], dtype=object)
    if odd is not None:
        raise DataError(f"{name}:{odd[0]}: movieId {odd[1]} is not a whole number, as those of the ratings are")
    return np.array([int(text) for _, text in raw], dtype=np.int64)


def _is_whole(text: str) -> bool:
    return len(text) <= 18 and text.removeprefix("-").isdecimal() and text == str(int(text))


def _csv_rows(path: Path, name: str) -> Iterator[MovieRow]:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            header = next(reader, None)
            if header is None:
                raise DataError(f"{name}: the file is empty; expected the header movieId,title,genres")
            id_column = next((column for column in ID_COLUMNS if column in header), " or ".join(ID_COLUMNS))
            missing = [column for column in (id_column, "title", "genres") if column not in header]
            if missing:
                came = ",".join(header)
                raise DataError(f"{name}:1: column {', '.join(missing)} is missing; the header is {came!r}")
            raw, title, genres = (header.index(column) for column in (id_column, "title", "genres"))
            for row in reader:
                if not row:
                    continue
                if len(row) != len(header):
                    raise DataError(f"{name}:{reader.line_num}: {len(row)} fields, expected {len(header)}")
                yield reader.line_num, row[raw].strip(), row[title], row[genres]
    except UnicodeDecodeError as error:
        raise DataError(f"{name}:{_line_of_bad_byte(path)}: not UTF-8 text ({error.reason})") from error
    except csv.Error as error:
        raise DataError(f"{name}:{reader.line_num}: not CSV: {error}") from error


def _dat_rows(path: Path, name: str) -> Iterator[MovieRow]:
    for line, text in _latin_1_lines(path):
        fields = text.split("::")
        if len(fields) != 3:
            raise DataError(f"{name}:{line}: {len(fields)} fields, expected 3 (id::title::genres)")
        yield line, fields[0].strip(), fields[1], fields[2]


def _u_item_rows(path: Path, name: str) -> Iterator[MovieRow]:
    for line, text in _latin_1_lines(path):
        fields = text.split("|")
        if len(fields) != U_ITEM_FIELDS:
            raise DataError(f"{name}:{line}: {len(fields)} fields, expected {U_ITEM_FIELDS}")
        flags = fields[-len(U_ITEM_GENRES) :]
        genres = [genre for genre, flag in zip(U_ITEM_GENRES, flags, strict=True) if flag.strip() == "1"]
        yield line, fields[0].strip(), fields[1], "|".join(genres) or NO_GENRES


def _latin_1_lines(path: Path) -> Iterator[tuple[int, str]]:
    with open(path, encoding="latin-1", newline="\n") as file:
        for number, line in enumerate(file, start=1):
            text = line.rstrip("\r\n")
            if text:
                yield number, text


def _line_of_bad_byte(path: Path) -> int:
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return number
    return number
