"""Reads what a server recommended, and the responses to it, from its event store (SQLite), in a run's item indices.

The store is only read; `serve/stores/sqlite/store.py` writes it.

History: a user's history at a recommendation is the events until its second, that second included, since users often
watch and ask for more within a second. Events that name this recommendation or a later one are excluded, whatever a
client's clock says. An event of the same second that names no recommendation counts as history, though the server may
not have read it, unless it is on an item of the slate (slates leave out items of the history). If the request gave its
time, later events are excluded. Events on items outside of the catalogue always are. The server does the same. The log
does not say which events came late.

Request options: with a filter, `seen` or reserved places for new items, a request may have ranked other items than the
model alone would have. The server notes which of these options were set, but not their values. The propensities cannot
be computed again without them, so these slates are left out. So are slates for which events were sent along with the
user (`history`): these are not stored. What `not_shown_within` excluded is noted. The items that were hidden or not
available are noted as excluded items. If they were too many to be noted, the server notes the option
`catalogue` instead, and the slate is left out. Slates of requests that named their model version (`model_version`) are
used like others.

Only positive events count, as history and as responses. A slate's `excluded_item_ids` include the items that the user
disliked, and those that were hidden or not available.

Impressions: if a client recorded which items of a slate were shown, the slate counts as far as that. If they are the
first ones of the slate in its order, the slate is cut after them: the propensities of the items that are left do not
depend on those below, so they stay exact, and an item that was not shown has neither propensity nor reward. Other
slates with impressions are left out: the chance that just these items were shown is not known. A slate without
impressions counts as a whole if it is earlier than the first slate that has some. Later ones are left out: clients
recorded impressions by then, so the slate was not displayed.

Responses: an event is a response to the recommendation that it names if it comes within the attribution window, by the
event's own clock; an event before the recommendation counts as immediate. Later ones are still history of the
recommendations after them. A recommendation less than the window before the log's end is left out, since responses may
still come. The log ends with the last recommendation, by the server's clock, or with the responses, if these end later
(all but the last one in a hundred, as for the window). Events dated after now have a wrong clock and count for neither.
"""

import contextlib
import itertools
import json
import math
import sqlite3
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxrec.config import RatingScale
from jaxrec.data.catalog import Catalog
from jaxrec.errors import DataError
from jaxrec.rl.served.recommendations import NO_REQUEST_TIME, History, Recommendations, RecommendationsWriter
from jaxrec.rl.served.trends import ArrivedEvents, Moment

APPLICATION_ID = 0x6A787263
STORE_VERSION = 10
NOT_DRAWN = frozenset({"new_item_slots", "rules"})
# What the first excluded is noted as excluded items; the second says which model answered, as the slate does.
HARMLESS = frozenset({"not_shown_within", "model_version"})
QUANTILE = 0.99  # of the responses: by when the log ends, and within which window they come by default

# Why a recommendation cannot be learned from.
SENT_ALONG = "histories that came with the request"
DETERMINISTIC = "shown without drawing (no propensities)"
OPTIONS = "ranked with options of the request (filter, seen, new_item_slots, rules, events), or many items were hidden"
UNNOTED = "logged before servers noted their temperature"
UNKNOWN_ITEM = "with an item that the run does not know"
SHOWN_OTHERWISE = "shown in another order, or with gaps"
NOT_SHOWN = "of which no item was shown (no impressions, though other slates have some)"
NO_HISTORY = "to users without a known event"
STILL_OPEN = "whose responses may still come"


class ServedLog(NamedTuple):
    """`recommendations` that can be learned from, in the order of users and time; `users`: raw ids, which
    `Recommendation.user` counts; `versions` of the models that showed them; `skipped`: how many others, by reason;
    `shown`: how many there are in all. `attribution_window` in seconds. `moments`: which counts of
    events the trends were made of that ranked them; `Recommendation.moment` is a place in it, from 1 on."""

    recommendations: Recommendations
    users: list[str]
    versions: list[str]
    skipped: Mapping[str, int]
    shown: int
    attribution_window: int
    moments: list[Moment]


class _Shown(NamedTuple):
    """A row of the store."""

    recommendation_id: str
    user_id: str
    version: str
    time: int
    temperature: float | None
    request_time: int | None
    moment: Moment | None
    slate: list[str]
    log_propensities: list[float]
    excluded: list[str]
    options: list[str]
    answered: int
    """How many items the answer had, also if `slate` is cut to those that were shown."""
    left_out: str = ""
    """Why what a client recorded as shown cannot be used; empty: it can."""


class _UserEvents(NamedTuple):
    """One user's events by (timestamp, arrival): `named` [events] int64 is the place, among the user's recommendations,
    of the one that each names (-1: none of them), and `delays` [events] int64 how many seconds after that it came (0:
    before it, or none). `known` [known] int64: which ones are on items of the catalogue. `weights` [events] float32:
    what they count as responses."""

    history: History
    named: np.ndarray
    delays: np.ndarray
    known: np.ndarray
    weights: np.ndarray


