"""The items: raw ids, titles, genres, and the binary item-by-genre matrix."""

import dataclasses
import functools
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd

from jaxrec.data.ids import IdMap
from jaxrec.data.schema import GENRES, ITEM, NO_GENRES, TITLE, is_missing
from jaxrec.errors import DataError


@dataclasses.dataclass(frozen=True)
class Catalog:
    """Items by index. `titles` and `item_genres` have one entry per item, so index i is at position i - 1."""

    ids: IdMap
    titles: tuple[str, ...]
    item_genres: tuple[tuple[str, ...], ...]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def genres(self) -> tuple[str, ...]:
        """All genres of the catalogue, sorted."""
        return tuple(sorted({genre for genres in self.item_genres for genre in genres}))

    def genre_matrix(self) -> np.ndarray:
        """[items + 1, genres] float32 of 0 and 1; row 0 (padding) is zero. One zero column if there are no genres."""
        column = {genre: j for j, genre in enumerate(self.genres)}
        matrix = np.zeros((len(self) + 1, max(1, len(column))), np.float32)
        for row, genres in enumerate(self.item_genres, start=1):
            matrix[row, [column[genre] for genre in genres]] = 1
        return matrix

    def to_frame(self) -> pd.DataFrame:
        """Columns item_id, title, genres (joined by `|`), in the order of the indices."""
        joined = ["|".join(genres) for genres in self.item_genres]
        return pd.DataFrame({ITEM: self.ids.raw_ids, TITLE: list(self.titles), GENRES: joined})


@functools.lru_cache(maxsize=100_000)
def split_genres(text: str) -> tuple[str, ...]:
    """Genres of MovieLens' `A|B` notation, sorted and distinct; "(no genres listed)" is no genre, nor is a word that
    means that there is none (`jaxrec.data.schema.MISSING`).

    Examples:
        >>> split_genres("War|Drama|War"), split_genres("(no genres listed)"), split_genres("N/A")
        (('Drama', 'War'), (), ())
    """
    return tuple(sorted({genre.strip() for genre in text.split("|") if not is_missing(genre)} - {NO_GENRES}))


def build_catalog(ids: IdMap, movies: pd.DataFrame | None) -> Catalog:
    """The catalogue of the given ids.

    Args:
        ids: Its items.
        movies: item_id (of the type of `ids`), title and genres (joined by `|`) of these and other items. An item that
            it lacks is titled by its id and has no genres.

    Raises:
        DataError: For a catalogue of a single item.
    """
    titles = tuple(str(raw) for raw in ids.raw_ids)
    genres: tuple[tuple[str, ...], ...] = ((),) * len(ids)
    if movies is not None:
        known = movies.set_index(ITEM).reindex(ids.raw_ids)
        titles = tuple(raw if pd.isna(title) else title for raw, title in zip(titles, known[TITLE], strict=True))
        genres = tuple(() if pd.isna(text) else split_genres(text) for text in known[GENRES])
    if len(ids) == 1:
        raise DataError(f"only one item is left ({titles[0]}); a recommender needs at least two")
    return Catalog(ids, titles, genres)


def catalog_items(kept: np.ndarray, min_ratings: int, *tables: pd.DataFrame | None) -> np.ndarray:
    """Sorted raw ids of the catalogue: those of the `kept` items, and of all items of `tables` where the threshold is
    0."""
    given = [table[ITEM].to_numpy() for table in tables if table is not None and min_ratings == 0]
    return np.unique(np.concatenate([kept, *given]))


def checked_ids(rows: pd.DataFrame, raw_items: np.ndarray, name: str, column: str) -> pd.DataFrame:
    """Rows of a frame with ids of the type of a log's.

    Args:
        rows: item_id and others.
        raw_items: [items] int64, or object (str): the ids of the log.
        name: What messages call the frame.
        column: What the frame itself calls the column of the ids.

    Returns:
        The rows, their item_id of the type of `raw_items`.

    Raises:
        DataError: For an id that is not of the log's type (a whole number of 64 bits, or text), is empty, or occurs
            twice; the message names its row, from 1.
    """
    whole = raw_items.dtype == np.int64
    is_id = _is_whole if whole else _is_text
    odd = [(row, value) for row, value in enumerate(rows[ITEM].tolist(), start=1) if not is_id(value)]
    if odd:
        # Beside a missing id, pandas makes floats of whole numbers: then the missing one is at fault.
        row, value = next((each for each in odd if pd.api.types.is_scalar(each[1]) and pd.isna(each[1])), odd[0])
        expected = "a whole number of 64 bits" if whole else "text that is not empty"
        raise DataError(f"{name}: row {row}: {column} is {value!r}; expected {expected}, as in the interactions")
    if not whole:
        for row, value in enumerate(rows[ITEM].tolist(), start=1):
            require_utf8([(column, value)], f"{name}: row {row}")
    repeated = np.flatnonzero(rows[ITEM].duplicated())
    if len(repeated):
        raise DataError(f"{name}: row {repeated[0] + 1}: {column} {rows[ITEM].iloc[repeated[0]]} occurs twice")
    return rows.astype({ITEM: np.int64 if whole else object})


def _is_whole(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and -(2**63) <= int(value) < 2**63


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def require_utf8(values: Iterable[tuple[str, str]], where: str) -> None:
    """Refuses text that no file can hold.

    Args:
        values: Pairs of a column's name and a text.
        where: What the message begins with: a file and line, or a frame and row.

    Raises:
        DataError: For half of a surrogate pair, such as the escape \\ud800 in JSON.
    """
    for name, text in values:
        if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
            raise DataError(f"{where}: {name} {text!a} holds half of a surrogate pair; expected Unicode text")


def write_catalog(catalog: Catalog, path: Path) -> None:
    """Writes the catalogue as JSON: item_id, title, genres, each a list in the order of the indices."""
    frame = catalog.to_frame()
    path.write_text(json.dumps({name: frame[name].tolist() for name in frame}, ensure_ascii=False), encoding="utf-8")


def read_catalog(path: Path) -> Catalog:
    """Reads what `write_catalog` wrote. Raises DataError on a broken file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        raw, titles, genres = (content[name] for name in (ITEM, TITLE, GENRES))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path}: not a catalogue written by `jaxrec prepare`: {error}") from error
    text = any(isinstance(item, str) for item in raw)
    ids = IdMap(np.array(raw, dtype=object if text else np.int64))
    return Catalog(ids, tuple(titles), tuple(map(split_genres, genres)))
