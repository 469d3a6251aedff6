"""What is known of the items besides their events, as one binary matrix: genres, the columns of `--features`, years.

How a column becomes features: `jaxrec.data.encoding`. What is missing, or is no feature, is all zero.
"""

import dataclasses
import re
from collections.abc import Sequence

import numpy as np
import pandas as pd

from jaxrec.data.encoding import LEAST_ITEMS, MOST_CATEGORIES, ColumnEncoding, Kind, fit_column, not_numbers
from jaxrec.data.prepared import PreparedData
from jaxrec.data.schema import ITEM
from jaxrec.errors import DataError

YEAR = re.compile(r"\(((?:18|19|20)\d\d)\)\s*$")
YEAR_BINS = 30
FEW_ODD = 0.1  # share of values that are no numbers up to which a column was probably meant to be numeric
LEAST_YEARS = 0.1  # share of the items with training events whose titles must have a year
MOST_CELLS = 100_000_000  # items times features: a matrix of 0.4 GB, of which training holds several


@dataclasses.dataclass(frozen=True)
class ItemContent:
    """The features of all items.

    Attributes:
        names: One for each column of the matrix: genres, then the columns of `--features`, then years of titles.
        matrix: [items + 1, features] float32 of 0 and 1; row 0 (padding) is zero.
        model_features: How many of them, from the first, the content model reads.
        columns: How the columns of `--features` are encoded.
        title_years: How the years of titles are encoded; None: no feature says them.
    """

    names: tuple[str, ...]
    matrix: np.ndarray
    model_features: int
    columns: tuple[ColumnEncoding, ...] = ()
    title_years: ColumnEncoding | None = None

    def model_matrix(self) -> np.ndarray:
        """[items + 1, max(1, model_features)] float32: what the content model reads; one zero column for nothing."""
        if not self.model_features:
            return np.zeros((len(self.matrix), 1), np.float32)
        return self.matrix[:, : self.model_features]


def item_content(data: PreparedData) -> ItemContent:
    """The features of the items of prepared data.

    The content model reads genres and the columns of `--features`. It does not read the years of titles, since they
    lowered its NDCG for known items; only the content heads do, which give new items their vectors
    (`jaxrec.training.content_head`).

    Args:
        data: Its `columns` say how the columns of `--features` are encoded; where they are None they are fitted here.

    Returns:
        The names of the features and their matrix.

    Raises:
        DataError: The matrix of `--features` would have more than MOST_CELLS cells.
    """
    catalog, columns = data.catalog, _columns(data)
    names, ones = list(catalog.genres), []
    place = {genre: at for at, genre in enumerate(names)}
    pairs = [(row, place[genre]) for row, genres in enumerate(catalog.item_genres) for genre in genres]
    ones.append(np.array(pairs, np.int64).reshape(-1, 2).T)
    texts = _texts(data)
    for column in columns:
        rows, of_features = column.cells(texts[column.name])
        ones.append(np.stack([rows, of_features + len(names)]))
        names += column.features
    model_features = len(names)
    found = [YEAR.search(title) for title in catalog.titles]
    years, fitted = [match[1] if match else "" for match in found], _fitted(data)
    with_year = sum(bool(year) for year, of_fit in zip(years, fitted, strict=True) if of_fit)
    of_titles = fit_column("title year", years, fitted, bins=YEAR_BINS)
    if of_titles is not None and with_year <= LEAST_YEARS * fitted.sum():
        of_titles = None
    if of_titles is not None:
        rows, of_features = of_titles.cells(years)
        ones.append(np.stack([rows, of_features + len(names)]))
        names += of_titles.features
    matrix = np.zeros((len(catalog) + 1, len(names)), np.float32)
    rows, of_features = np.concatenate(ones, axis=1)
    matrix[rows + 1, of_features] = 1
    return ItemContent(tuple(names), matrix, model_features, columns, of_titles)


def model_feature_names(data: PreparedData) -> list[str]:
    """The features that the content model reads, in the order of `ItemContent.names`; without making the matrix."""
    return [*data.catalog.genres, *(name for column in _columns(data) for name in column.features)]


