"""Keeps the recurrent states of recent users, so that an answer costs one step and no replay.

What is kept of a user is the state before the last event, that event, and the items of the history. If the model never
recommends these again, their indices are enough. If it may, a row of `serve.model.repeat` is kept for each: how many
events it has and when. Then Recommend is one run of `step.onnx`, whose other output is the state for when the next
event comes. The cache is not notified of recorded events. It asks the store for the revision of the user's history,
which is one cheap read, and takes in what arrived since; so it is right too when another process recorded the events,
or a user was deleted. Other users cost nothing.

The answer is the one that `Recommender` gives to the same history sent along, up to rounding. Therefore of a history
longer than the model's `max_history` the state has read just the last `max_history` events, as training, evaluation
and `GetModelInfo` have it. Every event then moves the window, and the state is computed anew with `sequence.onnx`;
so it is when an event comes late, before the user's last one, and when many come at once.

A state that makes room for others is spilled to the store, under the version of the model that it belongs to, and comes
back from there; if there is none, or one that cannot be used, it is rebuilt from the history.
"""

import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from serve.model.events import (
    Event,
    UnknownItems,
    disliked_items,
    known_events,
    positive_count,
    unknown_items,
    with_dislikes,
)
from serve.model.features import history_features, unit_ratings
from serve.model.ranking.engine import Ranking, Step
from serve.model.ranking.live_trend import Blocked, Trend
from serve.model.recommender import Answer, Query, Recommender
from serve.model.repeat import SeenScores, item_stats, updated_stats
from serve.serving.user_state import UserState, empty_state
from serve.settings import DEFAULTS
from serve.stores.base import MOST_EVENTS, Changes, EventStore, SpilledState

STATES_CAPACITY: int = DEFAULTS["states"]
"""Users; with a state of 512 numbers and histories of 50 events about 5 KB each."""

# From so many new events on, one run over the history costs less than a step for each of them.
MOST_STEPS = 8

# A state that excludes more items than this is rebuilt from the newest events.
MOST_EXCLUDED = MOST_EVENTS + 1_000


