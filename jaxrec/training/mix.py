"""Learns on validation how the models, co-occurrence and the trend are mixed."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

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
from jaxrec.models.sequence import TimeRatingAwareContentModel, TimeRatingAwareLSTM
from jaxrec.models.trend import VIEWS, Trend, traffic_scale, trend_views

MAX_MIX_CASES = 5_000
BEST_OF_EACH = 100  # items of each part that are always among a case's candidates
SAMPLED = 600  # more candidates: random ones, which stand for all others
START = (0.5, 0.5, 4.0)
PENALTY = 10.0  # in cases, of each squared weight of the trend, times its view's variance, and of each squared
# relative change of the other weights
ITERATIONS = 200


@dataclasses.dataclass(frozen=True)
class Mix:
    """What was learned, as RUN/hybrid.json holds it.

    Attributes:
        lstm, content, cooccurrence: `jaxrec.models.hybrid.MixWeights`.
        trend: [views, half-lives], the weights of `jaxrec.models.trend.Trend`.
        typical_events: [half-lives], its `typical`.
        validation_ndcg_10: Of the mix, asked with the request time.
        validation_ndcg_10_without_trend: Of the mix that is learned without a trend.
    """

    lstm: float
    content: float
    cooccurrence: float
    trend: list[list[float]]
    typical_events: list[float]
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
        return Hybrid(lstm, content, cooccurrence, weights, trend, new_items=new_items)


class Candidates(NamedTuple):
    """Some items of each case; the target is the first.

    `parts` [cases, 3, candidates] float32: the logits of both models and the scores of co-occurrence; `views`
    [cases, VIEWS * half-lives, candidates] float32 of the trend; `log_weight` [cases, candidates] float32: the
    logarithm of how many items each stands for, NEVER where it is none.
    """

    parts: np.ndarray
    views: np.ndarray
    log_weight: np.ndarray


def learn_mix(
    lstm: TimeRatingAwareLSTM, content: TimeRatingAwareContentModel, cooccurrence: CoOccurrence, data: PreparedData
) -> Mix:
    """Fits the weights to the next items of validation, by softmax cross-entropy.

    Half of the cases are asked with their request time and half without. Of more than MAX_MIX_CASES validation cases,
    evenly spaced ones are used. The softmax is over the BEST_OF_EACH items of each part and SAMPLED random ones, which
    stand for the rest (importance sampling: Bengio and Senécal 2008, section III); a catalogue of at most SAMPLED items
    is used in full. Items without training events are neither candidates nor targets. The weights of the models and of
    co-occurrence are not negative. All weights are shrunk, these towards START, those of the trend towards 0. The trend
    of a case counts the events before it, of all users. It is kept unless the mix that is learned without it has the
    better NDCG@10.

    Args:
        lstm: As trained.
        content: As trained.
        cooccurrence: As counted.
        data: That they were trained on.

    Returns:
        The mix, with its validation figures.
    """
    cases = data.split.validation.at_most(MAX_MIX_CASES)
    counts = DecayedCounts.of(data)
    typical = _typical(counts, data.histories.times[cases.rows])
    scorers = sequence_scorer(lstm), sequence_scorer(content), cooccurrence_scorer(cooccurrence)
    found = _candidates(scorers, data, cases, lstm.config.max_length, counts, typical)
    if not len(found.parts):  # every target is excluded
        return _mix(np.array(START), typical)
    mix, plain = (_mix(fit_weights(one), typical) for one in (found, found._replace(views=found.views[:, :0])))
    max_length = lstm.config.max_length
    best, without = (
        float(ndcg(rank_cases(scorer, data, cases, max_length, request_time=True).ranks, 10).mean())
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


def _mix(weights: np.ndarray, typical: np.ndarray) -> Mix:
    """Of the first weights, or of all; without the others there is no trend."""
    of_lstm, of_content, of_neighbours = map(float, weights[: len(START)])
    trend = np.zeros(VIEWS * len(HALF_LIVES_S))
    trend[: len(weights) - len(START)] = weights[len(START) :]
    return Mix(of_lstm, of_content, of_neighbours, trend.reshape(VIEWS, -1).tolist(), typical.tolist())


def fit_weights(found: Candidates) -> np.ndarray:
    """The weights [3 + views] of parts and views with the least mean cross-entropy of the targets."""
    cases, views, _ = found.views.shape
    columns = np.concatenate([found.parts, found.views], axis=1).swapaxes(0, 1).reshape(len(START) + views, -1)
    where = found.log_weight.ravel() > NEVER
    start = np.concatenate([START, np.zeros(views)])
    unit = np.concatenate([1 / np.array(START), [column[where].std() for column in columns[len(START) :]]])

    def objective(weights: np.ndarray) -> tuple[float, np.ndarray]:
        """The loss and its gradient. Written out as two products of a vector and a matrix, it takes a tenth of the
        time that the compiled sum over views takes on a CPU."""
        logits = (weights.astype(np.float32) @ columns).reshape(cases, -1) + found.log_weight
        highest = logits.max(axis=1, keepdims=True)
        exponentials = np.exp(logits - highest)
        total = exponentials.sum(axis=1, keepdims=True)
        loss = np.mean(np.log(total) + highest - logits[:, :1])
        difference = exponentials / total
        difference[:, 0] -= 1
        moved = (weights - start) * unit
        gradient = columns @ difference.ravel() + 2 * PENALTY * moved * unit
        return float(loss + PENALTY / cases * np.sum(moved**2)), np.asarray(gradient / cases, np.float64)

    bounds = [(0, None)] * len(START) + [(None, None)] * views
    result = scipy.optimize.minimize(
        objective, start, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": ITERATIONS}
    )
    return np.asarray(result.x, np.float32)


def _typical(counts: DecayedCounts, times: np.ndarray) -> np.ndarray:
    """[half-lives] float32: the mean over the times of all items' decayed counts."""
    totals = [counts.before(np.array([time])).sum(axis=2)[0] for time in np.sort(times)]
    return np.stack(totals).mean(axis=0, dtype=np.float64).astype(np.float32)


