"""The answers of a part of the requests, by the engine of `serve`."""

import dataclasses
import functools
import math
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from jaxrec.config import RatingScale
from jaxrec.data.histories import EventLog, user_blocks
from jaxrec.errors import DataError
from jaxrec.files import sha256
from jaxrec.runs.batch.requests import Requests
from serve.model.directory import read_artifact
from serve.model.events import Event
from serve.model.graphs import ProviderError
from serve.model.manifest import MANIFEST, ArtifactError
from serve.model.popular import with_no_hour
from serve.model.recommender import Answer, Query, Recommender
from serve.model.trend import Counted
from serve.settings import Provider, SearchBy

OUTPUT_COLUMNS = ("userId", "rank", "movieId", "score")
ANSWERED_AT_ONCE = 64
# Requests of so many batches are a part. They are sorted by length before they are batched, so that little is padding.
BATCHES_OF_PART = 32
EVENTS_OF_PART = 500_000  # in memory; a longer history is a part of its own
FEW_ITEMS = 0.5  # share of a log's items in the catalogue below which the model is perhaps that of another log
# A model without ratings does not look at those of a log: every number will do.
ANY_RATING = RatingScale(-3e38, 3e38)


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """A model directory, and how it runs. `threads` are those of one run of a graph."""

    directory: Path
    provider: Provider = "auto"
    threads: int = 1
    search: SearchBy = "auto"

    def version(self) -> str:
        """The SHA-256 of the manifest, which has those of the other files. Raises DataError where there is none."""
        file = self.directory / MANIFEST
        try:
            return sha256(file)
        except OSError as error:
            raise DataError(f"{file}: cannot be read: {error.strerror}") from error

    def open(self, moment: int, version: str) -> Recommender:
        """Loads the model, as the server does.

        Args:
            moment: As of when the trend is, in seconds since 1970.
            version: What `version` said before.

        Raises:
            DataError: The directory breaks the contract, cannot run, or has another model by now.
        """
        try:
            artifact = read_artifact(self.directory)
            model = Recommender(artifact, self.provider, self.threads, self.search)
        except (ArtifactError, ProviderError) as error:
            raise DataError(str(error)) from error
        if self.version() != version:
            raise DataError(f"{self.directory}: the model was replaced; the same command begins anew with this one")
        model.use_counts(with_no_hour(artifact.trend.at(moment)), Counted(moment, None))
        return model


@dataclasses.dataclass(frozen=True)
class Scoring:
    """With what all parts of a job are answered.

    Attributes:
        source: The model.
        version: Of `ModelSource.version`.
        moment: As of when the trend is, in seconds since 1970.
        k: Items of an answer, at least 1.
    """

    source: ModelSource
    version: str
    moment: int
    k: int


_loading = threading.Lock()  # a worker of Dask has several threads


def opened(scoring: Scoring) -> Recommender:
    """The model, once for all parts that this process answers. Raises DataError as `ModelSource.open` does."""
    with _loading:
        return _opened(scoring)


def forget_opened() -> None:
    """Frees the model of this process."""
    with _loading:
        _opened.cache_clear()


@functools.lru_cache(maxsize=1)
def _opened(scoring: Scoring) -> Recommender:
    return scoring.source.open(scoring.moment, scoring.version)


def rating_scale(model: Recommender) -> RatingScale:
    """What the ratings of a log must keep."""
    scale = model.info.rating_scale
    return ANY_RATING if scale is None else RatingScale(scale.minimum, scale.maximum)


def notes(model: Recommender, raw_items: np.ndarray) -> list[str]:
    """What is odd about a log with these items, [items] raw ids."""
    known = sum(str(item) in model.catalog.index for item in raw_items)
    if known >= FEW_ITEMS * len(raw_items):
        return []
    share = f"{known} of the log's {len(raw_items)} items, such as {raw_items[0]}"
    return [f"the model knows {share}, and leaves events on others out; check that it is the model of these items"]


def parts_of(asked: Requests) -> Iterator[tuple[int, int]]:
    """Ranges of the requests (first, stop) that cover all: a part each. They follow from the requests alone."""
    bounds = np.concatenate([[0], np.cumsum(asked.stop - asked.first)])
    size = ANSWERED_AT_ONCE * BATCHES_OF_PART
    for begin, end in user_blocks(bounds, EVENTS_OF_PART):
        for first in range(begin, end, size):
            yield first, min(first + size, end)


def text_ids(log: EventLog) -> list[str]:
    """The raw ids of a log's items, as a model has them."""
    return [str(item) for item in log.items.raw_ids]


def answers(
    model: Recommender, asked: Requests, first: int, stop: int, log: EventLog, item_ids: Sequence[str], k: int
) -> list[Answer]:
    """The answers to the requests of a part, in their order. `item_ids`: `text_ids` of the log."""
    queries = [_query(asked, at, log, item_ids, k) for at in range(first, stop)]
    by_length = sorted(range(len(queries)), key=lambda at: len(queries[at].events))
    found: dict[int, Answer] = {}
    for at in range(0, len(queries), ANSWERED_AT_ONCE):
        batch = by_length[at : at + ANSWERED_AT_ONCE]
        found.update(zip(batch, model.recommend([queries[one] for one in batch]), strict=True))
    return [found[at] for at in range(len(queries))]


def _query(asked: Requests, at: int, log: EventLog, item_ids: Sequence[str], k: int) -> Query:
    rows, events = slice(int(asked.first[at]), int(asked.stop[at])), log.events
    columns = (events.items[rows].tolist(), events.ratings[rows].tolist(), events.times[rows].tolist())
    history = [
        Event(item_ids[item - 1], None if math.isnan(rating) else rating, moment)
        for item, rating, moment in zip(*columns, strict=True)
    ]
    return Query(history, k, request_time=None if asked.times is None else int(asked.times[at]))
