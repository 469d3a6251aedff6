"""What the recommender's calls do, with plain values in and out, for a front of any protocol.

Values are checked where they are decoded (`serve.api.codec`); failures are the exceptions of `serve.api.errors`.
"""

import functools
import hashlib
import os
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import NamedTuple

from serve.api.errors import OF_THE_SERVER, SlatesNotLogged, UnknownUser
from serve.api.rules import MAX_NOT_SHOWN_ITEMS
from serve.model.events import Event, known_events, positive_count
from serve.model.live_catalog import Item, LiveCatalog
from serve.model.profile import GenrePreference, genre_preferences
from serve.model.recommender import Answer, Query, Recommender, UnknownItem
from serve.observability.metrics import Metrics
from serve.serving.batching import OnDone
from serve.serving.errors import Cancelled, Expired
from serve.serving.loaded import AT_ONCE, LoadedModel, Models
from serve.stores.base import MOST_EVENTS, Deleted, EventStore, ShownItem, Slate, UserEvent

SECONDS_PER_DAY = 86_400
MOST_READS = 5
"""So often a user's history is read again if it changes while it is read."""


class Recommendation(NamedTuple):
    """An answer under the id by which events can refer to it, and what was asked of which model."""

    recommendation_id: str
    answer: Answer
    loaded: LoadedModel
    query: Query
    """Without the stored events of its user, and without sent ones that did not count."""
    time: float
    """When it was answered, in seconds since 1970-01-01T00:00Z."""

    @property
    def model(self) -> Recommender:
        """The model that answered."""
        return self.loaded.model

    @property
    def live(self) -> LiveCatalog:
        """The catalogue whose item indices the answer has."""
        return self.query.live or self.model.own_live


class Recorded(NamedTuple):
    """What became of events that were to be recorded."""

    recorded_count: int
    duplicate_count: int
    unknown_item_count: int
    """Of the recorded ones."""


class WatchPage(NamedTuple):
    """Some of the positive events of a user's history, newest first."""

    events: Sequence[tuple[int, Event]]
    """With their places among those of the same second, from 0 on."""
    more: bool
    """Whether there are others after them."""


class Profile(NamedTuple):
    """What a user's history says, as the model sees it that answers the user."""

    event_count: int
    """Its positive events."""
    preferences: Sequence[GenrePreference]
    """Empty but on the first page."""
    watched: WatchPage
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


class EventPage(NamedTuple):
    """Some of a user's events, newest first."""

    events: Sequence[tuple[int, UserEvent]]
    """With their arrivals."""
    more: bool
    """Whether there are others after them."""


def repeatable_id(user_id: str | None, request_id: str) -> str:
    """The id of the answers to a request that its client may repeat: 32 hexadecimal digits, the same for the same
    arguments in each process. None: the history came with the request."""
    # Ids have no U+0000.
    name = f"{user_id or ''}\0{request_id}"
    return hashlib.blake2b(name.encode(), digest_size=16, person=b"request id").hexdigest()


