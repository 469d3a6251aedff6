"""What a server showed and what came of it, from its event store (SQLite), in the indices of a run's catalogue.

The store is read and never written; `serve/stores/sqlite.py` is its other side. A user's history at a recommendation is
the events with an earlier timestamp, and of the same second those that answer an earlier recommendation of the same
user; events that answer this recommendation or a later one are not of it, whatever a client's clock says. Where the
request told its time, events after that are left out, and events on items that the catalogue does not know always are:
as the server does. Which events came late is not in the log.

An event answers a recommendation if it names it and comes within the horizon, by the event's own clock: one that is
early counts as at once. Later ones are history of what was shown after them all the same. Of what was shown less than
the horizon before the log's end, it isn't known yet what comes of it.
"""

import contextlib
import json
import sqlite3
import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxrec.catalog import Catalog
from jaxrec.schema import DataError, RatingScale

APPLICATION_ID = 0x6A787263
STORE_VERSION = 4
DELAY_QUANTILE = 0.99  # of the log's answers come within the horizon, where none is given

# Why a recommendation cannot be learned from.
SENT_ALONG = "histories that came with the request"
DETERMINISTIC = "shown without drawing (no propensities)"
UNNOTED = "logged before servers noted their temperature"
UNKNOWN_ITEM = "with an item that the run does not know"
NO_HISTORY = "to users without a known event"
STILL_OPEN = "whose answers may still come"


class History(NamedTuple):
    """Events in order: `items` int32, `ratings` float32 (raw, NaN = none), `times` int64, each [events]."""

    items: np.ndarray
    ratings: np.ndarray
    times: np.ndarray


class Recommendation(NamedTuple):
    """A slate as it was shown: `slate` [k] int32, best first, `log_propensities` [k] float64, each given the items
    above it, at the exploration's `temperature`, by the model `version` (of `ServedLog.versions`). `time`: seconds;
    `request_time`: what the request told, None where it did not. `excluded` [excluded] int32: what it left out beside
    the history. `answers` [answers] int32 are the items of the events that answer it, in their order (0: not in the
    catalogue), `answer_ratings` [answers] float32 (raw, NaN = none)."""

    user: int
    time: int
    history: History
    slate: np.ndarray
    log_propensities: np.ndarray
    answers: np.ndarray
    answer_ratings: np.ndarray
    version: int
    temperature: float
    request_time: int | None
    excluded: np.ndarray


class ServedLog(NamedTuple):
    """`recommendations` that can be learned from, in the order of users and time; `users`: raw ids, which
    `Recommendation.user` counts; `versions` of the models that showed them; `skipped`: how many others, by reason;
    `shown`: how many there are in all. `horizon` seconds: so long after a recommendation its answers count."""

    recommendations: list[Recommendation]
    users: list[str]
    versions: list[str]
    skipped: Mapping[str, int]
    shown: int
    horizon: int


class _Shown(NamedTuple):
    """A row of the store."""

    recommendation_id: str
    user_id: str | None
    version: str
    time: int
    temperature: float | None
    request_time: int | None
    slate: list[str]
    log_propensities: list[float]
    excluded: list[str]


class _UserEvents(NamedTuple):
    """One user's events by (timestamp, arrival): `answered` is the recommendation id that each names, or None, and
    `naming` has the places of those that name one by its id."""

    history: History
    answered: list[str | None]
    naming: dict[str, list[int]]