def _candidates(
    scorers: Sequence[Scorer],
    data: PreparedData,
    cases: Cases,
    max_length: int,
    counts: DecayedCounts,
    typical: np.ndarray,
) -> Candidates:
    """Of the cases whose target has training events and is not excluded."""
    rng, new = np.random.default_rng(0), data.train_popularity() == 0
    collected = []
    ordered, _ = in_time(data, cases)
    batches = map(_every_second_with_time, case_batches(data, ordered, max_length))
    for number, batch in enumerate(batches):
        parts = np.stack([np.asarray(score(batch)) for score in scorers], axis=1)
        decayed = counts.before(batch.time)
        chosen, log_weight = choose(parts, decayed, batch, new, rng)
        real = len(cases) - number * len(batch.target)  # the last batch is filled up
        lost = (batch.exclude == batch.target[:, None]).any(axis=1) | new[batch.target]
        kept = np.flatnonzero(~lost[:real])
        scale = np.asarray(traffic_scale(jnp.asarray(decayed.sum(axis=2)), jnp.asarray(typical)))
        places = chosen[kept, None]
        scaled = np.take_along_axis(decayed[kept], places, axis=2) * scale[kept, :, None]
        views = np.asarray(trend_views(jnp.asarray(scaled)))
        views = views.reshape(len(kept), VIEWS * len(HALF_LIVES_S), chosen.shape[1])
        collected.append((np.take_along_axis(parts[kept], places, axis=2), views, log_weight[kept]))
    return Candidates(*map(np.concatenate, zip(*collected, strict=True)))


def choose(
    parts: np.ndarray, counts: np.ndarray, batch: CaseBatch, new: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """The candidates of each case of a batch.

    Args:
        parts: [batch, parts, items + 1] float32.
        counts: [batch, half-lives, items + 1] float32.
        batch: The cases.
        new: [items + 1] bool, items that are no candidates.
        rng: Of the random ones.

    Returns:
        Items [batch, candidates] int64, the target first, and the logarithm of how many items each stands for
        [batch, candidates] float32: NEVER where it is excluded, or a candidate already.
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
    best = min(BEST_OF_EACH, items)
    for scores in (*np.moveaxis(parts, 1, 0), counts.sum(axis=1)):
        add(np.argpartition(-np.where(taken, NEVER, scores), best - 1, axis=1)[:, :best], 0.0)
    if items <= SAMPLED:
        add(np.tile(np.arange(1, items + 1), (size, 1)), 0.0)
    else:
        # An item that is drawn twice counts twice: `add` looks all of them up before it marks any.
        add(rng.integers(1, items + 1, (size, SAMPLED)), np.log(items / SAMPLED))
    return np.concatenate(columns, axis=1), np.concatenate(log_weights, axis=1).astype(np.float32)


def _every_second_with_time(batch: CaseBatch) -> CaseBatch:
    gaps = batch.request_gap.copy()
    gaps[::2] = UNKNOWN_GAP
    return batch._replace(request_gap=gaps)
