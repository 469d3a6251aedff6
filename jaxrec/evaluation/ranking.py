"""Ranks the target of each case among the whole catalogue, and sums up."""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxrec.data.batches import CaseBatch, case_batches
from jaxrec.data.events import Events
from jaxrec.data.prepared import PreparedData
from jaxrec.data.schema import UNKNOWN_GAP
from jaxrec.data.split import Cases
from jaxrec.errors import DataError
from jaxrec.evaluation.bootstrap import Resamples, bootstrap
from jaxrec.evaluation.metrics import (
    coverage,
    hit_rate,
    ndcg,
    rank_of_target,
    reciprocal_rank,
)
from jaxrec.evaluation.scorers import Scorer
from jaxrec.models.masks import NEVER, exclude_items
from jaxrec.models.sequence import TimeRatingAwareLSTM

TOP = 10
LENGTHS = (25, 50, 100)  # of histories that are ranked together, below the longest


class Ranked(NamedTuple):
    """`ranks` [cases] int: of each target; `top` [cases, TOP] int32: what is recommended (0 = nothing was left)."""

    ranks: np.ndarray
    top: np.ndarray


@dataclasses.dataclass(frozen=True)
class MetricsRow:
    """A row of the metrics table; estimates are {mean, low, high}."""

    name: str
    request_time: bool
    cases: int
    hit_rate_10: dict[str, float]
    ndcg_10: dict[str, float]
    mrr: dict[str, float]
    hit_rate_50: dict[str, float]
    coverage_10: float
    mean_popularity_10: float


@jax.jit
def _rank_batch(scores: jax.Array, target: jax.Array, exclude: jax.Array) -> tuple[jax.Array, jax.Array]:
    top_scores, top = jax.lax.top_k(exclude_items(scores, exclude), min(TOP, scores.shape[1] - 1))
    return rank_of_target(scores, target, exclude), jnp.where(top_scores <= NEVER, 0, top)


def rank_cases(
    scorer: Scorer,
    data: PreparedData,
    cases: Cases,
    max_length: int,
    request_time: bool,
    exclude_seen: bool = True,
    before_batch: Callable[[], None] = lambda: None,
) -> Ranked:
    """Ranks the target of every case among the whole catalogue, without the case's history or with it.

    Args:
        scorer: of all items.
        data: that the cases are of.
        cases: at least one.
        max_length: of the history that the scorer is given, in events.
        request_time: without it the scorer is given UNKNOWN_GAP for the gap before the target.
        exclude_seen: whether items of the history are no candidates.
        before_batch: is called before each batch; what it raises ends the call.

    Raises:
        DataError: there is no case.
    """
    ranks, tops = [], []
    ordered, places = in_time(data, cases)
    for batch in case_batches(data, ordered, max_length, exclude_seen=exclude_seen):
        before_batch()
        asked = batch if request_time else without_request_time(batch)
        batch_ranks, batch_top = _rank_batch(scorer(asked), batch.target, batch.exclude)
        ranks.append(np.asarray(batch_ranks))
        tops.append(np.asarray(batch_top))
    if not ranks:
        raise DataError("the split has no case to rank; the log is too short for it")
    return Ranked(np.concatenate(ranks)[places], np.concatenate(tops)[places])


def in_time(data: PreparedData, cases: Cases) -> tuple[Cases, np.ndarray]:
    """The cases in the order of their targets' times, so that `DecayedCounts` goes forward once, and the place
    [cases] int64 of each given case in that order."""
    order = np.argsort(data.histories.times[cases.rows], kind="stable")
    return Cases(cases.users[order], cases.rows[order]), np.argsort(order)


def ranks_by_request_time(
    model: TimeRatingAwareLSTM,
    data: PreparedData,
    cases: Cases,
    before_batch: Callable[[], None] = lambda: None,
    exclude_seen: bool = True,
) -> np.ndarray:
    """[2, cases] int32: the target's rank without and with the request time. The history is read once for both, and
    cases with histories of like length go together. `before_batch` is called before each batch."""
    graphdef, variables = nnx.split(model)
    max_length = model.config.max_length
    lengths = np.minimum(cases.rows - data.histories.offsets[cases.users], max_length)
    ranks = np.empty((2, len(cases)), np.int32)
    for shortest, longest in itertools.pairwise([-1, *(n for n in LENGTHS if n < max_length), max_length]):
        chosen = np.flatnonzero((lengths > shortest) & (lengths <= longest))
        found = []
        of_length = Cases(cases.users[chosen], cases.rows[chosen])
        for batch in case_batches(data, of_length, longest, exclude_seen=exclude_seen):
            before_batch()
            asked = batch.events, batch.request_gap, batch.target, batch.exclude
            found.append(np.asarray(_both_ranks(graphdef, variables, *asked)))
        if found:
            ranks[:, chosen] = np.concatenate(found, axis=1)[:, : len(chosen)]
    return ranks


@functools.partial(jax.jit, static_argnums=0)
def _both_ranks(
    graphdef: nnx.GraphDef[Any],
    variables: Any,
    events: Events,
    request_gap: jax.Array,
    target: jax.Array,
    exclude: jax.Array,
) -> jax.Array:
    model = nnx.merge(graphdef, variables)
    item_vectors = model.item_vectors()
    _, (h, _) = model.encode(events, item_vectors)
    unknown = jnp.full_like(request_gap, UNKNOWN_GAP)
    logits = (model.query(h, gap) @ item_vectors.T + model.item_bias() for gap in (unknown, request_gap))
    return jnp.stack([rank_of_target(of_one, target, exclude) for of_one in logits])


def without_request_time(batch: CaseBatch) -> CaseBatch:
    """The same cases, asked without a request time. `time` stays: the trend is that of this moment."""
    return batch._replace(request_gap=np.full_like(batch.request_gap, UNKNOWN_GAP))


def summarize(
    name: str, request_time: bool, ranked: Ranked, popularity: np.ndarray, resamples: Resamples
) -> MetricsRow:
    """The metrics of ranked cases.

    Args:
        name: of the scorer.
        request_time: whether it was given the request time.
        ranked: of all cases.
        popularity: [items + 1], training events per item.
        resamples: of the users of the cases; the rows of a report share them.
    """

    def estimate(values: np.ndarray) -> dict[str, float]:
        return dataclasses.asdict(bootstrap(values, resamples))

    shown = ranked.top[ranked.top > 0]
    return MetricsRow(
        name=name,
        request_time=request_time,
        cases=len(ranked.ranks),
        hit_rate_10=estimate(hit_rate(ranked.ranks, 10)),
        ndcg_10=estimate(ndcg(ranked.ranks, 10)),
        mrr=estimate(reciprocal_rank(ranked.ranks)),
        hit_rate_50=estimate(hit_rate(ranked.ranks, 50)),
        coverage_10=coverage(ranked.top, len(popularity) - 1),
        mean_popularity_10=float(popularity[shown].mean()) if len(shown) else 0.0,
    )
