"""Learns on validation how the models, co-occurrence, the trend and repeats are mixed."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize

from jaxrec.data.batches import CaseBatch, case_batches
from jaxrec.data.prepared import PreparedData
from jaxrec.data.schema import UNKNOWN_GAP
from jaxrec.data.split import Cases
from jaxrec.data.trend import HALF_LIVES_S, DecayedCounts
from jaxrec.evaluation.baselines import cooccurrence_scorer
from jaxrec.evaluation.metrics import ndcg
from jaxrec.evaluation.ranking import in_time, rank_cases
from jaxrec.evaluation.scorers import Scorer, hybrid_scorer, sequence_scorer
from jaxrec.models.cooccurrence import CoOccurrence
from jaxrec.models.hybrid import Hybrid, MixWeights
from jaxrec.models.masks import NEVER
from jaxrec.models.repeat import FEATURES, STEPS, TABLE_SIZE, Repeat, seen_buckets
from jaxrec.models.sequence import TimeRatingAwareContentModel, TimeRatingAwareLSTM
from jaxrec.models.trend import VIEWS, Trend, traffic_scale, trend_views

MAX_MIX_CASES = 5_000
BEST_OF_EACH = 100  # items of each part that are always among a case's candidates
SAMPLED = 600  # more candidates: random ones, which stand for all others
START = (0.5, 0.5, 4.0)
PENALTY = 10.0  # of the squared weights of the trend, each times its view's deviation, in cases
SEEN = 200  # items of the history, the ones met last, that are always among a case's candidates
TABLE_PENALTY = 0.03  # of the squared numbers of repeats, in cases
STEP_PENALTY = 3.0  # of the squared differences between neighbouring ones, in cases
ITERATIONS = 200


@dataclasses.dataclass(frozen=True)
class Mix:
    """What was learned, as RUN/hybrid.json holds it.

    Attributes:
        lstm, content, cooccurrence: `jaxrec.models.hybrid.MixWeights`.
        trend: [views, half-lives], the weights of `jaxrec.models.trend.Trend`.
        typical_events: [half-lives], its `typical`.
        repeat: [TABLE_SIZE], the table of `jaxrec.models.repeat.Repeat`; None: items of the history are excluded.
        validation_ndcg_10: Of the mix; the mean of without and with the request time.
        validation_ndcg_10_without_trend: Of the same mix without its trend.
    """

    lstm: float
    content: float
    cooccurrence: float
    trend: list[list[float]]
    typical_events: list[float]
    repeat: list[float] | None = None
    validation_ndcg_10: float = float("nan")
    validation_ndcg_10_without_trend: float = float("nan")

    def hybrid(
        self, lstm: TimeRatingAwareLSTM, content: TimeRatingAwareContentModel, cooccurrence: CoOccurrence
    ) -> Hybrid:
        """The models in this mix."""
        weights = MixWeights(self.lstm, self.content, self.cooccurrence)
        trend = Trend(np.array(self.trend, np.float32), np.array(self.typical_events, np.float32))
        repeat = None if self.repeat is None else Repeat(np.array(self.repeat, np.float32))
        return Hybrid(lstm, content, cooccurrence, weights, trend, repeat=repeat)


class Candidates(NamedTuple):
    """Some items of each case; the target is the first.

    `parts` [cases, 3, candidates] float32: the logits of both models and the scores of co-occurrence; `views`
    [cases, VIEWS * half-lives, candidates] float32 of the trend; `log_weight` [cases, candidates] float32: the
    logarithm of how many items each stands for, NEVER where it is none; `repeats` [cases, 0 or 1 + SEEN, FEATURES]
    uint8: the places of the first ones in the table of repeats, 0 where they are not of the history, as all others.
    """

    parts: np.ndarray
    views: np.ndarray
    log_weight: np.ndarray
    repeats: np.ndarray = np.zeros((1, 0, FEATURES), np.uint8)


def learn_mix(
    lstm: TimeRatingAwareLSTM,
    content: TimeRatingAwareContentModel,
    cooccurrence: CoOccurrence,
    data: PreparedData,
    exclude_seen: bool = True,
) -> Mix:
    """Fits the weights to the next items of validation, by softmax cross-entropy.

    Half of the cases are asked with their request time and half without. Of more than MAX_MIX_CASES validation cases,
    evenly spaced ones are used. The softmax is over the BEST_OF_EACH items of each part and SAMPLED random ones, which
    stand for the rest (importance sampling: Bengio and Senécal 2008, section III); a catalogue of at most SAMPLED items
    is used in full. The weights of the models and of co-occurrence are not negative, those of the trend are shrunk.
    The trend of a case counts the events before it, of all users. Of a history that is not excluded the SEEN items met
    last are candidates, and what repeats add is learned with the weights, shrunk to 0 and to its neighbours.

    Args:
        lstm: As trained.
        content: As trained.
        cooccurrence: As counted.
        data: That they were trained on.
        exclude_seen: Whether items of the history are no candidates.

    Returns:
        The mix, with its validation figures.
    """
    cases = data.split.validation.at_most(MAX_MIX_CASES)
    counts = DecayedCounts.of(data)
    typical = _typical(counts, data.histories.times[cases.rows])
    scorers = sequence_scorer(lstm), sequence_scorer(content), cooccurrence_scorer(cooccurrence)
    found = _candidates(scorers, data, cases, lstm.config.max_length, counts, typical, exclude_seen)
    of_parts, of_views, table = np.split(fit_weights(found), np.cumsum([len(START), found.views.shape[1]]))
    trend, repeat = of_views.reshape(VIEWS, len(HALF_LIVES_S)), None if exclude_seen else table.tolist()
    lstm_weight, content_weight, neighbours_weight = map(float, of_parts)
    mix = Mix(lstm_weight, content_weight, neighbours_weight, trend.tolist(), typical.tolist(), repeat)
    hybrid = mix.hybrid(lstm, content, cooccurrence)
    plain = dataclasses.replace(mix, trend=np.zeros_like(trend).tolist()).hybrid(lstm, content, cooccurrence)
    figures = [_validation_ndcg(one, data, cases, counts) for one in (hybrid, plain)]
    return dataclasses.replace(mix, validation_ndcg_10=figures[0], validation_ndcg_10_without_trend=figures[1])


def fit_weights(found: Candidates) -> np.ndarray:
    """The weights [3 + VIEWS * half-lives] of parts and views with the least mean cross-entropy of the targets,
    followed by the table of repeats [TABLE_SIZE] where there are such."""
    others = found.views.shape[1] + (TABLE_SIZE if found.repeats.shape[1] else 0)
    start = np.concatenate([START, np.zeros(others)])
    if not len(found.parts):
        return start.astype(np.float32)  # every target is excluded: there is nothing to learn from
    deviation = np.sqrt(np.var(found.views, axis=(0, 2), where=found.log_weight[:, None] > NEVER))
    arrays = (*map(jnp.asarray, found), jnp.asarray(deviation))

    def objective(weights: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = _loss(jnp.asarray(weights, jnp.float32), *arrays)
        return float(value), np.asarray(gradient, np.float64)

    bounds = [(0, None)] * len(START) + [(None, None)] * others
    result = scipy.optimize.minimize(
        objective, start, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": ITERATIONS}
    )
    return np.asarray(result.x, np.float32)


@jax.jit
@jax.value_and_grad
def _loss(
    weights: jax.Array,
    parts: jax.Array,
    views: jax.Array,
    log_weight: jax.Array,
    repeats: jax.Array,
    deviation: jax.Array,
) -> jax.Array:
    of_parts, of_views, table = jnp.split(weights, np.cumsum([len(START), views.shape[1]]))
    logits = jnp.einsum("p,cpi->ci", of_parts, parts) + jnp.einsum("v,cvi->ci", of_views, views)
    penalty = PENALTY * jnp.sum(jnp.square(of_views * deviation))
    if repeats.shape[1]:
        table = table.at[0].set(0.0)
        logits = logits.at[:, : repeats.shape[1]].add(jnp.sum(table[repeats], axis=2))
        steps = jnp.diff(table)[STEPS]
        penalty += TABLE_PENALTY * jnp.sum(jnp.square(table)) + STEP_PENALTY * jnp.sum(jnp.square(steps))
    loss = jnp.mean(jax.nn.logsumexp(logits + log_weight, axis=1) - logits[:, 0])
    return loss + penalty / len(parts)


def _typical(counts: DecayedCounts, times: np.ndarray) -> np.ndarray:
    """[half-lives] float32: the mean over the times of all items' decayed counts."""
    totals = [counts.before(np.array([time])).sum(axis=2)[0] for time in np.sort(times)]
    return np.mean(totals, axis=0, dtype=np.float64).astype(np.float32)