def read_served_log(path: Path, catalog: Catalog, answers_within: int | None = None) -> ServedLog:
    """Reads the store; `answers_within`: the horizon in seconds, None: within which the log's own answers come, but for
    one in a hundred. Raises DataError where it is not a store, or cannot be read."""
    index = {str(raw): number for number, raw in enumerate(catalog.ids.raw_ids.tolist(), start=1)}
    try:
        with contextlib.closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as connection:
            _require_store(connection, path)
            connection.execute("BEGIN")  # both tables as of one moment
            events = _read_events(connection, index)
            shown = _read_shown(connection)
    except sqlite3.Error as error:
        raise DataError(
            f"{path}: cannot be read ({error}); expected the event store of `python -m serve run`"
        ) from error
    horizon = _horizon(events, shown) if answers_within is None else answers_within
    closed = _end(events, shown) - horizon  # of what was shown until then, all answers have come
    skipped: Counter[str] = Counter()
    recommendations: list[Recommendation] = []
    users: dict[str, int] = {}
    versions: dict[str, int] = {}
    not_yet: defaultdict[str | None, set[str]] = defaultdict(set)  # each user's recommendations from this one on
    for one in shown:
        not_yet[one.user_id].add(one.recommendation_id)
    earlier: set[str] = set()  # the present user's recommendations before this one
    present = None
    for one in shown:
        if one.user_id != present:
            present, earlier = one.user_id, set()
        reason = _unusable(one, index)
        known = None if reason else events.get(one.user_id)
        history = None if known is None else _history_at(known, one, earlier, not_yet[one.user_id])
        earlier.add(one.recommendation_id)
        not_yet[one.user_id].discard(one.recommendation_id)
        if known is None or history is None or not len(history.items):
            skipped[reason or NO_HISTORY] += 1
            continue
        if one.time > closed:
            skipped[STILL_OPEN] += 1
            continue
        assert one.user_id is not None
        assert one.temperature is not None
        answers = _answers(known, one, horizon)
        recommendations.append(
            Recommendation(
                user=users.setdefault(one.user_id, len(users)),
                time=one.time,
                history=history,
                slate=np.array([index[item] for item in one.slate], np.int32),
                log_propensities=np.array(one.log_propensities, np.float64),
                answers=known.history.items[answers],
                answer_ratings=known.history.ratings[answers],
                version=versions.setdefault(one.version, len(versions)),
                temperature=one.temperature,
                request_time=one.request_time,
                excluded=np.array([index[item] for item in one.excluded if item in index], np.int32),
            )
        )
    return ServedLog(recommendations, list(users), list(versions), dict(skipped), len(shown), horizon)


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


def _read_events(connection: sqlite3.Connection, index: Mapping[str, int]) -> dict[str | None, _UserEvents]:
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
    naming: dict[str, list[int]] = {}
    for at, recommendation_id in enumerate(answered):
        if recommendation_id is not None:
            naming.setdefault(recommendation_id, []).append(at)
    history = History(np.array(items, np.int32), raw, np.array(times, np.int64))
    return _UserEvents(history, list(answered), naming)


def _read_shown(connection: sqlite3.Connection) -> list[_Shown]:
    """By user, time and the order in which they were logged."""
    rows = connection.execute(
        "SELECT recommendation_id, user_id, model_version, timestamp, temperature, request_time, item_ids, "
        "log_propensities, excluded_item_ids FROM shown ORDER BY user_id, timestamp, number"
    )
    return [_Shown._make((*row[:6], *(json.loads(column) for column in row[6:]))) for row in rows]


def _delays(known: _UserEvents, one: _Shown) -> np.ndarray:
    """[events that name it] int64: how many seconds after a recommendation each of them came."""
    return np.maximum(known.history.times[known.naming.get(one.recommendation_id, [])] - one.time, 0)


def _answers(known: _UserEvents, one: _Shown, horizon: int) -> np.ndarray:
    """Places of the events that answer a recommendation."""
    naming = np.array(known.naming.get(one.recommendation_id, []), np.int64)
    return naming[_delays(known, one) <= horizon]


def _horizon(events: Mapping[str | None, _UserEvents], shown: list[_Shown]) -> int:
    """Within which DELAY_QUANTILE of the answers came; 0 where none came."""
    delays = [_delays(known, one) for one in shown if (known := events.get(one.user_id))]
    found = np.concatenate([np.zeros(0, np.int64), *delays])
    return int(np.quantile(found, DELAY_QUANTILE, method="inverted_cdf")) if len(found) else 0


def _end(events: Mapping[str | None, _UserEvents], shown: list[_Shown]) -> int:
    """The latest time in the log; a client's clock may be ahead of this one, but the log is not."""
    of_events = (int(known.history.times[-1]) for known in events.values())
    return min(max([0, *(one.time for one in shown), *of_events]), int(time.time()))


def _unusable(one: _Shown, index: Mapping[str, int]) -> str:
    """Why never to learn from a recommendation, whatever its user did; empty: there is no reason."""
    if one.user_id is None:
        return SENT_ALONG
    if not one.log_propensities or not one.slate:
        return DETERMINISTIC
    if one.temperature is None:
        return UNNOTED
    return "" if all(item in index for item in one.slate) else UNKNOWN_ITEM


def _history_at(events: _UserEvents, one: _Shown, earlier: set[str], not_yet: set[str]) -> History:
    """The user's events on known items before a recommendation; `not_yet`: the ids of this one and of later ones."""
    times = events.history.times
    before, stop = np.searchsorted(times, [one.time, one.time + 1])
    kept = [at for at in range(before) if events.answered[at] not in not_yet]
    kept += [at for at in range(before, stop) if events.answered[at] in earlier]
    until = times[-1] if one.request_time is None else one.request_time
    chosen = np.array([at for at in kept if events.history.items[at] and times[at] <= until], np.int64)
    return History(*(column[chosen] for column in events.history))
