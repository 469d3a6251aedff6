"""What the recommender's calls do, with plain values in and out, for a front of any protocol.

Values are checked where they are decoded (`serve.api.codec`); failures are the exceptions of `serve.api.errors`.
"""

import functools
import hashlib
import os
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import NamedTuple

from serve.api.errors import SlatesNotLogged, UnknownUser
from serve.model.events import Event, known_events, positive_count
from serve.model.live_catalog import Item
from serve.model.profile import GenrePreference, genre_preferences
from serve.model.recommender import Answer, Query, Recommender, UnknownItem
from serve.observability.metrics import Metrics
from serve.serving.errors import Cancelled, Expired
from serve.serving.loaded import LoadedModel, Models
from serve.stores.base import Deleted, EventStore, ShownItem, Slate, UserEvent

SECONDS_PER_DAY = 86_400
MOST_NOT_SHOWN = 10_000
"""Items that `not_shown_within` excludes from an answer."""


class Recommendation(NamedTuple):
    """An answer under the id by which events can refer to it, and the model whose item indices it has."""

    recommendation_id: str
    answer: Answer
    model: Recommender


class Recorded(NamedTuple):
    """What became of events that were to be recorded."""

    recorded_count: int
    duplicate_count: int
    unknown_item_count: int
    """Of the recorded ones."""


class Profile(NamedTuple):
    """A user's positive events in time order and preferences, as the model sees them that answers the user."""

    events: Sequence[Event]
    preferences: Sequence[GenrePreference]
    model: Recommender


class CatalogItem(NamedTuple):
    """An item, and where it comes from."""

    item: Item
    stored: bool
    """Whether it is the store's; else it is as the model directory has it."""
    known: bool
    """Whether the model knows it."""
    available: bool
    """Now."""


class ItemPage(NamedTuple):
    """Some items in the order of their ids."""

    items: Sequence[CatalogItem]
    more: bool
    """Whether there are others after them."""
    model: Recommender
    """The one that answers most requests."""


class Page(NamedTuple):
    """Some of a user's events, newest first."""

    events: Sequence[UserEvent]
    last: tuple[int, int] | None
    """Timestamp and arrival of the last one; None: there are no more."""


def is_logged(name: str, share: float) -> bool:
    """Whether answers are logged: of all users about the given share, and always the same ones, so that a user's log is
    whole. All servers of a store choose the same.

    >>> [is_logged("ada", share) for share in (0.0, 0.1, 0.2, 1.0)]
    [False, False, True, True]

    Args:
        name: A user's id, or for a history that was sent along the id of the answer.
        share: 0 to 1.
    """
    # Not the hash that divides users between model versions: each must have its share of the log.
    digest = hashlib.blake2b(name.encode(), digest_size=8, person=b"slate log").digest()
    return int.from_bytes(digest) < share * 2**64