def _candidates(
    scorers: Sequence[Scorer],
    data: PreparedData,
    cases: Cases,
    max_length: int,
    counts: DecayedCounts,
    typical: np.ndarray,
    exclude_seen: bool,
) -> Candidates:
    """Of the cases whose target is not excluded."""
    rng = np.random.default_rng(0)
    collected = []
    ordered, _ = in_time(data, cases)
    batches = map(_every_second_with_time, case_batches(data, ordered, max_length, exclude_seen=exclude_seen))
    for number, batch in enumerate(batches):
        parts = np.stack([np.asarray(score(batch)) for score in scorers], axis=1)
        decayed = counts.before(batch.time)
        seen, buckets = (None, np.zeros((len(parts), 0, FEATURES), np.uint8)) if exclude_seen else _seen(batch)
        chosen, log_weight = choose(parts, decayed, batch, rng, seen)
        real = len(cases) - number * len(batch.target)  # the last batch is filled up
        kept = np.flatnonzero(~(batch.exclude == batch.target[:, None]).any(axis=1)[:real])
        scale = np.asarray(traffic_scale(jnp.asarray(decayed.sum(axis=2)), jnp.asarray(typical)))
        places = chosen[kept, None]
        scaled = np.take_along_axis(decayed[kept], places, axis=2) * scale[kept, :, None]
        views = np.asarray(trend_views(jnp.asarray(scaled)))
        views = views.reshape(len(kept), VIEWS * len(HALF_LIVES_S), chosen.shape[1])
        collected.append((np.take_along_axis(parts[kept], places, axis=2), views, log_weight[kept], buckets[kept]))
    return Candidates(*map(np.concatenate, zip(*collected, strict=True)))