def fit_columns(data: PreparedData, known: Sequence[ColumnEncoding] = ()) -> tuple[ColumnEncoding, ...]:
    """How the columns of `--features` are encoded.

    Args:
        data: With features, or without any.
        known: The encodings of data that `data` extends: they stay as they were, but for categories that are added.

    Returns:
        The encodings, those that are known first; a column without a value of an item with training events has none.

    Raises:
        DataError: The matrix would have more than MOST_CELLS cells; the message names the largest columns.
    """
    if data.features is None:
        return ()
    texts, fitted = _texts(data), _fitted(data)
    of_before = {column.name: column for column in known}
    order = dict.fromkeys([*of_before, *texts])
    fits = [fit_column(name, texts[name], fitted, of_before.get(name)) for name in order]
    columns = tuple(column for column in fits if column is not None)
    count = len(data.catalog.genres) + sum(len(column.features) for column in columns)
    cells = (len(data.catalog) + 1) * count
    if cells > MOST_CELLS:
        largest = sorted(columns, key=lambda column: -len(column.features))[:3]
        names = ", ".join(f"{column.name} ({len(column.features)})" for column in largest)
        raise DataError(
            f"features: {len(data.catalog)} items with {count} features make a matrix of {cells * 4 / 1e9:.1f} GB, "
            f"expected at most {MOST_CELLS * 4 / 1e9:.1f} GB; leave out columns with many categories, such as {names}"
        )
    return columns


def feature_notes(data: PreparedData, given: pd.DataFrame | None, known: Sequence[ColumnEncoding] = ()) -> list[str]:
    """What of the features is not used, and which columns just miss being numeric, each in one sentence.

    Args:
        data: With its `columns`.
        given: item_id and columns that were read; None: none were.
        known: The encodings of data that `data` extends; their kinds were decided before.

    Returns:
        The notes, each of which begins with `features:`.
    """
    if given is None or data.features is None:
        return []
    ids, texts, notes = given[ITEM].to_numpy(), _texts(data), []
    left = ids[data.catalog.ids.encode(ids) == 0]
    if len(left):
        notes.append(
            f"features: {len(left)} of {len(ids)} items, such as {left[0]}, are not in the catalogue; prepare with "
            "--min-movie-ratings 0 to keep items with few events or none"
        )
    columns = {column.name: column for column in _columns(data)}
    fitted, of_before = _fitted(data), {column.name for column in known}
    for name, column in columns.items():
        if column.kind is not Kind.NUMERIC and name not in of_before:
            values = [value for value, of_fit in zip(texts[name], fitted, strict=True) if of_fit and value]
            odd = not_numbers(values)
            if len(odd) <= FEW_ODD * len(values):
                notes.append(
                    f"features: {name}: {column.kind}, since {len(odd)} of {len(values)} values are no numbers, such "
                    f"as {odd[0]!r}"
                )
    idle = [name for name in texts if name not in columns or not columns[name].features]
    if idle:
        notes.append(
            f"features: {', '.join(idle)}: not used, no {LEAST_ITEMS} items with training events share a value"
        )
    for name, column in columns.items():
        if name not in idle and (unknown := column.unknown(texts[name])):
            why = "they are not numbers, as the others are"
            if column.kind is not Kind.NUMERIC:
                why = f"a category needs {LEAST_ITEMS} items with training events, and {MOST_CATEGORIES} are kept"
            notes.append(
                f"features: {name}: {len(unknown)} of its values, such as {unknown[0]!r}, count as missing: {why}"
            )
    return notes


def _columns(data: PreparedData) -> tuple[ColumnEncoding, ...]:
    return fit_columns(data) if data.columns is None else data.columns


def _texts(data: PreparedData) -> dict[str, list[str]]:
    """The values of each column of `--features` [items], "" where there is none."""
    if data.features is None:
        return {}
    table = data.features.set_index(ITEM).reindex(data.catalog.ids.raw_ids, fill_value="")
    return {str(name): table[name].tolist() for name in table.columns}


def _fitted(data: PreparedData) -> np.ndarray:
    """[items] bool: those with training events."""
    return data.train_popularity()[1:] > 0