class RecommenderService:
    """Answers with the loaded models from one event store, from any number of threads."""

    def __init__(
        self,
        models: Models,
        store: EventStore,
        metrics: Metrics,
        slate_log: float = 1.0,
        slate_retention: float = 0.0,
    ) -> None:
        """Answers from now on.

        Args:
            models: The loaded models.
            store: The events of all users.
            metrics: Where to count.
            slate_log: The share of the users whose answers are logged, 0 to 1; see `is_logged`.
            slate_retention: For how many days the log is kept; 0: without an end.
        """
        self._slate_log = slate_log
        self._slate_retention_s = slate_retention * SECONDS_PER_DAY
        self.models = models
        self._store = store
        self._metrics = metrics

    def recommend(
        self, loaded: LoadedModel, query: Query, deadline_s: float | None, is_cancelled: Callable[[], bool]
    ) -> Recommendation:
        """Answers a query with the model of its user, and logs the slate; raises as `LoadedModel.recommend`."""
        start = time.monotonic()
        query = self._without_shown(query, self._recently_shown)
        if deadline_s is not None:
            deadline_s -= time.monotonic() - start
        return self._logged(loaded, query, loaded.recommend(query, deadline_s, is_cancelled))

    def recommend_all(
        self,
        loaded: Sequence[LoadedModel],
        queries: Sequence[Query],
        remaining_s: Callable[[], float | None],
        is_cancelled: Callable[[], bool],
    ) -> list[Recommendation]:
        """As `recommend`, for queries with a model each; all are answered or none. An error about a query names it."""

        @functools.cache
        def recently_shown(user_id: str, seconds: int) -> list[str]:
            if is_cancelled():
                raise Cancelled("cancelled by the client")
            left_s = remaining_s()
            if left_s is not None and left_s <= 0:
                raise Expired("the deadline passed before it was read what was recommended lately")
            return self._recently_shown(user_id, seconds)

        asked = list(queries)
        for at, query in enumerate(asked):
            try:
                asked[at] = self._without_shown(query, recently_shown)
            except SlatesNotLogged as error:
                raise SlatesNotLogged(f"requests[{at}].{error}") from error
        queries = asked
        answers: dict[int, Answer] = {}
        for model in set(loaded):
            places = [at for at, one in enumerate(loaded) if one is model]
            found = model.recommend_all([queries[at] for at in places], remaining_s(), is_cancelled)
            answers.update(zip(places, found, strict=True))
        return [self._logged(one, queries[at], answers[at]) for at, one in enumerate(loaded)]

    def _without_shown(self, query: Query, recently_shown: Callable[[str, int], list[str]]) -> Query:
        """The query without what was recommended lately, if it asks for that; raises SlatesNotLogged."""
        seconds = query.not_shown_within
        if not seconds or query.user_id is None:
            return query
        if self._slate_log < 1:
            expected = "a server with --slate-log 1"
            raise SlatesNotLogged(f"not_shown_within: expected {expected}, came {self._slate_log:g}")
        if 0 < self._slate_retention_s < seconds:
            expected = f"at most {self._slate_retention_s:.0f} seconds, for which recommendations are kept"
            raise SlatesNotLogged(f"not_shown_within: expected {expected} (--slate-retention), came {seconds}")
        shown = recently_shown(query.user_id, seconds)
        return query._replace(exclude_item_ids=(*query.exclude_item_ids, *shown))

    def _recently_shown(self, user_id: str, seconds: int) -> list[str]:
        return self._store.shown_items(user_id, int(time.time()) - seconds, MOST_NOT_SHOWN)

    def _logged(self, loaded: LoadedModel, query: Query, answer: Answer) -> Recommendation:
        model, now = loaded.model, time.time()
        # The time first: an index of ids in their order grows at one end, which costs half of one in no order.
        recommendation_id = f"{int(now * 1e3):012x}{os.urandom(10).hex()}"
        self._metrics.answered(answer.policy, answer.items)
        if query.events:
            self._metrics.events(positive_count(query.events) - answer.ignored_event_count, answer.ignored_event_count)
        if not is_logged(query.user_id or recommendation_id, self._slate_log):
            return Recommendation(recommendation_id, answer, model)
        item_ids = model.catalog.item_ids
        withheld = () if query.withheld is None else query.withheld.items
        excluded = dict.fromkeys([*model.indices(query.exclude_item_ids), *answer.disliked, *(withheld or ())])
        options = {
            "filter": query.filter,
            "seen": query.allow_seen is not None,
            "new_item_slots": query.new_item_slots,
            "not_shown_within": query.not_shown_within,
            "catalogue": withheld is None,
            "rules": query.rules is not None,
            "reranker": loaded.reranks(query),
        }
        self._store.log_slate(
            Slate(
                recommendation_id=recommendation_id,
                user_id=query.user_id,
                item_ids=tuple([item_ids[item] for item in answer.items.tolist()]),
                log_propensities=answer.log_propensities,
                policy=answer.policy,
                model_version=model.info.model_version,
                timestamp=int(now),
                temperature=loaded.temperature if answer.log_propensities else None,
                request_time=query.request_time,
                excluded_item_ids=tuple([item_ids[item] for item in excluded]),
                trend_time=None if answer.counted is None else answer.counted.time,
                trend_arrival=None if answer.counted is None else answer.counted.arrival,
                request_options=tuple([name for name, given in options.items() if given]),
            ),
            started=query.started,
        )
        return Recommendation(recommendation_id, answer, model)

    def record(self, events: Sequence[UserEvent]) -> Recorded:
        """Stores the events whose ids are new; they are on disk on return."""
        index = self.models.version("").model.catalog.index
        recorded = self._store.record(events)
        unknown = sum(new.event.item_id not in index for new in recorded)
        duplicates = len(events) - len(recorded)
        self._metrics.recorded(len(recorded), duplicates, sum(new.recommendation_id is not None for new in recorded))
        self._metrics.events(len(recorded) - unknown, unknown)
        return Recorded(len(recorded), duplicates, unknown)

    def upsert_items(self, items: Sequence[Item]) -> int:
        """Stores items; how many are new."""
        return self._store.upsert_items(items)

    def delete_items(self, item_ids: Sequence[str]) -> int:
        """Deletes items from the store; how many there were."""
        return self._store.delete_items(item_ids)

    def item(self, item_id: str) -> tuple[CatalogItem, Recommender]:
        """An item of the store or else of the model directory, and the model that knows it or not; raises
        UnknownItem."""
        model, stored = self.models.version("").model, self._store.item(item_id)
        if stored is None and item_id not in model.own_catalog.index:
            version = model.info.model_version
            raise UnknownItem(f"the item {item_id!r} is not stored, and the model {version} does not know it")
        return _entry(item_id, stored, model), model

    def items(self, after: str, most: int, *, stored_only: bool) -> ItemPage:
        """At most so many items with later ids than `after`: those of the store, and unless `stored_only` those of the
        model directory."""
        model = self.models.version("").model
        # One more says whether there is another page.
        stored = {one.item_id: one for one in self._store.list_items(after, most + 1)}
        item_ids = set(stored)
        if not stored_only:
            of_model = model.ids_in_order
            start = bisect_right(of_model, after)
            item_ids.update(of_model[start : start + most + 1])
        found = [_entry(item_id, stored.get(item_id), model) for item_id in sorted(item_ids)[:most]]
        return ItemPage(found, len(item_ids) > most, model)

    def record_shown(self, items: Sequence[ShownItem]) -> int:
        """Stores which items were shown; how many are new."""
        return self._store.record_shown(items)

    def profile(self, user_id: str) -> Profile:
        """What is stored of a user; raises UnknownUser."""
        events = [event for event in self._store.history(user_id) if event.weight > 0]
        if not events and not self._store.revision(user_id):
            raise UnknownUser(f"no event of the user {user_id!r} is stored")
        model = self.models.for_user(user_id).model
        return Profile(events, genre_preferences(known_events(events, model.catalog), model.catalog), model)

    def events(self, user_id: str, most: int, before: tuple[int, int] | None) -> Page:
        """At most so many of a user's events, newest first, from the one after `before` (timestamp, arrival) on."""
        # One more says whether there is another page.
        found = self._store.list_events(user_id, most + 1, before)
        events = [event for _, event in found[:most]]
        arrival, last = found[:most][-1] if found else (0, None)
        return Page(events, None if last is None or len(found) <= most else (last.event.timestamp, arrival))

    def delete_events(self, user_id: str, event_ids: Sequence[str]) -> int:
        """Deletes some of a user's events; how many there were."""
        return self._store.delete_events(user_id, event_ids)

    def merge_users(self, source: str, target: str) -> Deleted:
        """Makes all that is stored of one user another one's; raises TooManyToMerge."""
        merged = self._store.merge_users(source, target)
        self.models.forget(source)
        return merged

    def delete_user(self, user_id: str) -> Deleted:
        """Deletes all that is stored of a user."""
        deleted = self._store.delete_user(user_id)
        self.models.forget(user_id)
        return deleted


def _entry(item_id: str, stored: Item | None, model: Recommender) -> CatalogItem:
    """The store's item, or else that of the model directory."""
    own = model.own_catalog
    at = own.index.get(item_id)
    item = stored
    if item is None:
        item = Item(item_id) if at is None else Item(item_id, own.titles[at], own.genres[at])
    return CatalogItem(item, stored is not None, at is not None, item.is_available(int(time.time())))
