"""Recommendations of a run without a server, equal to those of a server of the exported run."""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from flax import nnx

from jaxrec.config import MISSING_RATING, RatingScale
from jaxrec.data.events import Events
from jaxrec.data.histories import Histories, padded_history
from jaxrec.data.prepared import PreparedData
from jaxrec.data.schema import ITEM, RATING, TIME, TITLE, UNKNOWN_GAP, USER
from jaxrec.errors import DataError
from jaxrec.evaluation.baselines import decayed_popularity
from jaxrec.models.hybrid import Hybrid
from jaxrec.models.repeat import Repeat, SeenScores
from jaxrec.runs.directory import Run
from jaxrec.runs.policy import load_served

BATCH_USERS = 64


class KnownEvents(NamedTuple):
    """The events of `users` on items of the catalogue; `ratings` [events] and `gaps` [events] as in `Events`."""

    users: np.ndarray
    histories: Histories
    ratings: np.ndarray
    gaps: np.ndarray


def recommend(run: Run, histories: pd.DataFrame | Sequence[int] | Sequence[str], k: int = 10) -> pd.DataFrame:
    """See `Run.recommend`."""
    if k < 1:
        raise DataError(f"k is {k}, expected at least 1")
    data, supervised = run.supervised
    model = load_served(run, supervised)
    known = known_events(histories, data)
    parts = []
    counts = run.counts.until(int(time.time()))
    for users, top, scores in _best(model, data, known, counts, min(k, len(data.catalog))):
        rows, ranks = np.nonzero(scores > -np.inf)
        items = top[rows, ranks]
        columns = {
            USER: known.users[users[rows]],
            "rank": ranks + 1,
            ITEM: data.catalog.ids.decode(items),
            TITLE: [data.catalog.titles[item - 1] for item in items],
            "score": scores[rows, ranks],
        }
        parts.append(pd.DataFrame(columns))
    return pd.concat(parts, ignore_index=True)


def known_events(histories: pd.DataFrame | Sequence[int] | Sequence[str], data: PreparedData) -> KnownEvents:
    """Checks the columns, and leaves out items that are not in the catalogue.

    Users keep the order of their first rows. A history that is given as a list belongs to the user None.
    """
    frame = histories
    if not isinstance(frame, pd.DataFrame):
        frame = pd.DataFrame({USER: [None] * len(histories), ITEM: list(histories)})
    if missing := [name for name in (USER, ITEM) if name not in frame]:
        raise DataError(
            f"histories lack the column {missing[0]}; expected {USER}, {ITEM} and, if known, {RATING}, {TIME}"
        )
    if frame.empty:
        raise DataError("histories hold no event; expected at least one")
    codes, users = pd.factorize(frame[USER], use_na_sentinel=False)
    if TIME in frame:
        times = _numbers(frame[TIME], TIME).to_numpy(np.int64)
        order = np.lexsort((times, codes))
    else:
        times, order = np.zeros(len(frame), np.int64), np.argsort(codes, kind="stable")
    items = _encode(frame[ITEM], data)[order]
    ratings = _unit_ratings(frame, data.config.rating_scale)[order]
    codes, times = codes[order], times[order]
    kept = items > 0
    offsets = np.concatenate([[0], np.cumsum(np.bincount(codes[kept], minlength=len(users)))])
    found = Histories(offsets, items[kept], ratings[kept], times[kept])
    gaps = found.gaps() if len(found.items) else np.empty(0, np.float32)
    if TIME not in frame:
        gaps[gaps != UNKNOWN_GAP] = _median_gap(data)
        found = dataclasses.replace(found, times=np.cumsum(np.maximum(gaps, 0), dtype=np.float64).astype(np.int64))
    return KnownEvents(np.asarray(users), found, ratings[kept], gaps)