def is_logged(name: str, share: float) -> bool:
    """Whether answers are logged: of all users about the given share, and always the same ones, so that a user's log is
    whole. All servers of a store choose the same.

    >>> [is_logged("ada", share) for share in (0.0, 0.1, 0.2, 1.0)]
    [False, False, True, True]

    Args:
        name: A user's id, or for a history that was sent along the id of the answer.
        share: 0 to 1.
    """
    if share >= 1:
        return True
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
        """Answers a query with the model of its user; raises as `LoadedModel.recommend`. `log` comes once the answer
        can be sent."""
        start = time.monotonic()
        query = self._without_shown(query, self._recently_shown)
        query, whole = self._with_stored(query, self._history)
        if deadline_s is not None:
            deadline_s -= time.monotonic() - start
        return _named(loaded, query, loaded.recommend(whole, deadline_s, is_cancelled))

    def start(
        self,
        loaded: LoadedModel,
        query: Query,
        deadline_s: float | None,
        is_cancelled: Callable[[], bool],
        on_done: OnDone,
    ) -> Callable[[], Recommendation]:
        """As `recommend`, for a query that needs neither reasons, an old history nor what was shown, without waiting;
        raises as `LoadedModel.start`. What it returns gives the answer once the model ran and `on_done` is called;
        `log` comes after it."""
        pending = loaded.start(query, deadline_s, is_cancelled, on_done)
        return lambda: _named(loaded, query, loaded.finished(query, pending))

    def recommend_all(
        self,
        asked: Sequence[tuple[LoadedModel, Query]],
        remaining_s: Callable[[], float | None],
        is_cancelled: Callable[[], bool],
    ) -> list[Recommendation | Exception]:
        """As `recommend`, for queries with a model each; in place of an answer, why this query has none.

        Raises what concerns the server (`OF_THE_SERVER`): then none is answered.
        """

        @functools.cache
        def recently_shown(user_id: str, seconds: int, but: str) -> list[str]:
            return self._recently_shown(user_id, seconds, but)

        # Histories can have 10,000 events: few are in memory at a time.
        history = functools.lru_cache(AT_ONCE)(self._history)
        found: dict[int, Recommendation | Exception] = {}
        of_model: dict[LoadedModel, list[int]] = {}
        for at, (loaded, _) in enumerate(asked):
            of_model.setdefault(loaded, []).append(at)
        for loaded, places in of_model.items():
            for start in range(0, len(places), AT_ONCE):
                queries: dict[int, tuple[Query, Query]] = {}
                for at in places[start : start + AT_ONCE]:
                    check_wanted(remaining_s, is_cancelled)
                    try:
                        queries[at] = self._with_stored(self._without_shown(asked[at][1], recently_shown), history)
                    except SlatesNotLogged as error:
                        found[at] = error
                wholes = [whole for _, whole in queries.values()]
                answers = loaded.recommend_all(wholes, remaining_s(), is_cancelled)
                for (at, (query, _)), answer in zip(queries.items(), answers, strict=True):
                    if isinstance(answer, OF_THE_SERVER):
                        raise answer
                    found[at] = answer if isinstance(answer, Exception) else _named(loaded, query, answer)
        return [found[at] for at in range(len(asked))]

    def _history(self, user_id: str, until: int | None, revision: int | None) -> list[Event]:
        """The stored history; `revision` is for caches, None where it does not matter."""
        return self._store.history(user_id, until)

    def _with_stored(
        self, query: Query, history: Callable[[str, int | None, int | None], list[Event]]
    ) -> tuple[Query, Query]:
        """The query with those of the events that are sent along with a user that count, and the query with the stored
        events before these, as if they had been recorded just now."""
        user_id = query.user_id
        if user_id is None or not query.events:
            return query, query
        named = list(zip(query.events, query.event_ids or [""] * len(query.events), strict=True))
        ids = [event_id for _, event_id in named if event_id]
        for _ in range(MOST_READS):
            # An event that is recorded between the two reads would count twice.
            revision = self._store.revision(user_id) if ids else None
            recorded = self._store.recorded_ids(ids) if ids else set[str]()
            sent = [event for event, event_id in named if event.weight and event_id not in recorded]
            query = query._replace(events=sent, event_ids=())
            if not sent:
                # The stored state answers.
                return query, query
            stored = history(user_id, query.request_time, revision)
            if not ids or self._store.revision(user_id) == revision:
                break
        # Sorting keeps the order of equal times.
        whole = query._replace(events=sorted([*stored, *sent], key=attrgetter("timestamp"))[-MOST_EVENTS:])
        return query, whole

    def _without_shown(self, query: Query, recently_shown: Callable[[str, int, str], list[str]]) -> Query:
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
        shown = recently_shown(query.user_id, seconds, query.recommendation_id)
        return query._replace(exclude_item_ids=(*query.exclude_item_ids, *shown))

    def _recently_shown(self, user_id: str, seconds: int, but: str) -> list[str]:
        return self._store.shown_items(user_id, int(time.time()) - seconds, MAX_NOT_SHOWN_ITEMS, but)

    def log(self, recommendation: Recommendation) -> None:
        """Counts and logs an answer that is about to be sent; one that is refused, as it is too long, was not seen."""
        recommendation_id, answer, loaded, query, now = recommendation
        live = recommendation.live
        self._metrics.answered(answer.policy, answer.items)
        if query.events and query.user_id is None:
            self._metrics.events(positive_count(query.events) - answer.ignored_event_count, answer.ignored_event_count)
        if not is_logged(query.user_id or recommendation_id, self._slate_log):
            return
        item_ids, excluded = live.catalog.item_ids, dict[int, None]()
        withheld = () if query.withheld is None else query.withheld.items
        if query.exclude_item_ids or answer.disliked or withheld:
            excluded = dict.fromkeys([*live.indices(query.exclude_item_ids), *answer.disliked, *(withheld or ())])
        options = (
            ("filter", query.filter),
            ("seen", query.allow_seen is not None),
            ("new_item_slots", query.new_item_slots),
            ("not_shown_within", query.not_shown_within),
            ("history", query.events and query.user_id is not None),
            ("model_version", query.model_version),
            ("catalogue", withheld is None),
            ("rules", query.rules is not None),
            ("reranker", loaded.reranks(query)),
        )
        self._store.log_slate(
            Slate(
                recommendation_id=recommendation_id,
                user_id=query.user_id,
                item_ids=tuple([item_ids[item] for item in answer.items.tolist()]),
                log_propensities=answer.log_propensities,
                policy=answer.policy,
                model_version=recommendation.model.info.model_version,
                timestamp=int(now),
                temperature=loaded.temperature if answer.log_propensities else None,
                request_time=query.request_time,
                excluded_item_ids=tuple([item_ids[item] for item in excluded]),
                trend_time=None if answer.counted is None else answer.counted.time,
                trend_arrival=None if answer.counted is None else answer.counted.arrival,
                request_options=tuple([name for name, given in options if given]),
            ),
            started=query.started,
        )

    def failed_in_batch(self, code: str) -> None:
        """Counts a request of a batch that failed with a status."""
        self._metrics.failed_in_batch(code)

    def record(self, events: Sequence[UserEvent]) -> Recorded:
        """Stores the events whose ids are new; they are on disk on return."""
        index = self.models.version("").model.own_catalog.index
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

    def profile(self, user_id: str, most: int, before: tuple[int, int] | None) -> Profile:
        """What is stored of a user, with at most so many positive events, from the one after `before` (timestamp, place
        among those of the second) on; raises UnknownUser."""
        events = [event for event in self._store.history(user_id) if event.weight > 0]
        if not events and not self._store.revision(user_id):
            raise UnknownUser(f"no event of the user {user_id!r} is stored")
        model = self.models.for_user(user_id).model
        # Of the whole history: no need to compute them anew for each page.
        first = before is None
        preferences = genre_preferences(known_events(events, model.own_catalog), model.catalog) if first else []
        return Profile(len(events), preferences, _watched(events, most, before), model)

    def events(self, user_id: str, most: int, before: tuple[int, int] | None) -> EventPage:
        """At most so many of a user's events, newest first, from the one after `before` (timestamp, arrival) on."""
        # One more says whether there is another page.
        found = self._store.list_events(user_id, most + 1, before)
        return EventPage(found[:most], len(found) > most)

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


