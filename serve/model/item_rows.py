"""What ranks items that a model was not exported with: their vectors and biases, from what a store says of them.

They are sums over the features of an item, as the export's content heads have them: tags that were genres, the columns
of `--features` by the keys of the metadata, and the year at the end of the title.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

YEAR = re.compile(r"\(((?:18|19|20)\d\d)\)\s*$")
KINDS = NUMERIC, CATEGORICAL, MULTI_VALUED = "numeric", "categorical", "multi-valued"


class Column(NamedTuple):
    """How the texts of one key of the metadata become features."""

    name: str
    kind: str
    places: Mapping[str, int]
    """Of the categories; empty for numbers."""
    starts: tuple[float, ...]
    """The smallest number of each bin, rising; what is below the first is in the first bin."""

    @property
    def feature_count(self) -> int:
        """Features of the column."""
        return len(self.starts) if self.kind == NUMERIC else len(self.places)

    def features(self, text: str) -> list[int]:
        """Places among the column's features; none for a text that no feature stands for.

        >>> Column("length", NUMERIC, {}, (0.0, 90.0, 120.0)).features("95|")
        [1]
        >>> Column("studio", MULTI_VALUED, {"A": 0, "B": 1}, ()).features("B| C|A")
        [1, 0]
        """
        if self.kind == NUMERIC:
            number = _number(text.removesuffix("|"))
            return [] if math.isnan(number) else [max(int(np.searchsorted(self.starts, number, "right")) - 1, 0)]
        parts = text.split("|") if self.kind == MULTI_VALUED else [text.removesuffix("|")]
        return [self.places[part] for part in dict.fromkeys(map(str.strip, parts)) if part in self.places]


class ItemRows(NamedTuple):
    """What features add to the vectors and biases of items."""

    rows: NDArray[np.float32]
    """`[features+1, width+1]`, not writeable: of each feature a vector and, last, a bias; the last row is every
    item's."""
    genres: Mapping[str, int]
    """Places of the genres among the features."""
    columns: Sequence[Column]
    """Their features come after the genres, in this order."""
    title_years: tuple[float, ...]
    """The first year of each bin; their features are the last."""

    def row(self, title: str, tags: Sequence[str], metadata: Mapping[str, str]) -> NDArray[np.float32]:
        """`[width+1]`: the vector and the bias of an item."""
        features = [self.genres[tag] for tag in tags if tag in self.genres]
        start = len(self.genres)
        for column in self.columns:
            features += [start + at for at in column.features(metadata.get(column.name, ""))]
            start += column.feature_count
        year = YEAR.search(title) if self.title_years else None
        if year is not None:
            features.append(start + max(int(np.searchsorted(self.title_years, int(year[1]), "right")) - 1, 0))
        found: NDArray[np.float32] = self.rows[[*features, -1]].sum(axis=0)
        return found


def _number(text: str) -> float:
    """NaN for what is no finite number, also for digits with underscores, which only programs write."""
    try:
        value = math.nan if "_" in text else float(text)
    except ValueError:
        return math.nan
    return value if math.isfinite(value) else math.nan