def _best(
    model: Hybrid, data: PreparedData, known: KnownEvents, counts: np.ndarray, k: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Users [n], their best items [n, k], best first, and these items' scores [n, k]: -inf where no item is left.

    `counts` are what the trend is made of. All batches have one shape. A user without a known event gets the most
    popular items.
    """
    graphdef, variables = nnx.split(model)
    max_length, size = model.lstm.config.max_length, min(BATCH_USERS, len(known.users))
    starts, stops = known.histories.offsets[:-1], known.histories.offsets[1:]
    needed = (starts == stops).any()  # counting reads the whole log
    popular, popularity = _most_popular(data, k) if needed else (np.zeros(k, np.int64), np.zeros(k, np.float32))
    for first in range(0, len(known.users), size):
        users = np.minimum(np.arange(first, first + size), len(known.users) - 1)
        new = min(size, len(known.users) - first)  # the last batch is filled with repeats of its last user
        lengths = np.minimum(stops - starts, max_length)[users]
        if not lengths.any():
            yield users[:new], np.tile(popular, (new, 1)), np.tile(popularity, (new, 1))
            continue
        where = np.arange(max_length) < lengths[:, None]
        rows = np.where(where, (stops[users] - lengths)[:, None] + np.arange(max_length), 0)
        events = Events(
            np.where(where, known.histories.items[rows], 0).astype(np.int32),
            np.where(where, known.ratings[rows], MISSING_RATING).astype(np.float32),
            np.where(where, known.gaps[rows], UNKNOWN_GAP).astype(np.float32),
            lengths.astype(np.int32),
        )
        exclude, seen = np.zeros((len(users), 1), np.int32), None
        if model.repeat is None:
            exclude = padded_history(known.histories.items, starts[users], stops[users], max_length)
        else:
            seen = _seen_scores(model.repeat, known, users)
        logits = np.array(_logits(graphdef, variables, events, exclude, counts, seen))
        np.put_along_axis(logits, exclude, -np.inf, axis=1)
        logits[:, 0] = -np.inf
        scores, top = jax.lax.top_k(logits, k)
        some = lengths[:, None] > 0
        yield users[:new], np.where(some, top, popular)[:new], np.where(some, scores, popularity)[:new]


def _seen_scores(repeat: Repeat, known: KnownEvents, users: np.ndarray) -> SeenScores:
    """What is added to the logits of the items of the users' whole histories, at requests without a time."""
    starts, stops = known.histories.offsets[users], known.histories.offsets[users + 1]
    items, times = (padded_history(column, starts, stops) for column in (known.histories.items, known.histories.times))
    return repeat.scores_of(items, times, np.zeros(len(users), np.int64), np.zeros(len(users), bool))


def _most_popular(data: PreparedData, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The `k` items with the most training events, ties by the recent ones; and how many events they have."""
    counts = data.train_popularity()
    popular = np.lexsort((-decayed_popularity(data)[1:], -counts[1:]))[:k] + 1
    return popular, counts[popular].astype(np.float32)


@jax.jit(static_argnums=0)
def _logits(
    graphdef: nnx.GraphDef[Hybrid],
    variables: nnx.State,
    events: Events,
    exclude: jax.Array,
    counts: jax.Array,
    seen: SeenScores | None,
) -> jax.Array:
    unknown, model = jnp.full(events.item.shape[0], UNKNOWN_GAP), nnx.merge(graphdef, variables)
    return model.logits(events, unknown, exclude=exclude, trend=model.trend(counts), seen=seen)[0]


def _encode(ids: pd.Series, data: PreparedData) -> np.ndarray:
    """[events] int32 item indices, 0 for unknown ids. Raises DataError for ids of another kind than the catalogue's."""
    if data.catalog.ids.raw_ids.dtype == np.int64:
        return data.catalog.ids.encode(_numbers(ids, ITEM).astype(np.int64))
    return data.catalog.ids.encode(ids.astype(str).astype(object))


def _numbers(values: pd.Series, name: str) -> pd.Series:
    if not pd.api.types.is_integer_dtype(values):
        raise DataError(f"the column {name} holds {values.dtype}, expected whole numbers, as in the run's data")
    return values


def _unit_ratings(frame: pd.DataFrame, scale: RatingScale | None) -> np.ndarray:
    if scale is None or RATING not in frame:
        return np.full(len(frame), MISSING_RATING, np.float32)
    ratings = frame[RATING].to_numpy(np.float64)
    outside = ratings[(ratings < scale.minimum) | (ratings > scale.maximum)]
    if len(outside):
        raise DataError(f"rating {outside[0]:g} is outside {scale}, the scale of the run's data")
    return scale.to_unit(ratings)


def _median_gap(data: PreparedData) -> float:
    """Seconds between two events of a user, in the median of the training events."""
    gaps = data.histories.gaps()[data.split.train_rows(data.histories)]
    return float(np.median(gaps[gaps != UNKNOWN_GAP]))
