"""A loaded model with its users' states and its queue."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from serve.model.explain import Explanation
from serve.model.exploration import Exploration
from serve.model.popular import FALLBACKS
from serve.model.recommender import Answer, Query, Recommender
from serve.model.rules import NO_RULES, candidate_count, reordered
from serve.observability.metrics import Metrics
from serve.serving.batching import Batcher, IsCancelled, OnDone, Pending, Run
from serve.serving.errors import Cancelled, Expired, QueueFull
from serve.serving.reranker import Reranker
from serve.serving.ruled import (
    Origins,
    candidates_of,
    choose,
    followed_by,
    for_reranker,
    more_queries,
    rerank_request,
    without_full_tags,
)
from serve.serving.states import STATES_CAPACITY, StateCache
from serve.stores.base import EventStore

# Queries of one call in the queue at a time, so that it leaves room for other calls.
AT_ONCE = 16
# Clocks differ, and a request takes time: a request time within so many seconds counts as now.
RECENT_S = 60.0
MORE_CANDIDATES = 4
"""If `max_per_tag` leaves too few candidates, so many times as many are ranked, again and again."""


class LoadedModel:
    """One model, the states of its users, and its queue. Safe to share between threads."""

    def __init__(
        self,
        model: Recommender,
        store: EventStore,
        metrics: Metrics,
        exploration: Exploration | None = None,
        reranker: Reranker | None = None,
        states: int = STATES_CAPACITY,
    ) -> None:
        """`states`: for how many users to keep them in memory."""
        self.model = model
        self.exploration = exploration
        self._reranker = reranker
        self.states = StateCache(model, store, states)
        self._store = store
        self._metrics = metrics
        # A run of the first has no row of the second, whose rows take longer; the states of users they read in turns.
        observe = partial(_observe, metrics)
        self._stored = Batcher(self.states.recommend, on_run=observe, at_once=self.states.recommend_at_once)
        self._others = Batcher(self.states.recommend, on_run=observe)

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
        if self._is_ruled(query):
            end, needed = None if deadline_s is None else time.monotonic() + deadline_s, self._needed(query)
            return self._ruled(query, needed[0], self._answered(needed, end, is_cancelled), end, is_cancelled)
        (pending,) = self._others.complete([self._asked(query)], deadline_s, is_cancelled)
        return self.finished(query, pending)

    def recommend_all(
        self, queries: Sequence[Query], deadline_s: float | None = None, is_cancelled: IsCancelled | None = None
    ) -> list[Answer | Exception]:
        """Answers several queries of one call; in place of an answer, what the model or the store raised for this
        query. Raises QueueFull, Expired and Cancelled as `Batcher.recommend`."""
        end = None if deadline_s is None else time.monotonic() + deadline_s
        asked = [self._needed(query) for query in queries]
        found = iter(self._answered([one for needed in asked for one in needed], end, is_cancelled))
        pending = [[next(found) for _ in needed] for needed in asked]

        def answer(query: Query, needed: Sequence[Query], of_query: Sequence[Pending]) -> Answer:
            if self._is_ruled(query):
                return self._ruled(query, needed[0], of_query, end, is_cancelled)
            return self.finished(query, of_query[0])

        return [_or_error(partial(answer, *one)) for one in zip(queries, asked, pending, strict=True)]

    def _needed(self, query: Query) -> list[Query]:
        """What the batches are asked for a query: one, and for rules more."""
        asked = self._asked(query)
        if not self._is_ruled(query):
            return [asked]
        asked = asked._replace(k=max(asked.k, candidate_count(query.k)))
        return [asked, *more_queries(asked, query.rules or NO_RULES, query.live or self.model.own_live)]

    def _is_ruled(self, query: Query) -> bool:
        """Whether something is done after the model."""
        return query.rules is not None or self.reranks(query)

    @property
    def has_reranker(self) -> bool:
        """Whether the server has an own re-ranker."""
        return self._reranker is not None

    def reranks(self, query: Query) -> bool:
        """Whether the server's own re-ranker orders the answer."""
        return self._reranker is not None and not query.new_item_slots

    def _answered(self, asked: Sequence[Query], end: float | None, is_cancelled: IsCancelled | None) -> list[Pending]:
        """What the batches answered or failed with; `end`: when that is of no use any more, by `time.monotonic()`.
        Raises QueueFull, Expired and Cancelled."""
        answered: list[Pending] = []
        for start in range(0, len(asked), AT_ONCE):
            left_s = None if end is None else end - time.monotonic()
            pending = self._others.complete(asked[start : start + AT_ONCE], left_s, is_cancelled)
            for one in pending:
                if isinstance(one.error, (Cancelled, Expired)):
                    raise one.error
            answered += pending
        return answered

    def start(
        self,
        query: Query,
        deadline_s: float | None,
        is_cancelled: IsCancelled | None,
        on_done: OnDone,
    ) -> Pending:
        """Puts a query into the queue that needs neither reasons nor an old history; it is to be `run` and `finished`.

        Args:
            query: What is asked.
            deadline_s: For how many seconds from now on the answer is of use; None: without end.
            is_cancelled: Whether it is of no use any more.
            on_done: See `OnDone`.

        Raises:
            QueueFull: Too many wait.
        """
        known = query.user_id is not None and self.states.has(query.user_id)
        batcher = self._stored if known else self._others
        return batcher.put(self._asked(query), deadline_s, is_cancelled, on_done)

    def run(self, here_s: float) -> None:
        """Has the model run for what was started, as `Batcher.run`."""
        self._stored.run(here_s)
        self._others.run(here_s)

    def _ruled(
        self,
        query: Query,
        asked: Query,
        pending: Sequence[Pending],
        end: float | None,
        is_cancelled: IsCancelled | None,
    ) -> Answer:
        """The answer to a query with rules, or with an own re-ranker.

        Args:
            query: The query.
            asked: The first one of `_needed`.
            pending: What the batches answered to `_needed`.
            end: When the answer is of no use any more, by `time.monotonic()`.
            is_cancelled: Whether the client cancelled the call.
        """
        rules, model = query.rules or NO_RULES, self.model
        live = query.live or model.own_live
        pending[0].check()
        answer = pending[0].result()
        answers = [one.result() for one in pending]
        candidates, origins = candidates_of(answers, rules, live), Origins(answers)
        exploration = None if answer.policy in FALLBACKS else self._exploration(query)
        if exploration is not None:
            # By boosts alone, which change the scores from which the slate is drawn.
            pool = max(query.k, exploration.pool)
            slate = exploration.draw(candidates.scores[:pool], query.k, query.recommendation_id)
            found = candidates.at(slate.places)
            answer = replace(answer, log_propensities=tuple(slate.log_propensities.tolist()))
        else:
            if self._reranker is not None:
                left_s = None if end is None else end - time.monotonic()
                request = rerank_request(query, answer.policy)
                candidates = reordered(
                    candidates, self._reranker.order(request, for_reranker(candidates, live), left_s)
                )
            found = choose(candidates, query.k, rules, model, live)
            first, best = len(candidates), answer
            # Items without a tag of which there are enough, in their order: as if all items had been candidates. Each
            # round asks for more than the last one, so that a few rounds see the whole catalogue.
            while rules.max_per_tag and len(found) < query.k and len(best.items) == asked.k:
                asked = asked._replace(k=MORE_CANDIDATES * asked.k)
                (more,) = self._answered([without_full_tags(asked, rules, found, live)], end, is_cancelled)
                best = more.result()
                origins.add(best)
                wider = followed_by(candidates, candidates_of([best], rules, live))
                if len(wider) == len(candidates):
                    break
                candidates = wider
                found = choose(candidates, query.k, rules, model, live, first)
        answer = replace(answer, items=found.items, scores=found.scores, applied=found.applied, origins=origins.found)
        return self._explained(query, answer, pending[0])

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
            is_learned = query.filter is None and query.allow_seen is None and query.rules is None
            query = query._replace(k=max(query.k, exploration.pool), own_items=is_learned)
        return query._replace(explain=False) if query.explain else query

    def _exploration(self, query: Query) -> Exploration | None:
        """By which the answer to a query is drawn; None: it is not drawn."""
        is_chosen = query.rules is not None and not query.rules.only_boosts
        return None if query.new_item_slots or is_chosen or self._reranker is not None else self.exploration

    def finished(self, query: Query, pending: Pending) -> Answer:
        """The answer to a query from what the batch answered; raises as `Batcher.recommend`."""
        answer, exploration = pending.result(), self._exploration(query)
        if exploration is not None:
            answer = _drawn(query, answer, exploration)
        return self._explained(query, answer, pending)

    def _explained(self, query: Query, answer: Answer, pending: Pending) -> Answer:
        """The answer with explanations, if they are asked for."""
        if not query.explain:
            return answer
        pending.check()
        return replace(answer, explanations=self._explanations(query, answer))

    def _explanations(self, query: Query, answer: Answer) -> tuple[Explanation, ...]:
        if query.user_id is not None and not query.events and answer.policy not in FALLBACKS:
            query = query._replace(events=self._store.history(query.user_id, query.request_time))
        return self.model.explain(query, answer)


def _or_error(answer: Callable[[], Answer]) -> Answer | Exception:
    """An answer, or what it failed with if that concerns it alone."""
    try:
        return answer()
    except (Cancelled, Expired, QueueFull):
        raise
    except Exception as error:
        return error


def _drawn(query: Query, answer: Answer, exploration: Exploration) -> Answer:
    """The answer whose items are drawn from those of a wider one; what is popular is not drawn."""
    places: NDArray[np.intp] = np.arange(min(query.k, len(answer.items)))
    log_propensities: tuple[float, ...] = ()
    if answer.policy not in FALLBACKS:
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
