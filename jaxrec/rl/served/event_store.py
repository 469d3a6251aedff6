"""Reads what a server recommended, and the responses to it, from its event store (SQLite), in a run's item indices.

The store is only read; `serve/stores/sqlite.py` writes it.

History: a user's history at a recommendation is the events until its second, that second included, since users often
watch and ask for more within a second. Events that name this recommendation or a later one are excluded, whatever a
client's clock says. An event of the same second that names no recommendation counts as history, though the server may
not have read it, unless it is on an item of the slate (slates leave out items of the history). If the request gave its
time, later events are excluded. Events on items outside of the catalogue always are. The server does the same. The log
does not say which events came late.

Responses: an event is a response to the recommendation that it names if it comes within the attribution window, by the
event's own clock; an event before the recommendation counts as immediate. Later ones are still history of the
recommendations after them. A recommendation less than the window before the log's end is left out, since responses may
still come. The log ends with the last recommendation, by the server's clock, or with the responses, if these end later
(all but the last one in a hundred, as for the window). Events dated after now have a wrong clock and count for neither.
"""

import contextlib
import json
import sqlite3
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxrec.config import RatingScale
from jaxrec.data.catalog import Catalog
from jaxrec.errors import DataError

APPLICATION_ID = 0x6A787263
STORE_VERSION = 4
QUANTILE = 0.99  # of the responses: by when the log ends, and within which window they come by default

# Why a recommendation cannot be learned from.
SENT_ALONG = "histories that came with the request"
DETERMINISTIC = "shown without drawing (no propensities)"
UNNOTED = "logged before servers noted their temperature"
UNKNOWN_ITEM = "with an item that the run does not know"
NO_HISTORY = "to users without a known event"
STILL_OPEN = "whose responses may still come"


class History(NamedTuple):
    """Events in order: `items` int32, `ratings` float32 (raw, NaN = none), `times` int64, each [events]."""

    items: np.ndarray
    ratings: np.ndarray
    times: np.ndarray


class Recommendation(NamedTuple):
    """A slate as it was shown: `slate` [k] int32, best first, `log_propensities` [k] float64, each given the items
    above it, at the exploration's `temperature`, by the model `version` (of `ServedLog.versions`). `time`: seconds;
    `request_time`: as the request gave it, None where it did not. `excluded` [excluded] int32: items that the request
    excluded. `responses` [responses] int32 are the items of the events that respond to it, in their order (0: not in
    the catalogue), `response_ratings` [responses] float32 (raw, NaN = none)."""

    user: int
    time: int
    history: History
    slate: np.ndarray
    log_propensities: np.ndarray
    responses: np.ndarray
    response_ratings: np.ndarray
    version: int
    temperature: float
    request_time: int | None
    excluded: np.ndarray


class ServedLog(NamedTuple):
    """`recommendations` that can be learned from, in the order of users and time; `users`: raw ids, which
    `Recommendation.user` counts; `versions` of the models that showed them; `skipped`: how many others, by reason;
    `shown`: how many there are in all. `attribution_window` in seconds."""

    recommendations: list[Recommendation]
    users: list[str]
    versions: list[str]
    skipped: Mapping[str, int]
    shown: int
    attribution_window: int


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
    """One user's events by (timestamp, arrival): `named` [events] int64 is the place, among the user's recommendations,
    of the one that each names (-1: none of them), and `delays` [events] int64 how many seconds after that it came (0:
    before it, or none)."""

    history: History
    named: np.ndarray
    delays: np.ndarray


def read_served_log(path: Path, catalog: Catalog, attribution_window: int | None = None) -> ServedLog:
    """Reads the store.

    `attribution_window` in seconds; None: within which 99 % of the log's responses came, those dated after now left
    out. Raises DataError where the file is not a store, or cannot be read.
    """
    index = {str(raw): number for number, raw in enumerate(catalog.ids.raw_ids.tolist(), start=1)}
    try:
        with contextlib.closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as connection:
            _require_store(connection, path)
            connection.execute("BEGIN")  # both tables as of one moment
            shown = _read_shown(connection)
            events = _read_events(connection, index, shown)
    except sqlite3.Error as error:
        raise DataError(
            f"{path}: cannot be read ({error}); expected the event store of `python -m serve run`"
        ) from error
    came, delays = _responses_until(int(time.time()), events)
    window = _quantile(delays) if attribution_window is None else attribution_window
    every = [one for of_user in shown.values() for one in of_user]
    closed = max([_quantile(came), *(one.time for one in every)]) - window  # until then, all responses have come
    skipped: Counter[str] = Counter()
    recommendations: list[Recommendation] = []
    users: dict[str, int] = {}
    versions: dict[str, int] = {}
    for user_id, of_user in shown.items():
        for place, one in enumerate(of_user):
            reason = _unusable(one, index)
            known = None if reason else events.get(user_id)
            slate = np.array([] if known is None else [index[item] for item in one.slate], np.int32)
            history = None if known is None else _history_at(known, one, slate, place)
            if known is None or history is None or not len(history.items):
                skipped[reason or NO_HISTORY] += 1
                continue
            if one.time > closed:
                skipped[STILL_OPEN] += 1
                continue
            assert user_id is not None
            assert one.temperature is not None
            responses = (known.named == place) & (known.delays <= window)
            recommendations.append(
                Recommendation(
                    user=users.setdefault(user_id, len(users)),
                    time=one.time,
                    history=history,
                    slate=slate,
                    log_propensities=np.array(one.log_propensities, np.float64),
                    responses=known.history.items[responses],
                    response_ratings=known.history.ratings[responses],
                    version=versions.setdefault(one.version, len(versions)),
                    temperature=one.temperature,
                    request_time=one.request_time,
                    excluded=np.array([index[item] for item in one.excluded if item in index], np.int32),
                )
            )
    return ServedLog(recommendations, list(users), list(versions), dict(skipped), len(every), window)


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


