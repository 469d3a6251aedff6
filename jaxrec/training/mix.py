"""Learns on validation how the models, co-occurrence, the trend and repeats are mixed."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import scipy.optimize
from tqdm import tqdm

from jaxrec.data.batches import CaseBatch, case_batches
from jaxrec.data.prepared import PreparedData
from jaxrec.data.schema import UNKNOWN_GAP
from jaxrec.data.split import Cases
from jaxrec.data.trend import HALF_LIVES_S, DecayedCounts
from jaxrec.errors import TrainingError
from jaxrec.evaluation.baselines import cooccurrence_scorer
from jaxrec.evaluation.metrics import ndcg
from jaxrec.evaluation.ranking import batch_size, in_time, rank_cases
from jaxrec.evaluation.scorers import Scorer, hybrid_scorer, sequence_scorer
from jaxrec.models.cooccurrence import CoOccurrence
from jaxrec.models.hybrid import Hybrid, MixWeights
from jaxrec.models.masks import NEVER
from jaxrec.models.repeat import FEATURES, STEPS, TABLE_SIZE, Repeat, seen_buckets
from jaxrec.models.sequence import TimeRatingAwareContentModel, TimeRatingAwareLSTM
from jaxrec.models.trend import VIEWS, Trend, traffic_scale, trend_views
from jaxrec.training.host_memory import give_back_freed_memory

MAX_MIX_CASES = 5_000
BEST_OF_EACH = 100  # items of each part that are always among a case's candidates
SAMPLED = 600  # more candidates: random ones, which stand for all others
START = (0.5, 0.5, 4.0)
PENALTY = 10.0  # in cases, of each squared weight of the trend, times its view's variance, and of each squared
# relative change of the other weights
SEEN = 200  # items of the history with the latest events, which are always among a case's candidates where allowed
TABLE_PENALTY = 0.03  # of the squared numbers in the table of repeats, in cases
STEP_PENALTY = 3.0  # of the squared differences between the numbers of neighbouring buckets there, in cases
FIT = {"maxiter": 2000, "ftol": 1e-12, "gtol": 1e-7, "maxcor": 30}  # the loss is flat around its minimum
BLOCK = 64  # cases whose columns are float64 at a time


@dataclasses.dataclass(frozen=True)
class Mix:
    """What was learned, as RUN/hybrid.json holds it.

    Attributes:
        lstm, content, cooccurrence: `jaxrec.models.hybrid.MixWeights`.
        trend: [views, half-lives], the weights of `jaxrec.models.trend.Trend`.
        typical_events: [half-lives], its `typical`.
        repeat: [TABLE_SIZE], the table of `jaxrec.models.repeat.Repeat`; None: items of the history are excluded.
        validation_ndcg_10: Of the mix, asked with the request time.
        validation_ndcg_10_without_trend: Of the mix that is learned without a trend.
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
        self,
        lstm: TimeRatingAwareLSTM,
        content: TimeRatingAwareContentModel,
        cooccurrence: CoOccurrence,
        new_items: np.ndarray | None = None,
    ) -> Hybrid:
        """The models in this mix; `new_items` as `Hybrid` has them."""
        weights = MixWeights(self.lstm, self.content, self.cooccurrence)
        trend = Trend(np.array(self.trend, np.float32), np.array(self.typical_events, np.float32))
        repeat = None if self.repeat is None else Repeat(np.array(self.repeat, np.float32))
        return Hybrid(lstm, content, cooccurrence, weights, trend, new_items=new_items, repeat=repeat)