def _seen(batch: CaseBatch) -> tuple[np.ndarray, np.ndarray]:
    """The SEEN items of each history that were met last [batch, SEEN], and the places in the table of repeats
    [batch, 1 + SEEN, FEATURES] of the target and of them."""
    items, buckets = seen_buckets(
        batch.history, batch.history_time, batch.time, np.asarray(batch.request_gap) != UNKNOWN_GAP
    )
    here = items == batch.target[:, None]
    of_target = np.where(here.any(axis=1)[:, None], buckets[np.arange(len(here)), here.argmax(axis=1)], 0)
    missing = ((0, 0), (0, max(0, SEEN - items.shape[1])))
    items, buckets = np.pad(items, missing)[:, :SEEN], np.pad(buckets, (*missing, (0, 0)))[:, :SEEN]
    return items, np.concatenate([of_target[:, None], buckets], axis=1)


def choose(
    parts: np.ndarray,
    counts: np.ndarray,
    batch: CaseBatch,
    rng: np.random.Generator,
    seen: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The candidates of each case of a batch.

    Args:
        parts: [batch, parts, items + 1] float32.
        counts: [batch, half-lives, items + 1] float32.
        batch: The cases.
        rng: Of the random ones.
        seen: [batch, SEEN] int32 (0 = none), items of the history that are candidates; the others of it are none. None:
            the history is excluded.

    Returns:
        Items [batch, candidates] int64, the target first, then those seen, and the logarithm of how many items each
        stands for [batch, candidates] float32: NEVER where it is excluded, or a candidate already.
    """
    size, items = len(batch.target), parts.shape[2] - 1
    taken = np.zeros((size, items + 1), bool)
    rows = np.arange(size)[:, None]
    taken[rows, batch.exclude] = taken[:, 0] = True
    columns, log_weights = [], []

    def add(candidates: np.ndarray, log_weight: float) -> None:
        columns.append(candidates)
        log_weights.append(np.where(taken[rows, candidates], NEVER, log_weight))
        taken[rows, candidates] = True

    add(batch.target[:, None].astype(np.int64), 0.0)
    if seen is not None:
        add(seen.astype(np.int64), 0.0)
        taken[rows, batch.history] = True
    best = min(BEST_OF_EACH, items)
    for scores in (*np.moveaxis(parts, 1, 0), counts.sum(axis=1)):
        add(np.argpartition(-np.where(taken, NEVER, scores), best - 1, axis=1)[:, :best], 0.0)
    if items <= SAMPLED:
        add(np.tile(np.arange(1, items + 1), (size, 1)), 0.0)
    else:
        # The same item drawn twice counts twice, so it must not be a candidate yet when it is looked up.
        add(rng.integers(1, items + 1, (size, SAMPLED)), np.log(items / SAMPLED))
    return np.concatenate(columns, axis=1), np.concatenate(log_weights, axis=1).astype(np.float32)


def _every_second_with_time(batch: CaseBatch) -> CaseBatch:
    gaps = batch.request_gap.copy()
    gaps[::2] = UNKNOWN_GAP
    return batch._replace(request_gap=gaps)


def _validation_ndcg(hybrid: Hybrid, data: PreparedData, cases: Cases, counts: DecayedCounts) -> float:
    max_length = hybrid.lstm.config.max_length
    scorer = hybrid_scorer(hybrid, counts)
    ranked = (rank_cases(scorer, data, cases, max_length, time, hybrid.repeat is None) for time in (False, True))
    return float(np.mean([ndcg(one.ranks, 10).mean() for one in ranked]))
