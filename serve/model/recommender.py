"""Answers questions in raw ids with one model. Knows no gRPC and keeps nothing between calls."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from serve.model.directory import Artifact
from serve.model.events import Event, KnownEvent, known_events
from serve.model.explain import ASKED_EVENTS, ASKED_ITEMS, Explanation, explain, explain_popularity
from serve.model.features import features
from serve.model.ranking.engine import Engine, Ranking
from serve.model.ranking.search import best_of
from serve.model.trend import Counted
from serve.settings import Provider, SearchBy

POPULARITY = "popularity"


class UnknownItem(LookupError):
    """The model does not know an item."""


class Query(NamedTuple):
    """What to recommend for a history or a stored user; times in seconds."""

    events: Sequence[Event]
    """The history that was sent along; empty with `user_id`."""
    k: int
    """Number of items, at least 1."""
    exclude_item_ids: Sequence[str] = ()
    request_time: int | None = None
    """None: not known. Else not before the last event; a stored user's events after it are left out."""
    explain: bool = False
    user_id: str | None = None
    """A stored user, for `StateCache`: a `Recommender` by itself knows no users."""
    started: float | None = None
    """When the request began, by `time.monotonic()`; its answer is not logged if the user was deleted since."""


@dataclass(frozen=True, slots=True)
class Answer:
    """Items best first."""

    items: NDArray[np.int32]
    """`[n]`, item indices from 1 on; n <= k."""
    scores: NDArray[np.float32]
    """`[n]`, logits of the model, or events in the training data for popular items."""
    policy: str
    """What ranked the items: the model's policy or `popularity`."""
    ignored_event_count: int
    """Events of the history on items that the model does not know."""
    explanations: tuple[Explanation, ...]
    """One for each item; empty unless asked for."""
    log_propensities: tuple[float, ...] = ()
    """Of each item given those above it; empty: 0 for all, since the same query gets the same answer."""
    counted: Counted | None = None
    """The events of the trend that ranked the items; None: no trend did."""


