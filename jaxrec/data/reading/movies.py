"""Reads the movies of a log (id, title, genres): CSV and JSON lines in any form, movies.dat and u.item of MovieLens."""

import ast
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from jaxrec.data.catalog import checked_ids, require_utf8
from jaxrec.data.reading.bad_rows import BadRow
from jaxrec.data.reading.columns import movie_columns
from jaxrec.data.reading.dialect import Dialect, scan
from jaxrec.data.reading.rules import IdKind
from jaxrec.data.reading.sources import TextOptions, open_text
from jaxrec.data.reading.text_file import records
from jaxrec.data.schema import GENRES, ITEM, NO_GENRES, TITLE
from jaxrec.errors import DataError

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
FEW_MOVIES = 0.5  # share of a log's items with a movie below which the file is perhaps another log's
SEPARATORS = ("|", ";", ",")


def read_movies(path: Path, name: str | None = None, ids: IdKind = IdKind.AUTO) -> pd.DataFrame:
    """Reads the movies of a log.

    Args:
        path: CSV with a header or JSON lines, with names as logs have them; `movies.dat`; `u.item`.
        name: What messages call the file; None: its path.
        ids: INTEGER: an id that is not a whole number is an error; AUTO: all are text then.

    Returns:
        item_id (int64, or str), title (the id where there is none) and genres (joined by `|`).

    Raises:
        DataError: For a file or row that is none, and for text that is not Unicode (half of a surrogate pair), naming
            file and line.
    """
    name = name or str(path)
    try:
        if path.suffix == ".dat":
            rows = list(_dat_rows(path, name))
        elif path.name == "u.item":
            rows = list(_u_item_rows(path, name))
        else:
            rows = list(_text_rows(path, name))
    except OSError as error:
        raise DataError(f"{name}: cannot be read: {error.strerror}") from error
    if not rows:
        raise DataError(f"{name}: no rows after the header")
    seen: dict[str, int] = {}
    for line, raw, _, _ in rows:
        if not raw:
            raise DataError(f"{name}:{line}: the id is empty; expected one")
        if raw in seen:
            raise DataError(f"{name}:{line}: the id {raw} occurs a second time; the first is in line {seen[raw]}")
        seen[raw] = line
    titles, genres = [row[2] or row[1] for row in rows], joined_genres([row[3] for row in rows])
    for (line, *_), title, joined in zip(rows, titles, genres, strict=True):
        require_utf8([(TITLE, title), (GENRES, joined)], f"{name}:{line}")
    frame = pd.DataFrame({TITLE: titles, GENRES: genres})
    frame.insert(0, ITEM, typed_ids([(line, raw) for line, raw, _, _ in rows], ids, name))
    return frame


def movies_like(
    movies: Path | pd.DataFrame | None, raw_items: np.ndarray, name: str | None = None, others: bool = False
) -> tuple[pd.DataFrame | None, list[str]]:
    """Movies of a file or a frame, with ids of the type of a log's.

    Args:
        movies: As for `read_movies`, or a frame with the same columns; genres may be lists.
        raw_items: [items] the ids of the log.
        name: What messages call the file.
        others: Movies of no item of the log are welcome.

    Returns:
        item_id, title and genres; and what is odd about them, each in one sentence.

    Raises:
        DataError: Where ids are empty, of another type, occur twice, or are none of the log's; and for text that is not
            Unicode.
    """
    if movies is None:
        return None, []
    if isinstance(movies, pd.DataFrame):
        found, name = _of_frame(movies, raw_items), "movies"
    else:
        name = name or str(movies)
        found = read_movies(movies, name, IdKind.INTEGER if raw_items.dtype == np.int64 else IdKind.TEXT)
    matched = int(np.isin(raw_items, found[ITEM].to_numpy()).sum())
    if not matched and not others:
        raise DataError(
            f"{name}: none of its {len(found)} ids, such as {found[ITEM].iloc[0]}, is one of the log's {len(raw_items)}"
            f" items, such as {raw_items[0]}; give the file of these items, or none"
        )
    if matched < FEW_MOVIES * len(raw_items):
        share = f"{matched} of the log's {len(raw_items)} items ({matched / len(raw_items):.1%})"
        return found, [f"{name} knows {share}; check that it is the file of these items"]
    return found, []


def joined_genres(texts: Sequence[object]) -> list[str]:
    """Genres joined by `|`, of the ways that people write them in one column.

    Args:
        texts: Lists; or texts: a JSON or Python list of names (or of objects with a `name`), or names with a separator:
            the first of `|`, `;` and `,` that occurs in any of them.

    Returns:
        One text for each; a `|` within a name becomes `/`.

    Examples:
        >>> joined_genres(["Comedy, Drama", "Horror"])
        ['Comedy|Drama', 'Horror']
        >>> joined_genres(["['Comedy', 'Drama']", '[{"name": "War"}]', "[]"])
        ['Comedy|Drama', 'War', '']
    """
    lists = [listed(text) for text in texts]
    plain = [str(text) for text, of_list in zip(texts, lists, strict=True) if of_list is None]
    separator = next((each for each in SEPARATORS if any(each in text for text in plain)), "|")
    joined: list[str] = []
    for text, of_list in zip(texts, lists, strict=True):
        names: list[str] = str(text).split(separator) if of_list is None else of_list
        joined.append("|".join(name.strip().replace("|", "/") for name in names))
    return joined


