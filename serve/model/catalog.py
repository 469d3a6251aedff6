"""The items of a model: raw ids, titles, genres, popularity and which are new, by item index."""

import csv
import io
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

COLUMNS = ["item_id", "title", "genres", "popularity", "recent_popularity", "new"]


class CatalogError(ValueError):
    """A catalogue file breaks the contract; the message starts with the line."""


@dataclass(frozen=True, slots=True)
class Catalog:
    """Columns of `catalog.csv`, each with padding at index 0 and items from index 1."""

    item_ids: tuple[str, ...]
    titles: tuple[str, ...]
    genres: tuple[tuple[str, ...], ...]
    popularity: NDArray[np.int64]
    """`[items+1]`, events per item in the training data."""
    recent_popularity: NDArray[np.float64]
    """`[items+1]`, events per item with a weight that decays with their age."""
    by_popularity: NDArray[np.int32]
    """`[items]`, item indices, most popular first, ties by recent popularity, then by item index."""
    new: NDArray[np.bool_]
    """`[items+1]`, items that the model was not trained on (`jaxrec.models.new_items`)."""
    index: Mapping[str, int]
    """Item index by raw id; ids that the model does not know are missing."""

    def __len__(self) -> int:
        return len(self.item_ids) - 1


def parse_catalog(text: str) -> Catalog:
    """Reads the text of `catalog.csv`; raises CatalogError on the first bad line."""
    reader = csv.reader(io.StringIO(text, newline=""))
    header = next(reader, [])
    if header != COLUMNS:
        raise CatalogError(f"1: expected the columns {','.join(COLUMNS)}, found {','.join(header)}")
    item_ids, titles = [""], [""]
    genres: list[tuple[str, ...]] = [()]
    popularity, recent_popularity, new = [0], [0.0], [False]
    index: dict[str, int] = {}
    for row in reader:
        line = reader.line_num
        if len(row) != len(COLUMNS):
            raise CatalogError(f"{line}: expected {len(COLUMNS)} fields, found {len(row)}")
        item_id, title, joined_genres, count, recent_count, is_new = row
        if not item_id or item_id in index:
            raise CatalogError(f"{line}: item_id {item_id!r} is empty or was used before")
        index[item_id] = len(item_ids)
        item_ids.append(item_id)
        titles.append(title)
        genres.append(tuple(sorted(sys.intern(genre) for genre in joined_genres.split("|") if genre)))
        popularity.append(_count(count, line))
        recent_popularity.append(_weight(recent_count, line))
        if is_new not in ("0", "1"):
            raise CatalogError(f"{line}: new {is_new!r} is neither 0 nor 1")
        new.append(is_new == "1")
    counts, recent = np.array(popularity, np.int64), np.array(recent_popularity, np.float64)
    return Catalog(
        item_ids=tuple(item_ids),
        titles=tuple(titles),
        genres=tuple(genres),
        popularity=counts,
        recent_popularity=recent,
        new=np.array(new, np.bool_),
        by_popularity=(np.lexsort((-recent[1:], -counts[1:])) + 1).astype(np.int32),
        index=index,
    )


def _count(text: str, line: int) -> int:
    if not (text.isascii() and text.isdecimal()):
        raise CatalogError(f"{line}: popularity {text!r} is not a whole number from 0 on")
    return int(text)


def _weight(text: str, line: int) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not 0 <= weight < math.inf:
        raise CatalogError(f"{line}: recent_popularity {text!r} is not a finite number from 0 on")
    return weight
