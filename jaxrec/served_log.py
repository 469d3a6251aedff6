"""What a server showed and what came of it, from its event store (SQLite), in the indices of a run's catalogue.

The store is read and never written; `serve/stores/sqlite.py` is its other side. A user's history at a recommendation is
the events with an earlier timestamp, and of the same second those that answer an earlier recommendation of the same
user; events that answer this recommendation or a later one are not of it, whatever a client's clock says. Events on
items that the catalogue does not know are left out, as the server does. What a request excluded, a time that it set
itself, and events that came late are not in the log: such recommendations are told from others only by propensities
that do not fit.
"""

import contextlib
import json
import sqlite3
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxrec.catalog import Catalog
from jaxrec.schema import DataError, RatingScale

APPLICATION_ID = 0x6A787263
STORE_VERSION = 3

# Why a recommendation cannot be learned from.
SENT_ALONG = "histories that came with the request"
DETERMINISTIC = "shown without drawing (no propensities)"
UNKNOWN_ITEM = "with an item that the run does not know"
NO_HISTORY = "to users without a known event"


class History(NamedTuple):
    """Events in order: `items` int32, `ratings` float32 (raw, NaN = none), `times` int64, each [events]."""

    items: np.ndarray
    ratings: np.ndarray
    times: np.ndarray


class Recommendation(NamedTuple):
    """A slate as it was shown: `slate` [k] int32, best first, `log_propensities` [k] float64, each given the items
    above it. `answers` [answers] int32 are the items of the events that name it, in their order (0: not in the
    catalogue), `answer_ratings` [answers] float32 (raw, NaN = none). `time`: seconds."""

    user: int
    time: int
    history: History
    slate: np.ndarray
    log_propensities: np.ndarray
    answers: np.ndarray
    answer_ratings: np.ndarray


class ServedLog(NamedTuple):
    """`recommendations` that can be learned from, in the order of users and time; `users`: raw ids, which
    `Recommendation.user` counts; `skipped`: how many others, by reason; `shown`: how many there are in all."""

    recommendations: list[Recommendation]
    users: list[str]
    skipped: Mapping[str, int]
    shown: int


class _UserEvents(NamedTuple):
    """One user's events by (timestamp, arrival): `answered` is the recommendation id that each names, or None."""

    history: History
    answered: list[str | None]


def read_served_log(path: Path, catalog: Catalog) -> ServedLog:
    """Reads the store. Raises DataError where it is not one, or cannot be read."""
    index = {str(raw): number for number, raw in enumerate(catalog.ids.raw_ids.tolist(), start=1)}
    try:
        with contextlib.closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as connection:
            _require_store(connection, path)
            connection.execute("BEGIN")  # both tables as of one moment
            events = _read_events(connection, index)
            shown = connection.execute(
                "SELECT recommendation_id, user_id, item_ids, log_propensities, timestamp FROM shown "
                "ORDER BY user_id, timestamp, number"
            ).fetchall()
    except sqlite3.Error as error:
        raise DataError(
            f"{path}: cannot be read ({error}); expected the event store of `python -m serve run`"
        ) from error
    skipped: Counter[str] = Counter()
    recommendations: list[Recommendation] = []
    users: dict[str, int] = {}
    not_yet: defaultdict[str | None, set[str]] = defaultdict(set)  # each user's recommendations from this one on
    for recommendation_id, user_id, *_ in shown:
        not_yet[user_id].add(recommendation_id)
    earlier: set[str] = set()  # the present user's recommendations before this one
    present = None
    for recommendation_id, user_id, item_ids, log_propensities, timestamp in shown:
        if user_id != present:
            present, earlier = user_id, set()
        known = events.get(user_id)
        slate, propensities = json.loads(item_ids), json.loads(log_propensities)
        reason = _unusable(user_id, slate, propensities, index)
        history = None if reason or known is None else _history_at(known, timestamp, earlier, not_yet[user_id])
        earlier.add(recommendation_id)
        not_yet[user_id].discard(recommendation_id)
        if reason or known is None or history is None or not len(history.items):
            skipped[reason or NO_HISTORY] += 1
            continue
        answers = [number for number, answered in enumerate(known.answered) if answered == recommendation_id]
        recommendations.append(
            Recommendation(
                users.setdefault(user_id, len(users)),
                timestamp,
                history,
                np.array([index[item] for item in slate], np.int32),
                np.array(propensities, np.float64),
                known.history.items[answers],
                known.history.ratings[answers],
            )
        )
    return ServedLog(recommendations, list(users), dict(skipped), len(shown))


def unit_ratings(ratings: np.ndarray, scale: RatingScale | None) -> np.ndarray:
    """[events] float32: ratings scaled to 0..1, MISSING_RATING where there is none or the run knows no scale."""
    return (scale or RatingScale(0.0, 1.0)).to_unit(ratings if scale else np.full(len(ratings), np.nan))


def _require_store(connection: sqlite3.Connection, path: Path) -> None:
    (application_id,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if application_id != APPLICATION_ID or version != STORE_VERSION:
        raise DataError(
            f"{path}: a database of application {application_id} in version {version}, expected an event store "
            f"({APPLICATION_ID}) in version {STORE_VERSION}; a server of this version brings an older one up to date"
        )


def _read_events(connection: sqlite3.Connection, index: Mapping[str, int]) -> dict[str, _UserEvents]:
    rows = connection.execute(
        "SELECT user_id, item_id, rating, timestamp, recommendation_id FROM events ORDER BY user_id, timestamp, arrival"
    )
    columns: dict[str, list[tuple[Any, ...]]] = {}
    for user_id, item_id, *rest in rows:
        columns.setdefault(user_id, []).append((index.get(item_id, 0), *rest))
    return {user_id: _user_events(events) for user_id, events in columns.items()}


def _user_events(events: list[tuple[Any, ...]]) -> _UserEvents:
    items, ratings, times, answered = zip(*events, strict=True)
    raw = np.array([np.nan if rating is None else rating for rating in ratings], np.float32)
    return _UserEvents(History(np.array(items, np.int32), raw, np.array(times, np.int64)), list(answered))


def _unusable(user_id: str | None, slate: list[str], propensities: list[float], index: Mapping[str, int]) -> str:
    """Why not to learn from a recommendation; empty: there is no reason."""
    if user_id is None:
        return SENT_ALONG
    if not propensities or not slate:
        return DETERMINISTIC
    return "" if all(item in index for item in slate) else UNKNOWN_ITEM


def _history_at(events: _UserEvents, timestamp: int, earlier: set[str], not_yet: set[str]) -> History:
    """The user's events on known items before a recommendation; `not_yet`: the ids of this one and of later ones."""
    before, stop = np.searchsorted(events.history.times, [timestamp, timestamp + 1])
    kept = [at for at in range(before) if events.answered[at] not in not_yet]
    kept += [at for at in range(before, stop) if events.answered[at] in earlier]
    chosen = np.array([at for at in kept if events.history.items[at]], np.int64)
    return History(*(column[chosen] for column in events.history))
