"""What every later stage reads: catalogue, users, histories and split of one log."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from jaxrec.config import PrepareConfig, RatingScale
from jaxrec.data.catalog import Catalog
from jaxrec.data.encoding import ColumnEncoding
from jaxrec.data.histories import BLOCK_EVENTS, EventLog, Histories, blocks, release
from jaxrec.data.ids import IdMap
from jaxrec.data.split import Split


@dataclasses.dataclass(frozen=True)
class PreparedData:
    """What every later stage reads. `config.rating_scale` is the scale in force; None where there are no ratings.

    Attributes:
        log: Every event that was read, before the filters, for `append`; None: not kept.
        movies: All movies that were given, not only those of the catalogue, for `append`; a path: the file that
            `jaxrec.data.store.all_movies` reads them from when they are needed.
        input: Counts of what was read, as JSON values.
        features: What else is known of items: item_id and columns of text, of all items that were given; None: nothing
            (`jaxrec.data.content.item_content` makes a matrix of it).
        columns: How the columns of `features` are encoded; what `append` makes of this data keeps it. None: not fitted
            yet, so that it follows from `features` and the training events.
        popularity: [items + 1] int64, training events per item of the whole that this is a part of; None: it is whole.
        folder: Where exactly this data, or its shards, lie; None in memory, and for what `dataclasses.replace` makes of
            it.
        digest: SHA-256 of the folder's summary file when it was read.
    """

    catalog: Catalog
    users: IdMap
    histories: Histories
    split: Split
    config: PrepareConfig
    log: EventLog | None = None
    movies: pd.DataFrame | Path | None = None
    input: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    features: pd.DataFrame | None = None
    columns: tuple[ColumnEncoding, ...] | None = None
    popularity: np.ndarray | None = None
    folder: Path | None = dataclasses.field(default=None, init=False, compare=False)
    digest: str = dataclasses.field(default="", init=False, compare=False)

    def unit_ratings(self, rows: np.ndarray | slice = slice(None)) -> np.ndarray:
        """[events], or the shape of `rows`, float32: ratings scaled to 0..1, MISSING_RATING where there is none."""
        scale = self.config.rating_scale or RatingScale(0.0, 1.0)
        return scale.to_unit(self.histories.ratings[rows])

    def train_popularity(self) -> np.ndarray:
        """[items + 1] int64: training events per item, of the whole where this is a part."""
        return self.own_popularity() if self.popularity is None else self.popularity

    def own_popularity(self) -> np.ndarray:
        """[items + 1] int64: training events per item of these histories alone."""
        counts = np.zeros(len(self.catalog) + 1, np.int64)
        for block in blocks(self.histories.offsets):
            items = self.histories.items[block.rows]
            trains = block.positions() < block.per_event(self.split.train_counts[block.users])
            counts += np.bincount(items[trains], minlength=len(counts))
            release(self.histories.items)
        return counts

    def summary(self) -> dict[str, Any]:
        """Counts that describe the data, as JSON values."""
        firsts, lasts = [], []
        for start in range(0, self.histories.event_count, BLOCK_EVENTS):
            times = self.histories.times[start : start + BLOCK_EVENTS]
            firsts.append(int(times.min()))
            lasts.append(int(times.max()))
            release(times)
        return {
            "users": len(self.users),
            "items": len(self.catalog),
            "events": self.histories.event_count,
            "training_events": int(self.split.train_counts.sum()),
            "validation_cases": len(self.split.validation),
            "test_cases": len(self.split.test),
            "genres": len(self.catalog.genres),
            "first_time": min(firsts, default=None),
            "last_time": max(lasts, default=None),
        }


AddFiles = Callable[[PreparedData, Path], object]