def read_served_log(path: Path, catalog: Catalog, attribution_window: int | None = None) -> ServedLog:
    """Reads the store, the rows of one user at a time.

    `attribution_window` in seconds; None: within which 99 % of the log's responses came, those dated after now left
    out. Raises DataError where the file is not a store, or cannot be read.
    """
    with _opened(path) as connection:
        return _read_log(connection, _index(catalog), attribution_window)


def read_arrived_events(path: Path, catalog: Catalog) -> tuple[ArrivedEvents, int]:
    """The positive events of all users, and the time in seconds of the last event that the server's counts began with
    (0: they began with none).

    Raises DataError as `read_served_log`.
    """
    index = _index(catalog)
    with _opened(path) as connection:
        ((until,),) = connection.execute("SELECT coalesce(max(counted_until), 0) FROM trend_start").fetchall()
        rows = connection.execute("SELECT item_id, timestamp, arrival FROM events WHERE weight > 0 ORDER BY arrival")
        known = ((index[item], *rest) for item, *rest in rows if item in index)
        found = np.fromiter(known, [("item", np.int32), ("time", np.int64), ("arrival", np.int64)])
    return ArrivedEvents(*(np.ascontiguousarray(found[name]) for name in ("item", "time", "arrival"))), until


def _index(catalog: Catalog) -> dict[str, int]:
    """The items' places in the catalogue by raw id as text, from 1 on."""
    return {str(raw): number for number, raw in enumerate(catalog.ids.raw_ids.tolist(), start=1)}


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[sqlite3.Connection]:
    """The store as of one moment; DataError for what is none, or cannot be read."""
    try:
        with contextlib.closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as connection:
            connection.execute("BEGIN")
            _require_store(connection, path)
            yield connection
    except sqlite3.Error as error:
        raise DataError(
            f"{path}: cannot be read ({error}); expected the event store of `python -m serve run`"
        ) from error


def _read_log(connection: sqlite3.Connection, index: Mapping[str, int], attribution_window: int | None) -> ServedLog:
    end, usual = (_quantile(column) for column in _responses_until(int(time.time()), connection))
    window = usual if attribution_window is None else attribution_window
    count, last, sent_along = connection.execute(
        "SELECT count(*), coalesce(max(timestamp), 0), count(*) - count(user_id) FROM shown"
    ).fetchone()
    ((first,),) = connection.execute(
        "SELECT min(timestamp) FROM shown WHERE recommendation_id IN (SELECT recommendation_id FROM shown_items)"
    ).fetchall()
    since = math.inf if first is None else first  # the first slate with impressions
    closed = max(end, last) - window  # until then, all responses have come
    skipped = Counter({SENT_ALONG: sent_along} if sent_along else {})
    users: list[str] = []
    versions: dict[str, int] = {}
    moments: dict[Moment, int] = {}
    writer = RecommendationsWriter()
    for user_id, of_slates in _shown_by_user(connection):
        shown = _shown_items(connection, user_id)
        of_user = [_as_shown(one, shown.get(one.recommendation_id), since) for one in of_slates]
        events = _read_events(connection, user_id, of_user, index)
        first = None
        for place, one in enumerate(of_user):
            reason = _unusable(one, index)
            slate = np.array([] if reason else [index[item] for item in one.slate], np.int32)
            stop, left_out = _history_at(events, one, slate, place)
            if reason or stop == len(left_out):
                skipped[reason or NO_HISTORY] += 1
                continue
            if one.time > closed:
                skipped[STILL_OPEN] += 1
                continue
            if first is None:
                first = writer.add_events(History(*(column[events.known] for column in events.history)))
                users.append(user_id)
            assert one.temperature is not None
            responses = (events.named == place) & (events.delays <= window)
            writer.add(
                {
                    "user": len(users) - 1,
                    "time": one.time,
                    "first": first,
                    "stop": first + stop,
                    "left_out": left_out,
                    "slate": slate,
                    "log_propensities": np.array(one.log_propensities, np.float64),
                    "responses": events.history.items[responses],
                    "response_ratings": events.history.ratings[responses],
                    "response_weights": events.weights[responses],
                    "version": versions.setdefault(one.version, len(versions)),
                    "temperature": one.temperature,
                    "answered": one.answered,
                    "request_time": NO_REQUEST_TIME if one.request_time is None else one.request_time,
                    "moment": 0 if one.moment is None else moments.setdefault(one.moment, len(moments) + 1),
                    "excluded": np.array([index[item] for item in one.excluded if item in index], np.int32),
                }
            )
    return ServedLog(writer.finish(), users, list(versions), dict(skipped), count, window, list(moments))


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


def _shown_by_user(connection: sqlite3.Connection) -> Iterator[tuple[str, list[_Shown]]]:
    """Each user's, by time and the order in which they were logged."""
    rows = connection.execute(
        "SELECT recommendation_id, user_id, model_version, timestamp, temperature, request_time, trend_time, "
        "trend_arrival, item_ids, log_propensities, excluded_item_ids, request_options FROM shown "
        "WHERE user_id IS NOT NULL ORDER BY user_id, timestamp, number"
    )
    for user_id, of_user in itertools.groupby(rows, key=lambda row: row[1]):
        yield user_id, [_shown(row) for row in of_user]


