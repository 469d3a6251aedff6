"""A loaded model with its users' states and its queue."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from serve.model.explain import Explanation, explain_popularity
from serve.model.exploration import Exploration
from serve.model.recommender import POPULARITY, Answer, Query, Recommender
from serve.observability.metrics import Metrics
from serve.serving.batching import Batcher, Pending, Run
from serve.serving.errors import Cancelled, Expired, QueueFull
from serve.serving.states import StateCache
from serve.stores.base import EventStore

# Queries of one call in the queue at a time, so that it leaves room for other calls.
AT_ONCE = 16
# Clocks differ, and a request takes time: a request time within so many seconds counts as now.
RECENT_S = 60.0

IsCancelled = Callable[[], bool]


class LoadedModel:
    """One model, the states of its users, and its queue. Safe to share between threads."""

    def __init__(
        self, model: Recommender, store: EventStore, metrics: Metrics, exploration: Exploration | None = None
    ) -> None:
        self.model = model
        self.exploration = exploration
        self.states = StateCache(model, store)
        self._store = store
        self._metrics = metrics
        self._batcher = Batcher(self.states.recommend, on_run=partial(_observe, metrics))

    @property
    def temperature(self) -> float | None:
        """Of the exploration; None: it does not explore."""
        return None if self.exploration is None else self.exploration.temperature

    def asks_for_the_past(self, user_id: str | None, request_time: int | None) -> bool:
        """Whether a stored user has events after the request time, so that the history before it must be read again;
        for users without a state in memory, whether that is possible."""
        if user_id is None or request_time is None:
            return False
        newest = self.states.newest(user_id)
        return request_time < (time.time() - RECENT_S if newest is None else newest)

    def recommend(
        self, query: Query, deadline_s: float | None = None, is_cancelled: IsCancelled | None = None
    ) -> Answer:
        """Answers one query; raises as `Batcher.recommend`."""
        pending = self._batcher.enqueue(self._asked(query), deadline_s, is_cancelled)
        self._batcher.complete(pending)
        return self._finished(query, pending)

    def recommend_all(
        self, queries: Sequence[Query], deadline_s: float | None = None, is_cancelled: IsCancelled | None = None
    ) -> list[Answer | Exception]:
        """Answers several queries of one call; in place of an answer, what the model or the store raised for this
        query. Raises QueueFull, Expired and Cancelled as `Batcher.recommend`."""
        end = None if deadline_s is None else time.monotonic() + deadline_s
        asked = [self._asked(query) for query in queries]
        answered: list[Pending] = []
        for start in range(0, len(asked), AT_ONCE):
            pending: list[Pending] = []
            try:
                for query in asked[start : start + AT_ONCE]:
                    left_s = None if end is None else end - time.monotonic()
                    pending.append(self._batcher.enqueue(query, left_s, is_cancelled))
            except QueueFull:
                for one in pending:
                    one.is_cancelled = lambda: True
                raise
            for one in pending:
                self._batcher.drive(one)
            for one in pending:
                if isinstance(one.error, (Cancelled, Expired)):
                    raise one.error
            answered += pending
        return [self._finished_or_failed(query, one) for query, one in zip(queries, answered, strict=True)]

    def _finished_or_failed(self, query: Query, pending: Pending) -> Answer | Exception:
        try:
            return self._finished(query, pending)
        except (Cancelled, Expired):
            raise
        except Exception as error:
            return error

    def _asked(self, query: Query) -> Query:
        """What the batch is asked: without explanations and old histories, for which its neighbours would have to
        wait."""
        if query.events:
            query = query._replace(user_id=None)
        if query.user_id is not None and query.request_time is not None:
            newest = self.states.newest(query.user_id)
            if newest is not None and query.request_time < newest:
                query = query._replace(user_id=None, events=self._store.history(query.user_id, query.request_time))
        exploration = self._exploration(query)
        if exploration is not None:
            # A run knows its own items. Slates with these options are not learned from.
            is_learned = query.filter is None and query.allow_seen is None
            query = query._replace(k=max(query.k, exploration.pool), own_items=is_learned)
        return query._replace(explain=False) if query.explain else query

    def _exploration(self, query: Query) -> Exploration | None:
        """By which the answer to a query is drawn; None: it is not drawn."""
        return None if query.new_item_slots else self.exploration

    def _finished(self, query: Query, pending: Pending) -> Answer:
        """The answer to a query from what the batch answered."""
        answer, exploration = pending.result(), self._exploration(query)
        if exploration is not None:
            answer = _drawn(query, answer, exploration)
        if not query.explain:
            return answer
        pending.check()
        return replace(answer, explanations=self._explanations(query, answer))

    def _explanations(self, query: Query, answer: Answer) -> tuple[Explanation, ...]:
        if answer.policy == POPULARITY:
            return explain_popularity(answer.items, (query.live or self.model.own_live).catalog)
        events = query.events
        if query.user_id is not None and not events:
            events = self._store.history(query.user_id, query.request_time)
        return self.model.explain(query._replace(events=events), answer.items)


def _drawn(query: Query, answer: Answer, exploration: Exploration) -> Answer:
    """The answer whose items are drawn from those of a wider one; what is popular is not drawn."""
    places: NDArray[np.intp] = np.arange(min(query.k, len(answer.items)))
    log_propensities: tuple[float, ...] = ()
    if answer.policy != POPULARITY:
        slate = exploration.draw(answer.scores, query.k, query.recommendation_id)
        places, log_propensities = slate.places, tuple(slate.log_propensities.tolist())
    return replace(answer, items=answer.items[places], scores=answer.scores[places], log_propensities=log_propensities)


def _observe(metrics: Metrics, run: Run) -> None:
    """Not a method: a model that its queue refers to would stay in memory until a garbage collection."""
    metrics.batch_size(run.size)
    metrics.inference_seconds(run.seconds)
    for waited_s in run.waited_s:
        metrics.queue_seconds(waited_s)


class Models(Protocol):
    """The models that are loaded."""

    def for_user(self, user_id: str | None) -> LoadedModel:
        """The model that answers a user, or what has the same key, always the same while the traffic stays; None: no
        certain user."""

    def version(self, model_version: str) -> LoadedModel:
        """One loaded version, or with "" the one that answers most; raises UnknownModel."""

    def versions(self) -> Sequence[str]:
        """The loaded versions, the one that answers most first."""

    def forget(self, user_id: str) -> None:
        """Drops what is in memory of a user that was deleted from the store."""
