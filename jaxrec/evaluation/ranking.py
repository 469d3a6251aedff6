"""Ranks the target of each case among the whole catalogue, and sums up."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from jaxrec.data.batches import CaseBatch, case_batches
from jaxrec.data.events import Events
from jaxrec.data.histories import power_of_two
from jaxrec.data.prepared import PreparedData
from jaxrec.data.schema import UNKNOWN_GAP
from jaxrec.data.split import Cases
from jaxrec.data.trend import HALF_LIVES_S
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
FEW_CASES = 256
LEAST_BATCH, LARGEST_BATCH = 16, 256  # cases that are ranked at once
BATCH_FLOATS = 2**24
Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


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
    """`rank_together` of one scorer; `request_time`: whether it is given the request time."""
    asked = {"": (scorer, request_time)}
    return rank_together(asked, data, cases, max_length, exclude_seen, before_batch)[""]


def rank_together(
    scorers: Mapping[Key, tuple[Scorer, bool]],
    data: PreparedData,
    cases: Cases,
    max_length: int,
    exclude_seen: bool = True,
    before_batch: Callable[[], None] = lambda: None,
    progress: str | None = None,
) -> dict[Key, Ranked]:
    """Ranks the target of every case among the whole catalogue, without the case's history or with it.

    The cases are gone through once for all scorers. Those with histories of like length go together, in the order of
    their times.

    Args:
        scorers: Each with whether it is given the request time; without it the gap before the target is UNKNOWN_GAP.
        data: That the cases are of.
        cases: At least one.
        max_length: Of the history that a scorer is given, in events.
        exclude_seen: Whether items of the history are no candidates.
        before_batch: Is called before each batch; what it raises ends the call.
        progress: Name of a bar on stderr that counts cases; None: none is shown.

    Returns:
        The ranks of each scorer, in the order of the cases.

    Raises:
        DataError: There is no case.
    """
    if not len(cases):
        raise DataError("the split has no case to rank; the log is too short for it")
    width, size = min(TOP, len(data.catalog)), batch_size(len(cases), len(data.catalog))
    found = {key: Ranked(np.empty(len(cases), np.int32), np.empty((len(cases), width), np.int32)) for key in scorers}
    ordered, places = in_time(data, cases)

    def asked() -> Iterator[tuple[np.ndarray, dict[Key, tuple[jax.Array, jax.Array]]]]:
        for chosen, longest in by_length(data, ordered, max_length):
            of_length = Cases(ordered.users[chosen], ordered.rows[chosen])
            for number, batch in enumerate(case_batches(data, of_length, longest, size, exclude_seen)):
                before_batch()
                untimed, answers = without_request_time(batch), {}
                for key, (scorer, request_time) in scorers.items():
                    scores = scorer(batch if request_time else untimed)
                    answers[key] = _rank_batch(scores, batch.target, batch.exclude)
                    if size <= LEAST_BATCH:
                        # The scores of a very large catalogue fill the memory: those of one scorer at a time.
                        jax.block_until_ready(answers[key])
                yield chosen[number * size : (number + 1) * size], answers

    with tqdm(desc=progress, total=len(cases), unit="case", disable=progress is None) as bar:
        for of_batch, answers in one_behind(asked()):
            for key, (ranks, top) in answers.items():
                found[key].ranks[of_batch] = np.asarray(ranks)[: len(of_batch)]
                found[key].top[of_batch] = np.asarray(top)[: len(of_batch)]
            bar.update(len(of_batch))
    return {key: Ranked(ranked.ranks[places], ranked.top[places]) for key, ranked in found.items()}


def one_behind(values: Iterator[Value]) -> Iterator[Value]:
    """Each value once the next one was asked for, so that JAX computes it while the next one is prepared."""
    before = list(itertools.islice(values, 1))
    for value in values:
        yield before.pop()
        before.append(value)
    yield from before


def by_length(data: PreparedData, cases: Cases, max_length: int) -> Iterator[tuple[np.ndarray, int]]:
    """Cases whose histories are of like length, so that little is padding: their places, which rise, and the longest
    length. A few cases stay together, since each length is compiled."""
    lengths = np.minimum(cases.rows - data.histories.offsets[cases.users], max_length)
    bounds = [n for n in LENGTHS if n < max_length] if len(cases) > FEW_CASES else []
    for shortest, longest in itertools.pairwise([-1, *bounds, max_length]):
        chosen = np.flatnonzero((lengths > shortest) & (lengths <= longest))
        if len(chosen):
            yield chosen, longest


def batch_size(cases: int, items: int) -> int:
    """How many cases are ranked at once: not more than there are, and with at most BATCH_FLOATS decayed counts, which
    are the largest array of a batch, where that leaves LEAST_BATCH."""
    fits = BATCH_FLOATS // (len(HALF_LIVES_S) * (items + 1))
    return min(power_of_two(cases), max(LEAST_BATCH, min(LARGEST_BATCH, fits)))


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
    ranks, size = np.empty((2, len(cases)), np.int32), batch_size(len(cases), len(data.catalog))

    def asked() -> Iterator[tuple[np.ndarray, jax.Array]]:
        for chosen, longest in by_length(data, cases, model.config.max_length):
            of_length = Cases(cases.users[chosen], cases.rows[chosen])
            for number, batch in enumerate(case_batches(data, of_length, longest, size, exclude_seen)):
                before_batch()
                of_both = _both_ranks(graphdef, variables, batch.events, batch.request_gap, batch.target, batch.exclude)
                yield chosen[number * size : (number + 1) * size], of_both

    for of_batch, of_both in one_behind(asked()):
        ranks[:, of_batch] = np.asarray(of_both)[:, : len(of_batch)]
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