def _shown(row: Sequence[Any]) -> _Shown:
    moment = None if row[6] is None else Moment(row[6], row[7])
    return _Shown._make((*row[:6], moment, *(json.loads(column) for column in row[8:]), len(json.loads(row[8])), ""))


def _shown_items(connection: sqlite3.Connection, user_id: str) -> dict[str, list[tuple[int, str]]]:
    """Positions and items that clients recorded as shown of a user's slates, by recommendation."""
    rows = connection.execute(
        "SELECT recommendation_id, position, item_id FROM shown JOIN shown_items USING (recommendation_id)"
        " WHERE user_id = ?",
        (user_id,),
    )
    found: dict[str, list[tuple[int, str]]] = {}
    for name, position, item in rows:
        found.setdefault(name, []).append((position, item))
    return found


def _as_shown(one: _Shown, shown: list[tuple[int, str]] | None, since: float) -> _Shown:
    """The slate cut to what was shown of it; None: nothing was recorded, as before `since` in seconds."""
    if shown is None:
        return one if one.time < since else one._replace(left_out=NOT_SHOWN)
    first, items = one.slate[: len(shown)], [item for position, item in sorted(shown) if position]
    # Those without a position are taken to be in the order of the slate.
    in_order = not items or items == [item for item in first if item in set(items)]
    if {item for _, item in shown} != set(first) or not in_order:
        return one._replace(left_out=SHOWN_OTHERWISE)
    return one._replace(slate=first, log_propensities=one.log_propensities[: len(first)])


def _read_events(
    connection: sqlite3.Connection, user_id: str, shown: list[_Shown], index: Mapping[str, int]
) -> _UserEvents:
    rows = connection.execute(
        "SELECT item_id, rating, timestamp, recommendation_id, weight FROM events WHERE user_id = ? AND weight > 0 "
        "ORDER BY timestamp, arrival",
        (user_id,),
    ).fetchall()
    items = np.array([index.get(row[0], 0) for row in rows], np.int32)
    ratings = np.array([np.nan if row[1] is None else row[1] for row in rows], np.float32)
    times = np.array([row[2] for row in rows], np.int64)
    places = {one.recommendation_id: place for place, one in enumerate(shown)}
    named = np.array([places.get(row[3], -1) for row in rows], np.int64)
    since = times.copy()
    since[named >= 0] = np.array([one.time for one in shown], np.int64)[named[named >= 0]]
    delays, weights = np.maximum(times - since, 0), np.array([row[4] for row in rows], np.float32)
    return _UserEvents(History(items, ratings, times), named, delays, np.flatnonzero(items > 0), weights)


def _responses_until(now: int, connection: sqlite3.Connection) -> tuple[np.ndarray, np.ndarray]:
    """When the responses came that are not dated after `now`, and how many seconds after the recommendations that they
    name (0: before); each [responses] int64."""
    rows = connection.execute(
        "SELECT events.timestamp, max(events.timestamp - shown.timestamp, 0) FROM events JOIN shown "
        "ON shown.recommendation_id = events.recommendation_id AND shown.user_id = events.user_id "
        "WHERE events.timestamp <= ? AND events.weight > 0",
        (now,),
    )
    found = np.fromiter(rows, [("came", np.int64), ("delay", np.int64)])
    return found["came"], found["delay"]


def _quantile(values: np.ndarray) -> int:
    """The least of the values that at least QUANTILE of them do not exceed; 0 where there is none."""
    return int(np.quantile(values, QUANTILE, method="inverted_cdf")) if len(values) else 0


def _unusable(one: _Shown, index: Mapping[str, int]) -> str:
    """Why never to learn from a recommendation, whatever its user did; empty: there is no reason."""
    options = [option for option in one.options if option not in HARMLESS]
    # Without propensities, but a server with --explore has none here either.
    if NOT_DRAWN.intersection(options) or (options and not one.slate):
        return OPTIONS
    if not one.log_propensities or not one.slate:
        return DETERMINISTIC
    if options:
        return OPTIONS
    if one.left_out:
        return one.left_out
    if one.temperature is None:
        return UNNOTED
    return "" if all(item in index for item in one.slate) else UNKNOWN_ITEM


def _history_at(events: _UserEvents, one: _Shown, slate: np.ndarray, place: int) -> tuple[int, np.ndarray]:
    """How many of the user's events on known items came until a recommendation, and which of these are no history of
    it: those that name it or a later one, and those of its second on items of its `slate` [k] int32. `place`: its place
    among the user's recommendations."""
    until = one.time if one.request_time is None else min(one.time, one.request_time)
    times = events.history.times[events.known]
    stop = int(np.searchsorted(times, until, side="right"))
    rows = events.known[:stop]
    taken_from_it = (times[:stop] == one.time) & np.isin(events.history.items[rows], slate)
    return stop, np.flatnonzero((events.named[rows] >= place) | taken_from_it)
