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
from jaxrec.evaluation.metrics import (
    bootstrap_mean,
    coverage,
    exclude_items,
    hit_rate,
    ndcg,
    rank_of_target,
    reciprocal_rank,
)
from jaxrec.models.masks import NEVER
from jaxrec.models.sequence import TimeRatingAwareLSTM

TOP = 10
LENGTHS = (25, 50, 100)  # of histories that are ranked together, below the longest
Scorer = Callable[[CaseBatch], jax.Array | np.ndarray]
Logits = Callable[[Any, Events, jax.Array], jax.Array]


class Ranked(NamedTuple):
    """`ranks` [cases] int: of each target; `top` [cases, TOP] int32: what is recommended (0 = nothing was left)."""

    ranks: np.ndarray
    top: np.ndarray


@dataclasses.dataclass(frozen=True)
class Metrics:
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


def rank_cases(scorer: Scorer, data: PreparedData, cases: Cases, max_length: int, request_time: bool) -> Ranked:
    """Ranks every case. Without `request_time` the scorer sees UNKNOWN_GAP for the gap before the target."""
    ranks, tops = [], []
    for batch in case_batches(data, cases, max_length):
        asked = batch if request_time else without_request_time(batch)
        batch_ranks, batch_top = _rank_batch(scorer(asked), batch.target, batch.exclude)
        ranks.append(np.asarray(batch_ranks))
        tops.append(np.asarray(batch_top))
    if not ranks:
        raise DataError("the split has no case to rank; the log is too short for it")
    return Ranked(np.concatenate(ranks)[: len(cases)], np.concatenate(tops)[: len(cases)])


def ranks_by_request_time(
    model: TimeRatingAwareLSTM, data: PreparedData, cases: Cases, before_batch: Callable[[], None] = lambda: None
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
        for batch in case_batches(data, Cases(cases.users[chosen], cases.rows[chosen]), longest):
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
    """The same cases, asked without a request time."""
    return batch._replace(request_gap=np.full_like(batch.request_gap, UNKNOWN_GAP))


def model_logits(model: TimeRatingAwareLSTM, events: Events, request_gap: jax.Array) -> jax.Array:
    """[batch, items + 1] logits of one sequence model after each row's last event."""
    item_vectors = model.item_vectors()
    _, (h, _) = model.encode(events, item_vectors)
    return model.query(h, request_gap) @ item_vectors.T + model.item_bias()


def jit_scorer(model: nnx.Module, logits: Logits) -> Scorer:
    """A scorer that runs `logits(model, events, request_gap)` compiled, once per structure and batch shape."""
    graphdef, variables = nnx.split(model)
    return lambda batch: _logits(graphdef, logits, variables, batch.events, batch.request_gap)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _logits(
    graphdef: nnx.GraphDef[Any], logits: Logits, variables: Any, events: Events, request_gap: jax.Array
) -> jax.Array:
    return logits(nnx.merge(graphdef, variables), events, request_gap)


def constant_scorer(scores: np.ndarray) -> Scorer:
    """The same scores [items + 1] for every case."""
    return lambda batch: np.broadcast_to(scores.astype(np.float32), (len(batch.target), len(scores)))


def summarize(name: str, request_time: bool, ranked: Ranked, popularity: np.ndarray, seed: int = 0) -> Metrics:
    """The metrics of ranked cases. `popularity` [items + 1]: training events per item; `seed` of the bootstrap."""
    return Metrics(
        name=name,
        request_time=request_time,
        cases=len(ranked.ranks),
        hit_rate_10=dataclasses.asdict(bootstrap_mean(hit_rate(ranked.ranks, 10), seed)),
        ndcg_10=dataclasses.asdict(bootstrap_mean(ndcg(ranked.ranks, 10), seed)),
        mrr=dataclasses.asdict(bootstrap_mean(reciprocal_rank(ranked.ranks), seed)),
        hit_rate_50=dataclasses.asdict(bootstrap_mean(hit_rate(ranked.ranks, 50), seed)),
        coverage_10=coverage(ranked.top, len(popularity) - 1),
        mean_popularity_10=float(popularity[ranked.top[ranked.top > 0]].mean()),
    )
