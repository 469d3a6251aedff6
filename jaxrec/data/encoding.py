"""How a column of `--features` becomes features: its kind, and its categories or bins, fitted once and kept.

A column is numeric where every value of the items with training events is a finite number, multi-valued where one of
them holds a `|` (a list of one value ends with it), and else categorical. Vocabulary and bins are fitted on the items
with training events only. Data that is extended keeps all of it: the same number is in the same bin, and new categories
join those that are known.
"""

import dataclasses
import enum
import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

NUMERIC_BINS = 10
LEAST_ITEMS = 2  # items with training events that share a category; of a category of one item nothing is learned
MOST_CATEGORIES = 500  # of a column, the most frequent ones: more cost time, and are those of few items
MOST_EXACT = 2**53  # whole numbers below it are exact as float64


class Kind(enum.StrEnum):
    """What the values of a column are."""

    NUMERIC = "numeric"
    CATEGORICAL = "categorical"
    MULTI_VALUED = "multi-valued"


@dataclasses.dataclass(frozen=True)
class ColumnEncoding:
    """A column that is fitted.

    Attributes:
        name: Of the column.
        kind: What its values are.
        categories: Of a column that is not numeric, sorted; each is one feature.
        starts: Of a numeric column: the smallest value of each bin, rising; each bin is one feature. A value below the
            first start is in the first bin.
        whole: All values that the bins were fitted to are whole numbers.
    """

    name: str
    kind: Kind
    categories: tuple[str, ...] = ()
    starts: tuple[float, ...] = ()
    whole: bool = False

    @property
    def features(self) -> tuple[str, ...]:
        """The features' names. Those of bins hold the exact edges; in bins of whole numbers, a value with a fraction
        counts by its whole part.

        Examples:
            >>> ColumnEncoding("year", Kind.NUMERIC, starts=(1990, 1995, 1996), whole=True).features
            ('year up to 1994', 'year 1995', 'year 1996 and above')
            >>> ColumnEncoding("size", Kind.NUMERIC, starts=(0.5, 1.0, 2.5)).features
            ('size below 1.0', 'size 1.0 to below 2.5', 'size 2.5 and above')
        """
        if self.kind is not Kind.NUMERIC:
            return tuple(f"{self.name}={category}" for category in self.categories)
        if len(self.starts) == 1:
            return (f"{self.name}: any number",)
        edges = [int(start) if self.whole else float(start) for start in self.starts]
        names = []
        for at, (start, end) in enumerate(itertools.pairwise(edges)):
            last = end - 1
            if not self.whole:
                names.append(f"{self.name} below {end}" if at == 0 else f"{self.name} {start} to below {end}")
            elif at == 0:
                names.append(f"{self.name} up to {last}")
            else:
                names.append(f"{self.name} {start}" if last == start else f"{self.name} {start} to {last}")
        return (*names, f"{self.name} {edges[-1]} and above")

    def cells(self, values: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Which features the items have.

        Args:
            values: One text per item; empty: missing.

        Returns:
            Items and features, [ones] int64 each: the places of the ones in a matrix [items, features].
        """
        if self.kind is Kind.NUMERIC:
            numbers = np.array([_number(_only(value)) for value in values])
            rows = np.flatnonzero(~np.isnan(numbers))
            return rows, np.maximum(np.searchsorted(self.starts, numbers[rows], side="right") - 1, 0)
        place = {category: at for at, category in enumerate(self.categories)}
        ones = [
            (row, place[category])
            for row, value in enumerate(values)
            for category in self.parts(value)
            if category in place
        ]
        rows, columns = np.array(ones, np.int64).reshape(-1, 2).T
        return rows, columns

    def parts(self, value: str) -> list[str]:
        """The different categories of a value of a column that is not numeric, in their order."""
        parts = value.split("|") if self.kind is Kind.MULTI_VALUED else [_only(value)]
        return [part for part in dict.fromkeys(map(str.strip, parts)) if part]

    def unknown(self, values: Sequence[str]) -> list[str]:
        """The different values that no feature stands for, in the order in which they come; they count as missing.

        Examples:
            >>> ColumnEncoding("tags", Kind.MULTI_VALUED, ("x", "y")).unknown(["x|z", "", "w|z", "y"])
            ['z', 'w']
            >>> ColumnEncoding("size", Kind.NUMERIC, starts=(1.0,)).unknown(["1", "large", "", "7"])
            ['large']
        """
        if self.kind is Kind.NUMERIC:
            return list(dict.fromkeys(value for value in map(_only, values) if value and math.isnan(_number(value))))
        found = dict.fromkeys(itertools.chain.from_iterable(map(self.parts, values)))
        return list(dict.fromkeys([*self.categories, *found]))[len(self.categories) :]


def fit_column(
    name: str,
    values: Sequence[str],
    fitted: np.ndarray,
    known: ColumnEncoding | None = None,
    bins: int = NUMERIC_BINS,
) -> ColumnEncoding | None:
    """Fits a column, or extends one that is known.

    Args:
        name: Of the column.
        values: One text per item; empty: missing.
        fitted: [items] bool: those that decide the kind, the categories and the bins.
        known: As it was fitted to earlier data. Its kind, its bins and its categories stay; categories that LEAST_ITEMS
            of the `fitted` items share are added, up to MOST_CATEGORIES in all.
        bins: Number of bins that the values of a numeric column are to fill.

    Returns:
        The encoding; None where no fitted item has a value, so that nothing says what kind the column is of.

    Examples:
        >>> first = fit_column("studio", ["A", "B", "A", "B", "C"], np.array([True, True, True, False, True]))
        >>> first.features
        ('studio=A',)
        >>> fit_column("studio", ["C", "C", "B"], np.ones(3, bool), first).features
        ('studio=A', 'studio=C')
        >>> fit_column("length", ["90", "", "120", "95"], np.array([True, True, True, False])).features
        ('length up to 119', 'length 120 and above')
    """
    of_fit = [value for value, chosen in zip(values, fitted, strict=True) if chosen and value]
    if known is None and not of_fit:
        return None
    if known is None and not not_numbers(of_fit):
        numbers = np.array([_number(value) for value in of_fit])
        whole = bool(((numbers == np.floor(numbers)) & (np.abs(numbers) < MOST_EXACT)).all())
        return ColumnEncoding(name, Kind.NUMERIC, starts=tuple(bin_starts(numbers, bins).tolist()), whole=whole)
    if known is None:
        known = ColumnEncoding(name, Kind.MULTI_VALUED if any("|" in value for value in of_fit) else Kind.CATEGORICAL)
    if known.kind is Kind.NUMERIC:
        return known
    counts = Counter(itertools.chain.from_iterable(map(known.parts, of_fit)))
    held = set(known.categories)
    shared = [(-count, part) for part, count in counts.items() if count >= LEAST_ITEMS and part not in held]
    added = [category for _, category in sorted(shared)[: max(0, MOST_CATEGORIES - len(held))]]
    return dataclasses.replace(known, categories=tuple(sorted([*held, *added])))


def not_numbers(values: Sequence[str]) -> list[str]:
    """Those of the values that are no finite numbers.

    Examples:
        >>> not_numbers(["90", "-1.5e3", "about 90", "1_2", "inf", "90|"])
        ['about 90', '1_2', 'inf', '90|']
    """
    return [value for value in values if math.isnan(_number(value))]


def encoding_from_json(values: Mapping[str, Any]) -> ColumnEncoding:
    """What `dataclasses.asdict` made of an encoding. Raises KeyError, TypeError or ValueError for anything else."""
    return ColumnEncoding(
        str(values["name"]),
        Kind(values["kind"]),
        tuple(map(str, values["categories"])),
        tuple(map(float, values["starts"])),
        bool(values["whole"]),
    )


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


def _number(text: str) -> float:
    """NaN for what is no finite number, also for digits with underscores, which only programs write."""
    try:
        value = math.nan if "_" in text else float(text)
    except ValueError:
        return math.nan
    return value if math.isfinite(value) else math.nan


def _only(value: str) -> str:
    """The value of a list of one; any other value as it is."""
    return value.removesuffix("|")