def _read_shown(connection: sqlite3.Connection) -> dict[str | None, list[_Shown]]:
    """Each user's, by time and the order in which they were logged."""
    rows = connection.execute(
        "SELECT recommendation_id, user_id, model_version, timestamp, temperature, request_time, item_ids, "
        "log_propensities, excluded_item_ids FROM shown ORDER BY user_id, timestamp, number"
    )
    shown: dict[str | None, list[_Shown]] = {}
    for row in rows:
        shown.setdefault(row[1], []).append(_Shown._make((*row[:6], *(json.loads(column) for column in row[6:]))))
    return shown


def _read_events(
    connection: sqlite3.Connection, index: Mapping[str, int], shown: Mapping[str | None, list[_Shown]]
) -> dict[str | None, _UserEvents]:
    rows = connection.execute(
        "SELECT user_id, item_id, rating, timestamp, recommendation_id FROM events ORDER BY user_id, timestamp, arrival"
    )
    columns: dict[str, list[tuple[Any, ...]]] = {}
    for user_id, item_id, *rest in rows:
        columns.setdefault(user_id, []).append((index.get(item_id, 0), *rest))
    return {user_id: _user_events(events, shown.get(user_id, [])) for user_id, events in columns.items()}


def _user_events(events: list[tuple[Any, ...]], shown: list[_Shown]) -> _UserEvents:
    items, ratings, stamps, names = zip(*events, strict=True)
    raw = np.array([np.nan if rating is None else rating for rating in ratings], np.float32)
    times = np.array(stamps, np.int64)
    places = {one.recommendation_id: place for place, one in enumerate(shown)}
    named = np.array([places.get(name, -1) for name in names], np.int64)
    since = times.copy()
    since[named >= 0] = np.array([one.time for one in shown], np.int64)[named[named >= 0]]
    return _UserEvents(History(np.array(items, np.int32), raw, times), named, np.maximum(times - since, 0))


def _responses_until(now: int, events: Mapping[str | None, _UserEvents]) -> tuple[np.ndarray, np.ndarray]:
    """When the responses came that are not dated after `now`, and how many seconds after the recommendations that they
    name; each [responses] int64."""
    found = [np.zeros((2, 0), np.int64)]
    for known in events.values():
        where = (known.named >= 0) & (known.history.times <= now)
        found.append(np.stack([known.history.times[where], known.delays[where]]))
    came, delays = np.concatenate(found, axis=1)
    return came, delays


def _quantile(values: np.ndarray) -> int:
    """The least of the values that at least QUANTILE of them do not exceed; 0 where there is none."""
    return int(np.quantile(values, QUANTILE, method="inverted_cdf")) if len(values) else 0


def _unusable(one: _Shown, index: Mapping[str, int]) -> str:
    """Why never to learn from a recommendation, whatever its user did; empty: there is no reason."""
    if one.user_id is None:
        return SENT_ALONG
    if not one.log_propensities or not one.slate:
        return DETERMINISTIC
    if one.temperature is None:
        return UNNOTED
    return "" if all(item in index for item in one.slate) else UNKNOWN_ITEM


def _history_at(events: _UserEvents, one: _Shown, slate: np.ndarray, place: int) -> History:
    """The user's events on known items until a recommendation, but for those that name it or a later one, and those of
    its second on items of its `slate` [k] int32; `place`: its place among the user's recommendations."""
    until = one.time if one.request_time is None else min(one.time, one.request_time)
    stop = np.searchsorted(events.history.times, until, side="right")
    items, times = events.history.items[:stop], events.history.times[:stop]
    taken_from_it = (times == one.time) & np.isin(items, slate)
    chosen = np.flatnonzero((events.named[:stop] < place) & (items > 0) & ~taken_from_it)
    return History(*(column[chosen] for column in events.history))