class StateCache:
    """States for one loaded model, of at most `capacity` users. Safe to share between threads; one works at a time.

    Calls raise StoreError when the store fails, and can be repeated.
    """

    def __init__(self, model: Recommender, store: EventStore, capacity: int = STATES_CAPACITY) -> None:
        self._model = model
        self._engine = model.engine
        self._catalog = model.own_catalog
        self._repeat = model.info.repeat
        self._store = store
        self._capacity = capacity
        self._users: OrderedDict[str, UserState] = OrderedDict()
        self._forgotten = 0
        """How often a user was forgotten."""
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._users)

    def recommend(self, queries: Sequence[Query]) -> list[Answer]:
        """Answers each query: all stored users in one run of the model, and histories sent along as `Recommender`."""
        answers: dict[int, Answer] = {}
        stored: list[_Stored] = []
        replayed: list[tuple[int, Query]] = []
        # Before the lock, since a mask takes time. One trend for all: which items are new, and their scores, must be of
        # the same counts.
        trend = self._engine.trend
        masks = [() if query.user_id is None else self._model.masks(query, trend) for query in queries]
        user_ids = {query.user_id for query in queries if query.user_id is not None}
        # Before the lock: others, whose states are up to date, do not wait for the store and for a replay.
        forgotten = self._forgotten
        read = self._read(user_ids)
        asking: list[tuple[int, Query]] = []
        with self._lock:
            if forgotten != self._forgotten:
                # What was read may be of a user that was deleted since.
                read = self._read(user_ids)
            users = self._kept(read)
            for at, query in enumerate(queries):
                if query.user_id is None:
                    replayed.append((at, query))
                elif _asks_for_events(query, users[query.user_id]):
                    asking.append((at, query))
                elif users[query.user_id].known_count:
                    stored.append(_Stored(at, query, users[query.user_id], masks[at]))
                else:
                    user = users[query.user_id]
                    of_user = _OfUser(user.ignored_count, user.disliked.tolist(), user.unknown)
                    answers[at] = self._model.popular(query, *of_user)
            stepped = self._stepped(stored, trend) if stored else []
            self._make_room()
        # What follows the run of the model needs no user's state.
        for at, query in asking:
            assert query.user_id is not None
            events = self._store.history(query.user_id, query.request_time)
            replayed.append((at, query._replace(user_id=None, events=events)))
        for one, rankings, of_user in stepped:
            answers[one.at] = self._model.ranked(one.query, rankings, one.masks, trend, *of_user)
        if replayed:
            found = self._model.recommend([query for _, query in replayed])
            answers.update((at, answer) for (at, _), answer in zip(replayed, found, strict=True))
        return [answers[at] for at in range(len(queries))]

    def recommend_at_once(self, queries: Sequence[Query]) -> list[Answer] | None:
        """As `recommend`, for an event loop: it takes no more than a run of the model for states that are in memory.

        Args:
            queries: What is asked.

        Returns:
            The answers; None: a state is not in memory or not up to date, or one would have to wait for another thread
            or for the store.
        """
        user_ids = {query.user_id for query in queries if query.user_id is not None}
        trend = self._engine.trend
        if not self._lock.acquire(blocking=False):
            return None
        try:
            users = {user_id: user for user_id in user_ids if (user := self._users.get(user_id)) is not None}
            revisions = self._store.revisions_at_once(list(users))
            if revisions is None or any(user.revision != revisions[user_id] for user_id, user in users.items()):
                return None
            asked: list[tuple[Query, UserState]] = []
            for query in queries:
                user = None if query.user_id is None else users.get(query.user_id)
                if user is None or not user.known_count or _asks_for_events(query, user):
                    return None
                asked.append((query, user))
            # A mask takes time, so it is made once it is known that it is needed.
            stored = [_Stored(at, *one, self._model.masks(one[0], trend)) for at, one in enumerate(asked)]
            for user_id in users:
                self._users.move_to_end(user_id)
            stepped = self._stepped(stored, trend)
        finally:
            self._lock.release()
        return [
            self._model.ranked(one.query, rankings, one.masks, trend, *of_user) for one, rankings, of_user in stepped
        ]

    def has(self, user_id: str) -> bool:
        """Whether the state of a user is in memory."""
        return user_id in self._users

    def newest(self, user_id: str) -> int | None:
        """When a user's newest event was, in seconds, as far as it was read; None: that is not in memory. Waits for
        nothing."""
        user = self._users.get(user_id)
        return None if user is None else user.newest

    def forget(self, user_id: str) -> None:
        """Drops a user's state, once the user was deleted from the store."""
        with self._lock:
            self._forgotten += 1
            self._users.pop(user_id, None)

    def spill(self) -> None:
        """Hands all states to the store, for the next start."""
        with self._lock:
            self._save(self._users.items())

    def _stepped(self, stored: "Sequence[_Stored]", trend: Trend) -> "list[tuple[_Stored, list[Ranking], _OfUser]]":
        """The rankings of each query, and what of its user `Recommender.ranked` wants to know."""
        rows = [
            Step(
                user.before,
                user.item,
                user.rating,
                user.gap,
                -1.0 if query.request_time is None else float(query.request_time - user.last),
                self._excluded(query, user),
                self._seen_scores(query, user),
                mask,
            )
            for _, query, user, masks in stored
            for mask in masks
        ]
        ks = [self._model.asked_k(query) for _, query, _, masks in stored for _ in masks]
        queries = any(self._model.added_of(query) is not None for _, query, _, _ in stored)
        found = []
        results = iter(self._engine.step(rows, ks, trend, queries=queries))
        for one in stored:
            user, rankings = one.user, []
            for _ in one.masks:
                ranking, user.after = next(results)
                rankings.append(ranking)
            found.append((one, rankings, _OfUser(user.ignored_count, user.disliked.tolist(), user.unknown)))
        return found

    def _seen_scores(self, query: Query, user: UserState) -> SeenScores | None:
        if self._repeat is None:
            return None
        return self._repeat.scores_of(user.stats, user.known_count, user.last, query.request_time)

    def _excluded(self, query: Query, user: UserState) -> NDArray[np.int32]:
        seen = user.exclude
        if query.allow_seen is not None:
            # `stats` has the items of the history if the model may recommend them again, `exclude` otherwise.
            items = np.zeros(0, np.int32) if query.allow_seen else np.union1d(user.stats["item"], user.exclude)
            seen = np.append(items, 0).astype(np.int32)[None]
        if not query.exclude_item_ids and not len(user.disliked):
            return seen
        more = np.array([self._model.indices(query.exclude_item_ids)], np.int32)
        return np.concatenate([seen, more, user.disliked[None]], axis=1)

    def _read(self, user_ids: Iterable[str]) -> "dict[str, _Read]":
        """The users' states as of their stored histories."""
        before = {user_id: self._users.get(user_id) for user_id in user_ids}
        now = self._brought_up({user_id: user or self._unspilled(user_id) for user_id, user in before.items()})
        return {user_id: _Read(before[user_id], now[user_id]) for user_id in now}

    def _kept(self, read: "Mapping[str, _Read]") -> dict[str, UserState]:
        """Takes states into memory, and gives those that are current. Another call may have read later ones meanwhile:
        revisions grow, and a user without one was deleted before or after that."""
        current: dict[str, UserState] = {}
        for user_id, (before, now) in read.items():
            there = self._users.get(user_id)
            is_later = there is not None and there is not before and 0 < now.revision <= there.revision
            user = current[user_id] = there if there is not None and is_later else now
            if user.revision:
                self._users[user_id] = user
                self._users.move_to_end(user_id)
            else:
                # Ids that nobody has recorded an event for are without number, and would push out all others.
                self._users.pop(user_id, None)
        return current

    def _brought_up(self, kept: "Mapping[str, UserState | None]") -> dict[str, UserState]:
        """States as of the stored histories, from earlier ones or from nothing. Needs no lock, and changes none of
        them."""
        current: dict[str, UserState] = {}
        unread: dict[str, _Unread] = {}
        known = [user_id for user_id, user in kept.items() if user is not None]
        revisions = self._store.revisions(known) if known else {}
        for user_id, user in kept.items():
            if user is None:
                unread[user_id] = _Unread(self._store.changes(user_id))
                continue
            if user.revision != revisions[user_id]:
                changes = self._store.changes(user_id, user.revision)
                advanced = None if changes.complete else self._advanced(user, changes)
                if advanced is None:
                    unread[user_id] = _Unread(changes) if changes.complete else self._to_be_read(user_id, user, changes)
                    continue
                current[user_id] = advanced
            else:
                current[user_id] = user
        current.update(self._rebuilt(unread))
        return current

    def _advanced(self, user: UserState, changes: Changes) -> UserState | None:
        """The state with events that arrived; None where that takes a rebuild."""
        disliked = self._disliked(user, changes.events)
        if disliked is None or (self._repeat is not None and not _is_whole(user, changes)):
            return None
        known = known_events(changes.events, self._catalog)
        if known and (
            not user.known_count
            or known[0].timestamp < user.last
            or len(known) > MOST_STEPS
            or user.known_count + len(known) > self._model.info.max_history
        ):
            return None
        user = replace(user, revision=changes.revision, spilled=False)
        user.newest = max([user.newest, *(event.timestamp for event in changes.events)])
        positive = positive_count(changes.events)
        user.ignored_count += positive - len(known)
        user.negative_count += len(changes.events) - positive
        user.disliked = disliked
        user.unknown = unknown_items(changes.events, self._catalog, user.unknown)
        if not known:
            return user
        if self._repeat is not None:
            user.stats = updated_stats(user.stats, user.known_count, known)
        else:
            user.exclude = np.concatenate([user.exclude, np.array([[event.item for event in known]], np.int32)], axis=1)
        user.known_count += len(known)
        ratings = unit_ratings([event.rating for event in known], self._model.info.rating_scale, missing=-1)
        for at, event in enumerate(known):
            if user.after is None:
                nothing = np.zeros((1, 1), np.int32)
                step = Step(user.before, user.item, user.rating, user.gap, -1.0, nothing)
                ((_, user.after),) = self._engine.step([step], 1)
            user.before, user.after = user.after, None
            user.item, user.rating = np.array([event.item], np.int32), ratings[at : at + 1]
            user.gap = np.array([event.timestamp - user.last], np.int64).astype(np.float32)
            user.last = event.timestamp
        return user

    def _disliked(self, user: UserState, events: Sequence[Event]) -> NDArray[np.int32] | None:
        """The user's disliked items with events that arrived; None where the whole history has to say it, since one of
        them came late, or there are too many."""
        index, disliked = self._catalog.index, set(user.disliked.tolist())
        if all(
            event.weight > 0 and index.get(event.item_id) not in disliked and not user.unknown.get(event.item_id)
            for event in events
        ):
            return user.disliked
        if min(event.timestamp for event in events) < user.newest or len(disliked) + len(events) > MOST_EXCLUDED:
            return None
        return np.array(list(with_dislikes(user.disliked.tolist(), events, self._catalog)), np.int32)

    def _to_be_read(self, user_id: str, user: UserState, changes: Changes) -> "_Unread":
        """What a rebuild needs, once some events arrived: of a history that is longer than the model reads, only what
        the model reads. Else every event of a user with thousands of them would cost as much as all of those."""
        window, new = self._model.info.max_history, known_events(changes.events, self._catalog)
        if self._repeat is not None:
            # A late event changes the places of those after it, and the stats must not count events that are not read.
            keepable = _is_whole(user, changes) and not (new and new[0].timestamp < user.last)
        else:
            keepable = user.exclude.shape[1] < MOST_EXCLUDED
        if user.known_count > window and keepable and self._disliked(user, changes.events) is not None:
            # Some may be on items that the model does not know.
            recent = self._store.changes(user_id, 0, 2 * window)
            known = known_events(recent.events, self._catalog)
            if recent.revision == changes.revision and len(known) > window:
                return _Unread(recent, user, changes.events)
        return _Unread(self._store.changes(user_id))

    def _rebuilt(self, unread: "dict[str, _Unread]") -> dict[str, UserState]:
        """States from whole histories, or from the ends of long ones, all in one replay."""
        rebuilt = {}
        rows, replayed = [], []
        for user_id, (changes, before, new) in unread.items():
            known = known_events(changes.events, self._catalog)
            user = rebuilt[user_id] = empty_state(changes, len(known), self._engine.state_width)
            disliked = None if before is None else self._disliked(before, new)
            if disliked is None:
                disliked = np.array(disliked_items(changes.events, self._catalog), np.int32)
            user.disliked = disliked
            if before is None:
                user.unknown = unknown_items(changes.events, self._catalog)
            else:
                user.unknown = unknown_items(new, self._catalog, before.unknown)
            if not known:
                continue
            row = history_features(known, self._model.info)
            user.known_count, user.last = len(known), known[-1].timestamp
            user.item, user.rating, user.gap = row.item[-1:].copy(), row.rating[-1:].copy(), row.gap[-1:].copy()
            arrived = known_events(new, self._catalog)
            if self._repeat is None:
                items = np.array([event.item for event in known], np.int32)
                if before is not None:
                    # Late ones need not be at the end.
                    items = np.union1d(before.exclude, [*(event.item for event in arrived), *items]).astype(np.int32)
                user.exclude = np.unique(items)[None]
            elif before is None:
                user.stats = item_stats(known)
            else:
                user.stats = updated_stats(before.stats, before.known_count, arrived)
            if before is not None:
                user.known_count = before.known_count + len(arrived)
                positive = positive_count(new)
                user.ignored_count = before.ignored_count + positive - len(arrived)
                user.negative_count = before.negative_count + len(new) - positive
                user.newest = max(before.newest, user.newest)
            if len(row.item) > 1:
                rows.append(row.without_last())
                replayed.append(user)
        for user, (_, state) in zip(replayed, self._engine.replay(rows), strict=True):
            user.before = state
        return rebuilt

    def _unspilled(self, user_id: str) -> UserState | None:
        found = self._store.load_state(user_id, self._model.info.model_version)
        return found and UserState.from_bytes(
            *(found.revision, found.state, self._engine.state_width, self._model.info.item_count),
            self._repeat is not None,
        )

    def _make_room(self) -> None:
        leaving = [self._users.popitem(last=False) for _ in range(len(self._users) - self._capacity)]
        if leaving:
            self._save(leaving)

    def _save(self, users: Iterable[tuple[str, UserState]]) -> None:
        """Not of users without known events, whose histories are as quickly read again."""
        version = self._model.info.model_version
        changed = [(user_id, user) for user_id, user in users if user.known_count and not user.spilled]
        if changed:
            self._store.save_states(
                [SpilledState(user_id, version, user.revision, user.to_bytes()) for user_id, user in changed]
            )
        for _, user in changed:
            user.spilled = True


class _Stored(NamedTuple):
    """A query that a state answers."""

    at: int
    query: Query
    user: UserState
    masks: Sequence[Blocked | None]
    """See `Recommender.masks`."""


class _OfUser(NamedTuple):
    """As the last arguments of `Recommender.ranked`."""

    ignored_event_count: int
    disliked: Sequence[int]
    unknown: UnknownItems


class _Read(NamedTuple):
    """A state as of the stored history."""

    before: UserState | None
    """That which was in memory then."""
    now: UserState


class _Unread(NamedTuple):
    """What a state is rebuilt from."""

    changes: Changes
    """The history, or with `before` its end."""
    before: UserState | None = None
    """The state until now, which knows of the rest."""
    new: Sequence[Event] = ()
    """What arrived since that was."""


def _asks_for_events(query: Query, user: UserState) -> bool:
    """Whether the state is not enough: events are to be left out, or named as reasons."""
    return query.explain or (query.request_time is not None and query.request_time < user.newest)


def _is_whole(user: UserState, changes: Changes) -> bool:
    """Whether a state and what arrived since are a history that the store gives in full: of a longer one a rebuild
    would count only the newest events."""
    return user.known_count + user.ignored_count + user.negative_count + len(changes.events) <= MOST_EVENTS