class Candidates(NamedTuple):
    """Some items of each case, over which the softmax is computed.

    The target is the first one. Where items of the history are allowed, the next SEEN are of the history.

    Attributes:
        parts: [cases, parts, candidates] float32, in the mix the logits of both models and the scores of co-occurrence.
        views: [cases, VIEWS * half-lives, candidates] float32, of the trend.
        log_weight: [cases, candidates] float32, the logarithm of the number of items that a candidate stands for; NEVER
            where it stands for none.
        repeats: [cases, 1 + SEEN, FEATURES] uint8, the places of the target and of the SEEN items of the history in the
            table of repeats, 0 for what is not of the history. All later candidates have no place. [cases, 0, FEATURES]
            where items of the history are excluded.
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
    before_batch: Callable[[], None] = lambda: None,
) -> Mix:
    """Fits the weights to the next items of validation, by softmax cross-entropy.

    Half of the cases are asked with their request time and half without. Of more than MAX_MIX_CASES validation cases,
    evenly spaced ones are used. The softmax is over the BEST_OF_EACH items of each part and SAMPLED random ones, which
    stand for the rest (importance sampling: Bengio and Senécal 2008, section III); a catalogue of at most SAMPLED items
    is used in full. Items without training events are neither candidates nor targets. The weights of the models and of
    co-occurrence are not negative. All weights are shrunk, these towards START, those of the trend towards 0. The trend
    of a case counts the events before it, of all users. It is kept unless the mix that is learned without it has the
    better NDCG@10.

    Where items of the history are allowed, those SEEN of them that have the latest events are always candidates, and
    the others of the history are none. The table of repeats is then fitted together with the weights. Its numbers are
    shrunk towards 0, and those of neighbouring buckets towards each other.

    Args:
        lstm: As trained.
        content: As trained.
        cooccurrence: As counted.
        data: That they were trained on.
        exclude_seen: Whether items of the history are no candidates.
        before_batch: Called before each batch of cases and after each iteration of the fit; what it raises ends the
            call.

    Returns:
        The mix, with its validation figures.

    Raises:
        TrainingError: A score or a weight is not finite.
    """
    cases = data.split.validation.at_most(MAX_MIX_CASES)
    counts = DecayedCounts.of(data)
    typical = typical_events(counts, data.histories.times[cases.rows])
    scorers = sequence_scorer(lstm), sequence_scorer(content), cooccurrence_scorer(cooccurrence)
    asked = data, cases, lstm.config.max_length
    found = collect_candidates(scorers, *asked, counts, typical, exclude_seen, before_batch)
    give_back_freed_memory()
    if not np.isfinite(found.parts).all():
        raise TrainingError(
            "a score of a model or of co-occurrence is not finite; both models are trained and saved, no mix is written"
        )
    mix, plain = (
        _mix(fit_weights(one, after_iteration=before_batch), one.views.shape[1], typical, exclude_seen)
        for one in (found, found._replace(views=found.views[:, :0]))
    )
    if not len(found.parts):  # every target is excluded
        return mix
    best, without = (
        float(ndcg(rank_cases(scorer, *asked, True, exclude_seen, before_batch).ranks, 10).mean())
        for scorer in (
            hybrid_scorer(mix.hybrid(lstm, content, cooccurrence), counts),
            hybrid_scorer(plain.hybrid(lstm, content, cooccurrence)),
        )
    )
    return dataclasses.replace(
        mix if best >= without else plain,
        validation_ndcg_10=max(best, without),
        validation_ndcg_10_without_trend=without,
    )


def _mix(weights: np.ndarray, views: int, typical: np.ndarray, exclude_seen: bool) -> Mix:
    """Of what `fit_weights` returns; without views there is no trend."""
    of_parts, of_views, table = np.split(weights, np.cumsum([len(START), views]))
    trend = of_views if views else np.zeros(VIEWS * len(HALF_LIVES_S))
    of_lstm, of_content, of_neighbours = map(float, of_parts)
    repeat = None if exclude_seen else table.tolist()
    return Mix(of_lstm, of_content, of_neighbours, trend.reshape(VIEWS, -1).tolist(), typical.tolist(), repeat)


def fit_weights(
    found: Candidates, start: Sequence[float] = START, after_iteration: Callable[[], None] = lambda: None
) -> np.ndarray:
    """Finds the weights with the least mean cross-entropy of the targets, plus penalties.

    Args:
        found: The candidates of any number of cases.
        start: Of the parts: where the search begins, and towards which they are shrunk.
        after_iteration: What it raises ends the call.

    Returns:
        Weights [parts + views] float32, where items of the history are allowed followed by the table of
        repeats [TABLE_SIZE].

    Raises:
        TrainingError: The loss or a weight is not finite.
    """
    views, repeated = found.views.shape[1], found.repeats.shape[1]
    others = views + (TABLE_SIZE if repeated else 0)
    first = np.concatenate([start, np.zeros(others)])
    if not len(found.parts):
        return first.astype(np.float32)  # every target is excluded: there is nothing to learn from
    bounds = [(0, None)] * len(start) + [(None, None)] * others
    of_columns = units(found, start)
    objective, unit = penalized_loss(found, start, of_columns), np.append(of_columns, np.ones(others - views))
    unit[unit == 0] = 1.0

    def of_scaled(scaled: np.ndarray) -> tuple[float, np.ndarray]:
        loss, gradient = objective(scaled / unit)
        return loss, gradient / unit

    # Scaled to like variances, the columns need half as many iterations.
    result = scipy.optimize.minimize(
        of_scaled,
        first * unit,
        jac=True,
        method="L-BFGS-B",
        bounds=bounds,
        callback=lambda _: after_iteration(),
        options=FIT,
    )
    weights = np.asarray(result.x / unit, np.float32)
    if not np.isfinite([result.fun, *weights]).all():
        raise TrainingError("the loss of the mix is not finite; both models are trained and saved, no mix is written")
    if result.nit >= FIT["maxiter"]:
        tqdm.write(f"mix: the fit of its weights ended after {result.nit} iterations, before its minimum")
    return weights


def penalized_loss(
    found: Candidates, start: Sequence[float], unit: np.ndarray
) -> Callable[[np.ndarray], tuple[float, np.ndarray]]:
    """What `fit_weights` minimizes.

    Args:
        found: The candidates of at least one case.
        start: As in `fit_weights`.
        unit: Of these, by `units`.

    Returns:
        A function of the weights and the table [parts + views, or parts + views + TABLE_SIZE] float64, which returns
        the mean cross-entropy of the targets plus the penalties, and the gradient of that.
    """
    (cases, views, width), repeated = found.views.shape, found.repeats.shape[1]
    linear = len(start) + views
    centre = np.concatenate([start, np.zeros(views)])
    columns = np.concatenate([found.parts, found.views], axis=1).swapaxes(0, 1).reshape(linear, -1)

    def objective(weights: np.ndarray) -> tuple[float, np.ndarray]:
        # Written out as two products of a vector and a matrix, this takes a tenth of the time that the compiled sum
        # over views takes on a CPU. In float32 rounding would end the fit at the third digit of a weight.
        of_columns, table = weights[:linear], weights[linear:]
        moved, steps = (of_columns - centre) * unit, np.diff(table)[STEPS] if repeated else np.zeros(0)
        loss = PENALTY * moved @ moved + TABLE_PENALTY * table @ table + STEP_PENALTY * steps @ steps
        to_columns, to_table = 2 * PENALTY * moved * unit, 2 * TABLE_PENALTY * table
        for first in range(0, cases, BLOCK):
            block = slice(first, first + BLOCK)
            of_block = columns[:, first * width : (first + BLOCK) * width].astype(np.float64)
            logits = (of_columns @ of_block).reshape(-1, width) + found.log_weight[block]
            if repeated:
                logits[:, :repeated] += np.append(0.0, table[1:])[found.repeats[block]].sum(axis=2)
            highest = logits.max(axis=1, keepdims=True)
            exponentials = np.exp(logits - highest)
            total = exponentials.sum(axis=1, keepdims=True)
            loss += np.sum(np.log(total) + highest - logits[:, :1])
            difference = exponentials / total
            difference[:, 0] -= 1
            to_columns += of_block @ difference.ravel()
            if repeated:
                of_places = np.repeat(difference[:, :repeated].ravel(), FEATURES)
                to_table += np.bincount(found.repeats[block].ravel(), of_places, TABLE_SIZE)
        if repeated:
            to_table[STEPS + 1] += 2 * STEP_PENALTY * steps
            to_table[STEPS] -= 2 * STEP_PENALTY * steps
            to_table[0] = 0.0  # the place of items that are not of the history
        return float(loss) / cases, np.concatenate([to_columns, to_table]) / cases

    return objective


def units(found: Candidates, start: Sequence[float]) -> np.ndarray:
    """[parts + views]: what a weight is multiplied with where it is penalized, 1 / `start` of a part and the standard
    deviation of a view."""
    where = found.log_weight > NEVER
    return np.array(
        [*(1 / one for one in start), *(found.views[:, view][where].std() for view in range(found.views.shape[1]))]
    )


def typical_events(counts: DecayedCounts, times: np.ndarray) -> np.ndarray:
    """[half-lives] float32: the mean over the times [n] int64 (seconds) of the sum of all items' decayed counts."""
    totals = [counts.before(np.array([time])).sum(axis=2)[0] for time in np.sort(times)]
    return np.stack(totals).mean(axis=0, dtype=np.float64).astype(np.float32)