def check_wanted(remaining_s: Callable[[], float | None], is_cancelled: Callable[[], bool]) -> None:
    """Raises Cancelled or Expired if the client of a call does not wait for its answer any more."""
    if is_cancelled():
        raise Cancelled("cancelled by the client")
    left_s = remaining_s()
    if left_s is not None and left_s <= 0:
        raise Expired("the deadline passed before there was an answer")


def _named(loaded: LoadedModel, query: Query, answer: Answer) -> Recommendation:
    """An answer under its id."""
    now = time.time()
    # The time first: an index of ids in their order grows at one end, which costs half of one in no order.
    recommendation_id = query.recommendation_id or f"{int(now * 1e3):012x}{os.urandom(10).hex()}"
    return Recommendation(recommendation_id, answer, loaded, query, now)


def _watched(events: Sequence[Event], most: int, before: tuple[int, int] | None) -> WatchPage:
    """A page of events that are in their order."""
    places = list[int]()
    for at, event in enumerate(events):
        same_second = at > 0 and events[at - 1].timestamp == event.timestamp
        places.append(places[-1] + 1 if same_second else 0)
    end = len(events)
    if before is not None:
        end = bisect_left(range(end), before, key=lambda at: (events[at].timestamp, places[at]))
    first = max(0, end - most)
    return WatchPage([(places[at], events[at]) for at in range(end - 1, first - 1, -1)], first > 0)


def _entry(item_id: str, stored: Item | None, model: Recommender) -> CatalogItem:
    """The store's item, or else that of the model directory."""
    own = model.own_catalog
    at = own.index.get(item_id)
    item = stored
    if item is None:
        item = Item(item_id) if at is None else Item(item_id, own.titles[at], own.genres[at])
    return CatalogItem(item, stored is not None, at is not None, item.is_available(int(time.time())))
