"""Scorers without gradient training: what a model must beat, and the answer for a user without history."""

import jax
import numpy as np

from jaxrec.data.batches import CaseBatch
from jaxrec.data.events import Events
from jaxrec.data.prepared import PreparedData
from jaxrec.data.schema import SECONDS_PER_DAY
from jaxrec.evaluation.metrics import ndcg
from jaxrec.evaluation.ranking import rank_cases
from jaxrec.evaluation.scorers import Scorer, compiled_scorer
from jaxrec.models.cooccurrence import CoOccurrence, recent_items

RECENT_HALF_LIFE_DAYS = 30.0
RECENT_WINDOWS_DAYS = (1.0, 7.0, 30.0, 90.0, 365.0)


def popularity_scorer(data: PreparedData) -> Scorer:
    """The number of training events of each item, the same for every case."""
    return constant_scorer(data.train_popularity())


def constant_scorer(scores: np.ndarray) -> Scorer:
    """The same scores [items + 1] for every case."""
    return lambda batch: np.broadcast_to(scores.astype(np.float32), (len(batch.target), len(scores)))


def recent_popularity_scorer(data: PreparedData, window_days: float) -> Scorer:
    """Training events of the `window_days` before each case's time, so that nothing later is counted.

    The case's time is the request time, or the time of the history's last event where the request time is not given.
    The whole log's popularity, scaled below one event, breaks ties, and is all that is left without any time.
    """
    rows = data.split.train_rows(data.histories)
    rows = rows[np.argsort(data.histories.times[rows], kind="stable")]
    times, items = data.histories.times[rows], data.histories.items[rows]
    popularity = data.train_popularity()
    tie_break = popularity / (popularity.sum() + 1.0)

    def scores(batch: CaseBatch) -> np.ndarray:
        starts = np.searchsorted(times, batch.time - window_days * SECONDS_PER_DAY, side="left")
        stops = np.searchsorted(times, batch.time, side="left")
        counts = [
            np.bincount(items[start:stop], minlength=len(tie_break)) for start, stop in zip(starts, stops, strict=True)
        ]
        return (np.stack(counts) + tie_break).astype(np.float32)

    return scores


def best_recent_window(data: PreparedData, max_length: int, request_time: bool) -> float:
    """The window of recent popularity, in days, with the best NDCG@10 on validation, with or without request time."""

    def figure(days: float) -> float:
        scorer = recent_popularity_scorer(data, days)
        ranked = rank_cases(scorer, data, data.split.validation, max_length, request_time)
        return float(ndcg(ranked.ranks, 10).mean())

    return max(RECENT_WINDOWS_DAYS, key=figure)


def cooccurrence_scorer(model: CoOccurrence) -> Scorer:
    """Item-item nearest neighbours of the most recent events; the request time changes nothing."""
    return compiled_scorer(model, _neighbour_scores)


def _neighbour_scores(model: CoOccurrence, events: Events, request_gap: jax.Array) -> jax.Array:
    return model.scores(recent_items(events.item, events.length))


def decayed_popularity(data: PreparedData, half_life_days: float = RECENT_HALF_LIFE_DAYS) -> np.ndarray:
    """[items + 1] float64: training events, each halved for every `half_life_days` before the last training event."""
    rows = data.split.train_rows(data.histories)
    times = data.histories.times[rows]
    age_days = (times.max(initial=0) - times) / SECONDS_PER_DAY
    weights = 0.5 ** (age_days / half_life_days)
    return np.bincount(data.histories.items[rows], weights=weights, minlength=len(data.catalog) + 1)