def collect_candidates(
    scorers: Sequence[Scorer],
    data: PreparedData,
    cases: Cases,
    max_length: int,
    counts: DecayedCounts,
    typical: np.ndarray,
    exclude_seen: bool = True,
    before_batch: Callable[[], None] = lambda: None,
) -> Candidates:
    """The candidates of the cases whose target has training events and is not excluded.

    Args:
        scorers: One for each part of the mix.
        data: That the cases are of.
        cases: Any number; every second one is asked with its request time.
        max_length: Of the history that the scorers are given, in events.
        counts: Of the events before each case.
        typical: [half-lives] float32, of `jaxrec.models.trend.Trend`.
        exclude_seen: Whether items of the history are no candidates.
        before_batch: Called before each batch of cases; what it raises ends the call.
    """
    rng, new = np.random.default_rng(0), data.train_popularity() == 0
    collected = []
    ordered, _ = in_time(data, cases)
    size, half_lives = batch_size(len(cases), len(data.catalog)), np.arange(len(HALF_LIVES_S))[:, None]
    for number, asked in enumerate(case_batches(data, ordered, max_length, size, exclude_seen)):
        before_batch()
        batch = _every_second_with_time(asked, number * size)
        parts = np.stack([np.asarray(score(batch)) for score in scorers], axis=1)
        decayed = counts.before(batch.time)
        seen, of_seen = None, np.zeros((len(parts), 0, FEATURES), np.uint8)
        if not exclude_seen:
            seen, of_seen = seen_candidates(batch)
        chosen, log_weight = choose(parts, decayed, batch, new, rng, seen)
        real = len(cases) - number * size  # the last batch is filled up
        lost = (batch.exclude == batch.target[:, None]).any(axis=1) | new[batch.target]
        kept = np.flatnonzero(~lost[:real])
        scale = np.asarray(traffic_scale(jnp.asarray(decayed.sum(axis=2)), jnp.asarray(typical)))
        row, places = kept[:, None, None], chosen[kept, None]
        scaled = decayed[row, half_lives, places] * scale[kept, :, None]
        views = np.asarray(trend_views(jnp.asarray(scaled)))
        views = views.reshape(len(kept), VIEWS * len(HALF_LIVES_S), chosen.shape[1])
        of_parts = parts[row, np.arange(len(scorers))[:, None], places]
        collected.append((of_parts, views, log_weight[kept], of_seen[kept]))
    return Candidates(*map(np.concatenate, zip(*collected, strict=True)))


