"""What the recommender's calls do, with plain values in and out, for a front of any protocol.

Values are checked where they are decoded (`serve.api.codec`); failures are the exceptions of `serve.api.errors`.
"""

import functools
import hashlib
import os
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import NamedTuple

from serve.api.errors import OF_THE_SERVER, SlatesNotLogged, UnknownUser
from serve.api.rules import MAX_NOT_SHOWN_ITEMS
from serve.model.events import known_events, positive_count
from serve.model.live_catalog import Item, LiveCatalog
from serve.model.profile import GenrePreference, genre_preferences
from serve.model.recommender import Answer, Query, Recommender, UnknownItem
from serve.observability.metrics import Metrics
from serve.serving.errors import Cancelled, Expired
from serve.serving.loaded import LoadedModel, Models
from serve.stores.base import MOST_EVENTS, Deleted, EventStore, ShownItem, Slate, UserEvent

SECONDS_PER_DAY = 86_400
READ_AT_ONCE = 1_000
"""Events, to find positive ones."""
MOST_READS = 5
"""So often a user's history is read again if it changes while it is read."""


class Recommendation(NamedTuple):
    """An answer under the id by which events can refer to it, and the model and the catalogue whose item indices it
    has."""

    recommendation_id: str
    answer: Answer
    model: Recommender
    live: LiveCatalog


class Recorded(NamedTuple):
    """What became of events that were to be recorded."""

    recorded_count: int
    duplicate_count: int
    unknown_item_count: int
    """Of the recorded ones."""


class Profile(NamedTuple):
    """What a user's history says, as the model sees it that answers the user."""

    event_count: int
    """Its positive events."""
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
        query = self._with_stored(self._without_shown(query, self._recently_shown))
        if deadline_s is not None:
            deadline_s -= time.monotonic() - start
        return self._logged(loaded, query, loaded.recommend(query, deadline_s, is_cancelled))

    def start(
        self,
        loaded: LoadedModel,
        query: Query,
        deadline_s: float | None,
        is_cancelled: Callable[[], bool],
        on_done: Callable[[], None],
    ) -> Callable[[], Recommendation]:
        """As `recommend`, for a query that needs neither reasons, an old history nor what was shown, without waiting;
        raises as `LoadedModel.start`. What it returns gives the answer once the model ran and `on_done` is called."""
        pending = loaded.start(query, deadline_s, is_cancelled, on_done)
        return lambda: self._logged(loaded, query, loaded.finished(query, pending))

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

        found: dict[int, Recommendation | Exception] = {}
        of_model: dict[LoadedModel, dict[int, Query]] = {}
        for at, (loaded, query) in enumerate(asked):
            if query.not_shown_within or query.events:
                if is_cancelled():
                    raise Cancelled("cancelled by the client")
                left_s = remaining_s()
                if left_s is not None and left_s <= 0:
                    raise Expired("the deadline passed before the user's data were read")
            try:
                whole = self._with_stored(self._without_shown(query, recently_shown))
            except SlatesNotLogged as error:
                found[at] = error
            else:
                of_model.setdefault(loaded, {})[at] = whole
        answered: list[tuple[int, LoadedModel, Query, Answer]] = []
        for loaded, queries in of_model.items():
            answers = loaded.recommend_all(list(queries.values()), remaining_s(), is_cancelled)
            for (at, query), answer in zip(queries.items(), answers, strict=True):
                if isinstance(answer, OF_THE_SERVER):
                    raise answer
                if isinstance(answer, Exception):
                    found[at] = answer
                else:
                    answered.append((at, loaded, query, answer))
        found |= {at: self._logged(loaded, query, answer) for at, loaded, query, answer in answered}
        return [found[at] for at in range(len(asked))]

    def _with_stored(self, query: Query) -> Query:
        """The query with the stored events of its user before those that are sent along, as if these had been recorded
        just now."""
        user_id = query.user_id
        if user_id is None or not query.events:
            return query
        ids, recorded = [one for one in query.event_ids if one], set[str]()
        for _ in range(MOST_READS):
            # An event that is recorded between the two reads would count twice.
            revision = self._store.revision(user_id) if ids else 0
            recorded = self._store.recorded_ids(ids) if ids else recorded
            stored = self._store.history(user_id, query.request_time)
            if not ids or self._store.revision(user_id) == revision:
                break
        named = zip(query.events, query.event_ids or [""] * len(query.events), strict=True)
        sent = [event for event, event_id in named if event.weight and event_id not in recorded]
        # Sorting keeps the order of equal times.
        return query._replace(events=sorted([*stored, *sent], key=attrgetter("timestamp"))[-MOST_EVENTS:])

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

    def _logged(self, loaded: LoadedModel, query: Query, answer: Answer) -> Recommendation:
        model, now = loaded.model, time.time()
        live = query.live or model.own_live
        # The time first: an index of ids in their order grows at one end, which costs half of one in no order.
        recommendation_id = query.recommendation_id or f"{int(now * 1e3):012x}{os.urandom(10).hex()}"
        self._metrics.answered(answer.policy, answer.items)
        if query.events and query.user_id is None:
            self._metrics.events(positive_count(query.events) - answer.ignored_event_count, answer.ignored_event_count)
        if not is_logged(query.user_id or recommendation_id, self._slate_log):
            return Recommendation(recommendation_id, answer, model, live)
        item_ids = live.catalog.item_ids
        withheld = () if query.withheld is None else query.withheld.items
        excluded = dict.fromkeys([*live.indices(query.exclude_item_ids), *answer.disliked, *(withheld or ())])
        options = {
            "filter": query.filter,
            "seen": query.allow_seen is not None,
            "new_item_slots": query.new_item_slots,
            "not_shown_within": query.not_shown_within,
            "history": query.events and query.user_id is not None,
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
        return Recommendation(recommendation_id, answer, model, live)

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

    def profile(self, user_id: str) -> Profile:
        """What is stored of a user; raises UnknownUser."""
        events = [event for event in self._store.history(user_id) if event.weight > 0]
        if not events and not self._store.revision(user_id):
            raise UnknownUser(f"no event of the user {user_id!r} is stored")
        model = self.models.for_user(user_id).model
        return Profile(len(events), genre_preferences(known_events(events, model.own_catalog), model.catalog), model)

    def events(self, user_id: str, most: int, before: tuple[int, int] | None) -> EventPage:
        """At most so many of a user's events, newest first, from the one after `before` (timestamp, arrival) on."""
        # One more says whether there is another page.
        found = self._store.list_events(user_id, most + 1, before)
        return EventPage(found[:most], len(found) > most)

    def watched(self, user_id: str, most: int, before: tuple[int, int] | None) -> EventPage:
        """As `events`, of the positive ones alone."""
        found: list[tuple[int, UserEvent]] = []
        at_once = max(most + 1, READ_AT_ONCE)
        while len(found) <= most:
            part = self._store.list_events(user_id, at_once, before)
            found += [one for one in part if one[1].event.weight > 0]
            if len(part) < at_once:
                break
            arrival, last = part[-1]
            before = (last.event.timestamp, arrival)
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


def _entry(item_id: str, stored: Item | None, model: Recommender) -> CatalogItem:
    """The store's item, or else that of the model directory."""
    own = model.own_catalog
    at = own.index.get(item_id)
    item = stored
    if item is None:
        item = Item(item_id) if at is None else Item(item_id, own.titles[at], own.genres[at])
    return CatalogItem(item, stored is not None, at is not None, item.is_available(int(time.time())))
