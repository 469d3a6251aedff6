"""What is known of the items besides their events, as one binary matrix: genres, the columns of `--features`, years.

A column of `--features` is numeric where every value of the items with training events is a finite number, multi-valued
where one of them holds a `|`, and else categorical. Vocabulary and bins are fitted on the items with training events
only; what a new item has beside them is as if it were missing: all zero.
"""

import dataclasses
import itertools
import math
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from jaxrec.data.prepared import PreparedData
from jaxrec.data.schema import ITEM

YEAR = re.compile(r"\(((?:18|19|20)\d\d)\)\s*$")
YEAR_BINS, NUMERIC_BINS = 30, 10
LEAST_YEARS = 0.1  # share of the items with training events whose titles must have a year
LEAST_ITEMS = 2  # items with training events that share a category; of a category of one item nothing is learned
MOST_CATEGORIES = 500  # of a column, the most frequent ones: more cost time, and are those of few items


@dataclasses.dataclass(frozen=True)
class ItemContent:
    """The features of all items.

    Attributes:
        names: One for each column of the matrix: genres, then the columns of `--features`, then years.
        matrix: [items + 1, features] float32 of 0 and 1; row 0 (padding) is zero.
        model_features: How many of them, from the first, the content model reads.
        left_out: Columns of `--features` without a feature that two items share.
    """

    names: tuple[str, ...]
    matrix: np.ndarray
    model_features: int
    left_out: tuple[str, ...]

    @property
    def model_names(self) -> tuple[str, ...]:
        """The features that the content model reads."""
        return self.names[: self.model_features]

    def model_matrix(self) -> np.ndarray:
        """[items + 1, max(1, model_features)] float32: what the content model reads; one zero column for nothing."""
        if not self.model_features:
            return np.zeros((len(self.matrix), 1), np.float32)
        return self.matrix[:, : self.model_features]


def item_content(data: PreparedData) -> ItemContent:
    """The features of the items of prepared data.

    The content model reads genres and the columns of `--features`; years are for new items alone
    (`jaxrec.training.content_head`): as an input of the content model they cost known items NDCG.
    """
    catalog = data.catalog
    fitted = data.train_popularity()[1:] > 0
    names, parts, left_out = list(catalog.genres), [catalog.genre_matrix()[1:, : len(catalog.genres)]], []
    if data.features is not None:
        table = data.features.set_index(ITEM).reindex(catalog.ids.raw_ids).fillna("")
        for column in table.columns:
            of_column, matrix = encode_column(column, table[column].tolist(), fitted)
            names += of_column
            parts.append(matrix)
            if not of_column:
                left_out.append(column)
    model_features = len(names)
    found = [YEAR.search(title) for title in catalog.titles]
    years = np.array([float(match[1]) if match else np.nan for match in found])
    if (~np.isnan(years[fitted])).sum() > LEAST_YEARS * fitted.sum():
        of_years, matrix = _binned("year", years, fitted, YEAR_BINS)
        names += of_years
        parts.append(matrix)
    rows = np.concatenate(parts, axis=1)
    whole = np.concatenate([np.zeros((1, rows.shape[1]), np.float32), rows])
    return ItemContent(tuple(names), whole, model_features, tuple(left_out))


def encode_column(name: str, values: Sequence[str], fitted: np.ndarray) -> tuple[list[str], np.ndarray]:
    """One column of `--features` as features.

    Args:
        name: Of the column.
        values: One text per item; empty: missing.
        fitted: [items] bool: those that decide the kind, the vocabulary and the bins.

    Returns:
        The features' names, and [items, features] float32 of 0 and 1.

    Examples:
        >>> encode_column("studio", ["A", "B", "A", "B", "C"], np.array([True, True, True, False, True]))[0]
        ['studio=A']
        >>> names, matrix = encode_column("length", ["90", "", "120", "95"], np.array([True, True, True, False]))
        >>> names, matrix.tolist()
        (['length from 90', 'length from 120'], [[1.0, 0.0], [0.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    """
    known = [value for value, of_fit in zip(values, fitted, strict=True) if of_fit and value]
    if known and all(not math.isnan(_number(value)) for value in known):
        return _binned(name, np.array([_number(value) for value in values]), fitted, NUMERIC_BINS)
    several = any("|" in value for value in known)
    lists = [{part.strip() for part in (value.split("|") if several else [value])} - {""} for value in values]
    counts = Counter(itertools.chain.from_iterable(lists[item] for item in np.flatnonzero(fitted)))
    shared = [(-count, category) for category, count in counts.items() if count >= LEAST_ITEMS]
    categories = sorted(category for _, category in sorted(shared)[:MOST_CATEGORIES])
    place = {category: at for at, category in enumerate(categories)}
    matrix = np.zeros((len(values), len(categories)), np.float32)
    for row, of_item in enumerate(lists):
        matrix[row, [place[category] for category in of_item if category in place]] = 1
    return [f"{name}={category}" for category in categories], matrix


def bin_starts(values: np.ndarray, bins: int) -> np.ndarray:
    """Where bins of about equally many values begin.

    A value that fills a bin by itself has one of its own, and up to `bins` different values have one each: among the
    years of movies the recent ones matter singly.

    Args:
        values: [n] float, finite.
        bins: Number of bins that `values` are to fill.

    Returns:
        [at most 2 * bins] the smallest value of each bin, rising.

    Examples:
        >>> bin_starts(np.array([1.0, 2.0, 3.0, 4.0, 5.0, 5.0, 5.0, 6.0]), bins=4).tolist()
        [1.0, 3.0, 5.0, 6.0]
    """
    different, counts = np.unique(values, return_counts=True)
    if len(different) <= bins:
        return different
    full = len(values) / bins
    starts, held = [], np.inf
    for value, count in zip(different.tolist(), counts.tolist(), strict=True):
        if held >= full or count >= full:
            starts.append(value)
            held = 0
        held += count
    return np.array(starts)


def _binned(name: str, values: np.ndarray, fitted: np.ndarray, bins: int) -> tuple[list[str], np.ndarray]:
    """`values` [items] float, NaN: missing. A value below the first bin is in the first one."""
    starts = bin_starts(values[fitted & ~np.isnan(values)], bins)
    place = np.maximum(np.searchsorted(starts, values, side="right") - 1, 0)
    matrix = (place[:, None] == np.arange(len(starts))) & ~np.isnan(values)[:, None]
    return [f"{name} from {start:g}" for start in starts], matrix.astype(np.float32)


def _number(text: str) -> float:
    """NaN for what is no finite number."""
    try:
        value = float(text)
    except ValueError:
        return math.nan
    return value if math.isfinite(value) else math.nan