def seen_candidates(batch: CaseBatch) -> tuple[np.ndarray, np.ndarray]:
    """The items of the history that are candidates.

    Args:
        batch: Cases, with the times of their histories.

    Returns:
        The SEEN items [batch, SEEN] int32 of each history with the latest events, the latest first (0 = no more); and
        the places [batch, 1 + SEEN, FEATURES] uint8 in the table of repeats of the target and of these items, 0 for
        what is not of the history. The target has its places also where it is not among the SEEN items.
    """
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
    new: np.ndarray,
    rng: np.random.Generator,
    seen: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The candidates of each case of a batch.

    Args:
        parts: [batch, parts, items + 1] float32.
        counts: [batch, half-lives, items + 1] float32.
        batch: The cases.
        new: [items + 1] bool, items that are no candidates.
        rng: Of the random ones.
        seen: [batch, any] int32, the items of the history that are candidates; 0 = none. No other item of the history
            is one. None: items of the history are excluded, by the batch's `exclude`.

    Returns:
        Items [batch, candidates] int64, the target first, then those of `seen`; and the logarithm of the number of
        items that each stands for [batch, candidates] float32: NEVER where an item is excluded, or is a candidate
        already.
    """
    size, items = len(batch.target), parts.shape[2] - 1
    taken = np.zeros((size, items + 1), bool)
    rows = np.arange(size)[:, None]
    taken[rows, batch.exclude] = taken[:, 0] = True
    taken[:, new] = True
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
        # An item that is drawn twice counts twice: `add` looks all of them up before it marks any.
        add(rng.integers(1, items + 1, (size, SAMPLED)), np.log(items / SAMPLED))
    return np.concatenate(columns, axis=1), np.concatenate(log_weights, axis=1).astype(np.float32)


def _every_second_with_time(batch: CaseBatch, before: int) -> CaseBatch:
    """`before`: how many cases come before those of the batch."""
    gaps = batch.request_gap.copy()
    gaps[before % 2 :: 2] = UNKNOWN_GAP
    return batch._replace(request_gap=gaps)