class Recommender:
    """One loaded model. Immutable, and safe to share between threads."""

    def __init__(
        self,
        artifact: Artifact,
        provider: Provider = "auto",
        intra_op_threads: int = 1,
        search_by: SearchBy = "auto",
    ) -> None:
        """Loads the graphs.

        Args:
            artifact: A verified model directory.
            provider: What runs the graphs; "auto": CUDA where it works, else the CPU.
            intra_op_threads: Threads within one run of a graph.
            search_by: How the best items are found; "auto": with the index, if there is one and the CPU runs the model.

        Raises:
            ArtifactError: A graph or the index breaks the contract.
            ProviderError: `provider` is "cuda", and CUDA does not run.
        """
        self.info = artifact.info
        self.catalog = artifact.catalog
        self.engine = Engine(artifact, provider, intra_op_threads, search_by)
        self.provider = self.engine.provider
        self.messages: dict[int, bytes] = {}
        """By item index, what of an answer does not depend on the query, encoded once: see `serve.api.codec`."""
        self._vectors = artifact.item_vectors
        lengths = np.sqrt(np.einsum("ij,ij->i", self._vectors, self._vectors))
        # Padding, and an item that was never trained, may have no direction; they resemble nothing.
        self._lengths: NDArray[np.float32] = np.where(lengths == 0, np.float32(1), lengths)

    def recommend(self, queries: Sequence[Query]) -> list[Answer]:
        """Answers each query from its events; queries with a known event share runs of the model.

        Returns:
            The answers in the order of the queries. A query without an event that the model knows gets the most popular
            items, scored by their number of training events.
        """
        histories = [known_events(query.events, self.catalog) for query in queries]
        rows = [
            features(history, query.request_time, self.indices(query.exclude_item_ids), self.info)
            for query, history in zip(queries, histories, strict=True)
            if history
        ]
        ks = [query.k for query, history in zip(queries, histories, strict=True) if history]
        rankings = iter(self.engine.rank(rows, ks) if rows else ())
        return [
            self.ranked(query, next(rankings), len(query.events) - len(history), history)
            if history
            else self.popular(query, len(query.events))
            for query, history in zip(queries, histories, strict=True)
        ]

    def ranked(
        self, query: Query, ranking: Ranking, ignored_event_count: int, history: Sequence[KnownEvent] = ()
    ) -> Answer:
        """The answer to a query whose items the model ranked; `history` is needed to explain it."""
        items, scores = ranking.items[: query.k], ranking.scores[: query.k]
        explanations = self._explain(query, history, items) if query.explain else ()
        return Answer(items, scores, self.info.policy, ignored_event_count, explanations, counted=ranking.counted)

    def popular(self, query: Query, ignored_event_count: int) -> Answer:
        """The answer to a query without an event that the model knows."""
        exclude = self.indices(query.exclude_item_ids)
        # Among the first k + len(exclude) at most len(exclude) are dropped.
        items = self.catalog.by_popularity[: query.k + len(exclude)]
        items = items[~np.isin(items, np.array(exclude, np.int32))][: query.k]
        scores = self.catalog.popularity[items].astype(np.float32)
        explanations = explain_popularity(items, self.catalog) if query.explain else ()
        return Answer(items, scores, POPULARITY, ignored_event_count, explanations)

    def explain(self, query: Query, items: NDArray[np.int32]) -> tuple[Explanation, ...]:
        """Why the model recommended these items.

        Args:
            query: The query that they answer; at least one of its events is known.
            items: `[n]` int32, item indices of the answer.

        Returns:
            An explanation for each item.
        """
        return self._explain(query, known_events(query.events, self.catalog), items)

    def _explain(
        self, query: Query, history: Sequence[KnownEvent], items: NDArray[np.int32]
    ) -> tuple[Explanation, ...]:
        asked = history[-ASKED_EVENTS:]
        influences = self._influences(query, history, items) if len(history) > 1 and len(items) else None
        of_items, of_events = self._directions(items), self._directions([event.item for event in asked])
        return explain(items, asked, influences, np.clip(of_items @ of_events.T, -1, 1), self.catalog)

    def _directions(self, items: Sequence[int] | NDArray[np.int32]) -> NDArray[np.float32]:
        """Vectors of length 1."""
        return self._vectors[items] / self._lengths[items, None]

    def _influences(self, query: Query, history: Sequence[KnownEvent], items: NDArray[np.int32]) -> NDArray[np.float32]:
        """By how much each item's score is lower without each of the last events, `[items, events]`."""
        exclude = self.indices(query.exclude_item_ids)
        if self.info.repeat is None:
            exclude += [event.item for event in history]
        kept = range(max(0, len(history) - ASKED_EVENTS), len(history))
        rows = [features(history, query.request_time, exclude, self.info)]
        rows += [features([*history[:at], *history[at + 1 :]], query.request_time, exclude, self.info) for at in kept]
        differences = np.empty((len(items), len(kept)), np.float32)
        # All items must be in the ranking with every event, or the difference would be that of others' scores.
        asked_items = max(ASKED_ITEMS, query.k)
        whole, *others = (self._scores(ranking, items) for ranking in self.engine.rank(rows, asked_items))
        for at, without in enumerate(others):
            differences[:, at] = whole - without
        return differences

    @staticmethod
    def _scores(ranking: Ranking, items: NDArray[np.int32]) -> NDArray[np.float32]:
        """The items' scores in a ranking; those that are not in it have at most the last one's."""
        place = np.argsort(ranking.items)
        found = place[np.minimum(np.searchsorted(ranking.items, items, sorter=place), len(place) - 1)]
        return np.where(ranking.items[found] == items, ranking.scores[found], ranking.scores[-1])

    def indices(self, item_ids: Sequence[str]) -> list[int]:
        """Item indices of the ids that the model knows."""
        index = self.catalog.index
        return [index[item_id] for item_id in item_ids if item_id in index]

    def similar(self, item_id: str, k: int) -> Ranking:
        """The items nearest to one item.

        Args:
            item_id: A raw id.
            k: Number of items, cut to all but the item itself.

        Returns:
            Item indices `[k]` int32 and the cosines of their vectors with that of the item `[k]` float32, -1..1.

        Raises:
            UnknownItem: The model does not know the item.
        """
        item = self.catalog.index.get(item_id)
        if item is None:
            raise UnknownItem(f"the model {self.info.model_version} does not know the item {item_id!r}")
        cosines = np.clip(self._vectors @ self._directions([item])[0] / self._lengths, -1, 1)
        cosines[[0, item]] = -np.inf
        k = min(k, len(self.catalog) - 1)
        return Ranking(*best_of(np.arange(len(cosines), dtype=np.int32), cosines, k))