def listed(value: object) -> list[str] | None:
    """The names of a list, which may be written as JSON or Python write it; None for what is none."""
    if isinstance(value, str):
        text = value.strip()
        if not text.startswith("["):
            return None
        try:
            value = json.loads(text)
        except ValueError:
            try:
                value = ast.literal_eval(text)
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                return None
        except RecursionError:
            return None
    if isinstance(value, list | tuple | set | np.ndarray):
        return [str(each.get("name", "") if isinstance(each, dict) else each) for each in value]
    return [] if value is None or value is pd.NA or isinstance(value, float) else None


def _of_frame(frame: pd.DataFrame, raw_items: np.ndarray) -> pd.DataFrame:
    """The columns item_id, title and genres of a frame."""
    chosen = movie_columns([str(column) for column in frame.columns], "movies")
    found = pd.DataFrame({ITEM: frame[chosen[ITEM]].reset_index(drop=True)})
    ids = checked_ids(found, raw_items, "movies", chosen[ITEM])[ITEM]
    titles = ids.astype(str)
    if TITLE in chosen:
        given = frame[chosen[TITLE]].reset_index(drop=True)
        titles = given.astype(object).where(given.notna(), titles)
    genres = joined_genres(frame[chosen[GENRES]].tolist() if GENRES in chosen else [""] * len(frame))
    for row, (title, joined) in enumerate(zip(titles, genres, strict=True), start=1):
        require_utf8([(TITLE, str(title)), (GENRES, joined)], f"movies: row {row}")
    return pd.DataFrame({ITEM: ids, TITLE: titles, GENRES: genres})


def typed_ids(raw: list[tuple[int, str]], kind: IdKind, name: str) -> np.ndarray:
    """[rows] int64, or object for text: the ids of the lines of a file that messages call `name`.

    Raises DataError where `kind` is INTEGER and an id is no whole number; where it is AUTO all are text then.
    """
    odd = next(((line, text) for line, text in raw if not _is_whole(text)), None)
    if kind is IdKind.TEXT or (odd is not None and kind is IdKind.AUTO):
        return np.array([text for _, text in raw], dtype=object)
    if odd is not None:
        raise DataError(f"{name}:{odd[0]}: movieId {odd[1]} is not a whole number, as those of the ratings are")
    return np.array([int(text) for _, text in raw], dtype=np.int64)


def _is_whole(text: str) -> bool:
    return len(text) <= 18 and text.removeprefix("-").isdecimal() and text == str(int(text))


def _text_rows(path: Path, name: str) -> Iterator[MovieRow]:
    with tempfile.TemporaryDirectory(prefix="jaxrec-") as scratch:

        def choose(dialect: Dialect) -> tuple[dict[str, int], dict[str, str]]:
            names = dialect.names or ()
            labels = movie_columns(names, name if dialect.delimiter is None else f"{name}:1")
            return {role: names.index(label) for role, label in labels.items()}, labels

        table, _ = open_text(path, name, TextOptions(), Path(scratch), choose, True, "movieId,title,genres")
        at = table.columns
        for line, fields in records(table, refuse, lists=True):
            title, genres = (fields[at[role]] if role in at else "" for role in (TITLE, GENRES))
            yield line, fields[at[ITEM]].strip(), title, genres


def refuse(row: BadRow) -> None:
    """Raises DataError for a row that is not whole."""
    raise DataError(str(row))


def _dat_rows(path: Path, name: str) -> Iterator[MovieRow]:
    for line, text in _old_lines(path):
        fields = text.split("::")
        if len(fields) != 3:
            raise DataError(f"{name}:{line}: {len(fields)} fields, expected 3 (id::title::genres)")
        yield line, fields[0].strip(), fields[1], fields[2]


def _u_item_rows(path: Path, name: str) -> Iterator[MovieRow]:
    for line, text in _old_lines(path):
        fields = text.split("|")
        if len(fields) != U_ITEM_FIELDS:
            raise DataError(f"{name}:{line}: {len(fields)} fields, expected {U_ITEM_FIELDS}")
        flags = fields[-len(U_ITEM_GENRES) :]
        genres = [genre for genre, flag in zip(U_ITEM_GENRES, flags, strict=True) if flag.strip() == "1"]
        yield line, fields[0].strip(), fields[1], "|".join(genres) or NO_GENRES


def _old_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of MovieLens' older files, which are Latin-1, or UTF-8."""
    encoding = "utf-8" if scan(path).encoding == "utf-8" else "latin-1"
    with open(path, encoding=encoding, newline="\n") as file:
        for number, line in enumerate(file, start=1):
            text = line.rstrip("\r\n")
            if text:
                yield number, text
