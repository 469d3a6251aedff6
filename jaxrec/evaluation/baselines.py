"""Scorers without gradient training: what a model must beat, and the answer for a user without history."""

import jax
import numpy as np

from jaxrec.data.batches import CaseBatch
from jaxrec.data.events import Events
from jaxrec.data.prepared import PreparedData
from jaxrec.data.schema import SECONDS_PER_DAY
from jaxrec.data.split import Cases
from jaxrec.data.trend import HALF_LIVES_S, DecayedCounts
from jaxrec.evaluation.metrics import ndcg
from jaxrec.evaluation.ranking import rank_together
from jaxrec.evaluation.scorers import Scorer, Shared, compiled_scorer
from jaxrec.models.cooccurrence import CoOccurrence, recent_items

RECENT_HALF_LIFE_DAYS = 30.0


def popularity_scorer(data: PreparedData) -> Scorer:
    """The number of training events of each item, the same for every case."""
    return constant_scorer(data.train_popularity())


def constant_scorer(scores: np.ndarray) -> Scorer:
    """The same scores [items + 1] for every case."""
    return lambda batch: np.broadcast_to(scores.astype(np.float32), (len(batch.target), len(scores)))


def recent_popularity_scorer(
    data: PreparedData, counts: DecayedCounts, half_life: int, shared: Shared | None = None
) -> Scorer:
    """The decayed counts with one half-life, as of each case's moment, so that nothing later is counted.

    Args:
        data: Its popularity, scaled down, breaks ties of items without recent events.
        counts: Of the events to count.
        half_life: Its place in HALF_LIVES_S.
        shared: Of the scorers that are ranked together.
    """
    shared = shared or Shared()
    popularity = data.train_popularity()
    tie_break = 1e-6 * popularity / (popularity.sum() + 1.0)

    def score(batch: CaseBatch) -> np.ndarray:
        now, moment = shared.counts(batch, counts)
        return (now[:, half_life] + tie_break).astype(np.float32)[moment]

    return score


def own_items_scorer(item_count: int) -> Scorer:
    """The user's own items, those with more events first, and among equals the one with the latest event; then all
    others, which are equal. Where items of the history are excluded it scores nothing, so it is not for such runs.

    Args:
        item_count: Items of the catalogue.
    """

    def score(batch: CaseBatch) -> np.ndarray:
        scores = np.zeros((len(batch.target), item_count + 1), np.float32)
        for of_case, history in zip(scores, batch.history, strict=True):
            items, ago, count = np.unique(history[history > 0][::-1], return_index=True, return_counts=True)
            of_case[items[np.lexsort((-ago, count))]] = np.arange(1, len(items) + 1)
        return scores

    return score


def best_half_life(data: PreparedData, counts: DecayedCounts, max_length: int, exclude_seen: bool, cases: Cases) -> int:
    """The place in HALF_LIVES_S of recent popularity's half-life with the best NDCG@10 on validation `cases`."""

    shared = Shared()
    scorers = {at: (recent_popularity_scorer(data, counts, at, shared), True) for at in range(len(HALF_LIVES_S))}
    ranked = rank_together(scorers, data, cases, max_length, exclude_seen)
    return max(ranked, key=lambda at: float(ndcg(ranked[at].ranks, 10).mean()))


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
