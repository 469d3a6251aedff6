"""What the mix learns: weights that are known, candidates that stand for all items, and a trend only where there is
one."""

import numpy as np
import pandas as pd
import pytest
from flax import nnx

from jaxrec.config import ModelConfig, PrepareConfig
from jaxrec.data.batches import CaseBatch, case_batches
from jaxrec.data.prepare import prepare
from jaxrec.data.prepared import PreparedData
from jaxrec.data.schema import ITEM, TIME, USER
from jaxrec.data.trend import HALF_LIVES_S, DecayedCounts
from jaxrec.errors import TrainingError, TrainingStopped
from jaxrec.evaluation.baselines import cooccurrence_scorer
from jaxrec.evaluation.metrics import ndcg
from jaxrec.evaluation.ranking import rank_cases
from jaxrec.evaluation.scorers import hybrid_scorer, sequence_scorer
from jaxrec.models.cooccurrence import CoOccurrence
from jaxrec.models.masks import NEVER
from jaxrec.models.neighbours import neighbours
from jaxrec.models.sequence import TimeRatingAwareContentModel, TimeRatingAwareLSTM
from jaxrec.models.trend import VIEWS
from jaxrec.training import mix
from jaxrec.training.mix import Candidates, choose, collect_candidates, fit_weights, learn_mix, typical_events
from tests.groceries import groceries

WIDTH = VIEWS * len(HALF_LIVES_S)


def none_new(parts: np.ndarray) -> np.ndarray:
    return np.zeros(parts.shape[2], bool)


def drawn_targets(logits: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """[cases] by the softmax of logits [cases, items]."""
    return np.argmax(logits + rng.gumbel(size=logits.shape), axis=1)


def test_weights_that_made_the_targets_are_found() -> None:
    rng = np.random.default_rng(0)
    cases, items = 4000, 30
    parts = rng.normal(size=(cases, 3, items)).astype(np.float32)
    views = rng.normal(size=(cases, WIDTH, items)).astype(np.float32)
    wanted = np.array([0.5, 1.0, 2.0, -0.8, *np.zeros(WIDTH - 2), 0.6])
    logits = np.einsum("p,cpi->ci", wanted[:3], parts) + np.einsum("v,cvi->ci", wanted[3:], views)
    swapped = np.tile(np.arange(items), (cases, 1))  # the target becomes the first candidate
    target = drawn_targets(logits, rng)
    swapped[np.arange(cases), target], swapped[:, 0] = 0, target
    found = fit_weights(
        Candidates(*(np.take_along_axis(x, swapped[:, None], 2) for x in (parts, views)), np.zeros((cases, items)))
    )
    np.testing.assert_allclose(found, wanted, atol=0.12)


def test_the_order_of_candidates_changes_nothing() -> None:
    """The fit ends at the minimum, also where all views say nearly the same and the loss is flat between them."""
    rng = np.random.default_rng(7)
    parts = rng.normal(size=(300, 3, 100)).astype(np.float32)
    views = (rng.normal(size=(300, 1, 100)) + 0.3 * rng.normal(size=(300, WIDTH, 100))).astype(np.float32)
    one, other = (
        fit_weights(Candidates(parts[:, :, order], views[:, :, order], np.zeros((300, 100), np.float32)))
        for order in (np.arange(100), np.append(0, 1 + rng.permutation(99)))
    )
    np.testing.assert_allclose(one, other, atol=1e-5)


def test_a_part_that_says_the_opposite_gets_no_weight() -> None:
    rng = np.random.default_rng(1)
    parts = rng.normal(size=(500, 3, 20)).astype(np.float32)
    parts[:, 0, 0] -= 2.0  # of the target
    parts[:, 1, 0] += 2.0
    found = fit_weights(Candidates(parts, np.zeros((500, WIDTH, 20), np.float32), np.zeros((500, 20), np.float32)))
    assert found[0] == 0.0
    assert found[1] > 0.5
    np.testing.assert_array_equal(found[3:], np.zeros(WIDTH))


@pytest.fixture
def batch(small_data: PreparedData) -> CaseBatch:
    return next(case_batches(small_data, small_data.split.validation, max_length=50))


def test_candidates_of_a_small_catalogue_are_all_items_once(batch: CaseBatch, small_data: PreparedData) -> None:
    items = len(small_data.catalog)
    rng = np.random.default_rng(2)
    parts = rng.normal(size=(len(batch.target), 3, items + 1)).astype(np.float32)
    counts = rng.exponential(size=(len(batch.target), len(HALF_LIVES_S), items + 1))
    chosen, log_weight = choose(parts, counts, batch, none_new(parts), rng)
    for row, (candidates, weights) in enumerate(zip(chosen, log_weight, strict=True)):
        real = candidates[weights > NEVER]
        assert real[0] == batch.target[row]
        assert sorted(real) == sorted({*range(1, items + 1)} - {*batch.exclude[row].tolist()} | {batch.target[row]})
        assert (weights[weights > NEVER] == 0).all()


def test_random_candidates_stand_for_the_rest(batch: CaseBatch, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weighted sum over the candidates is, on average over draws, the sum over all items that are left."""
    monkeypatch.setattr(mix, "BEST_OF_EACH", 3)
    monkeypatch.setattr(mix, "SAMPLED", 20)
    rng = np.random.default_rng(3)
    size, items = len(batch.target), 400
    parts = rng.normal(size=(size, 3, items + 1)).astype(np.float32)
    counts = rng.exponential(size=(size, len(HALF_LIVES_S), items + 1))
    left = np.ones((size, items + 1), bool)
    left[np.arange(size)[:, None], batch.exclude] = left[:, 0] = False
    left[np.arange(size), batch.target] = True
    weights = np.exp(parts[:, 0])
    wanted = (weights * left).sum(axis=1)
    sums = []
    for _ in range(400):
        chosen, log_weight = choose(parts, counts, batch, none_new(parts), rng)
        of_chosen = np.take_along_axis(weights, chosen, axis=1)
        sums.append((of_chosen * np.where(log_weight > NEVER, np.exp(log_weight), 0)).sum(axis=1))
    np.testing.assert_allclose(np.mean(sums, axis=0), wanted, rtol=0.05)


SMALL = ModelConfig(embedding=4, hidden=4, rating_width=2, time_width=2, max_length=8)
DAY = 86_400


def untrained(data: PreparedData) -> tuple[TimeRatingAwareLSTM, TimeRatingAwareContentModel, CoOccurrence]:
    rngs = nnx.Rngs(0)
    return (
        TimeRatingAwareLSTM(len(data.catalog), SMALL, rngs=rngs),
        TimeRatingAwareContentModel(len(data.catalog), data.catalog.genre_matrix(), SMALL, rngs=rngs),
        CoOccurrence(neighbours(data)),
    )


def candidates_of(log: pd.DataFrame) -> Candidates:
    """Of the validation cases of a log, by models that were not trained; items of the history are candidates."""
    data = prepare(log, None, PrepareConfig(1, 1))
    lstm, content, cooccurrence = untrained(data)
    scorers = sequence_scorer(lstm), sequence_scorer(content), cooccurrence_scorer(cooccurrence)
    cases, counts = data.split.validation, DecayedCounts.of(data)
    typical = typical_events(counts, data.histories.times[cases.rows])
    return collect_candidates(scorers, data, cases, SMALL.max_length, counts, typical, exclude_seen=False)


def test_candidates_do_not_depend_on_the_size_of_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every second case the request time is given, also where a batch has three."""
    for name, count in (("BEST_OF_EACH", 10), ("SAMPLED", 60)):
        monkeypatch.setattr(mix, name, count)
    log = groceries(users=50, items=200, staples=6, days=20, new_share=0.3, seed=0).log
    found = {}
    for size in (3, 64):
        monkeypatch.setattr(mix, "batch_size", lambda cases, items, size=size: size)
        found[size] = candidates_of(log)
    for few, many in zip(found[3], found[64], strict=True):
        np.testing.assert_allclose(few, many, rtol=1e-4, atol=1e-5)


def log_of(items: np.ndarray, days: np.ndarray) -> PreparedData:
    """items and days [users, events]."""
    users = np.broadcast_to(np.arange(len(items))[:, None], items.shape)
    columns = {USER: users.ravel(), ITEM: items.ravel(), TIME: (10**9 + days.ravel() * DAY).astype(np.int64)}
    return prepare(pd.DataFrame(columns), None, PrepareConfig(1, 1))


def test_a_log_that_follows_releases_is_learned_by_its_trend() -> None:
    """Item n is released on day n; each of 200 users takes the newest item of each of 6 days."""
    rng = np.random.default_rng(4)
    days = np.sort(np.stack([rng.choice(60, 6, replace=False) for _ in range(200)]), axis=1)
    items = days + 1
    data = log_of(items, days + rng.uniform(0, 0.9, days.shape))
    learned = learn_mix(*untrained(data), data)
    assert learned.validation_ndcg_10 > 0.9
    assert learned.validation_ndcg_10_without_trend < 0.5


def in_a_circle(users: int, rng: np.random.Generator) -> PreparedData:
    """Each user walks the items in a circle from somewhere, at random times."""
    items = 1 + (rng.integers(0, 60, users)[:, None] + np.arange(6)) % 60
    return log_of(items, np.sort(rng.uniform(0, 60, items.shape), axis=1))


def test_a_log_without_a_trend_loses_nothing_by_it() -> None:
    data = in_a_circle(300, np.random.default_rng(5))
    learned = learn_mix(*untrained(data), data)
    counts = DecayedCounts.of(data)
    with_trend, without = (
        ndcg(rank_cases(scorer, data, data.split.test, 8, request_time=True).ranks, 10).mean()
        for scorer in (
            hybrid_scorer(learned.hybrid(*untrained(data)), counts),
            hybrid_scorer(learned.hybrid(*untrained(data))),
        )
    )
    assert without > 0.9  # the neighbours know the way
    assert with_trend > without - 0.01


def test_targets_that_are_excluded_or_new_teach_nothing() -> None:
    """Also where a batch, or the whole log, has no other."""
    users = 65  # a batch of 64, and one of one case
    items = np.tile(np.arange(1, 7), (users, 1))
    items[-1, -2] = 1  # the last user's validation target is in the history
    some = learn_mix(*untrained(data := log_of(items, np.tile(np.arange(6.0), (users, 1)))), data)
    assert np.isfinite([some.lstm, some.content, some.cooccurrence]).all()
    items[:, 4] = 1
    none = learn_mix(*untrained(data := log_of(items, np.tile(np.arange(6.0), (users, 1)))), data)
    assert (none.lstm, none.content, none.cooccurrence) == mix.START
    assert not np.any(none.trend)


def test_weights_of_a_log_that_is_known_by_heart_stay_small() -> None:
    """Twenty users with the same five items: without a penalty the weights would grow without a bound."""
    data = log_of(np.tile(np.arange(1, 6), (20, 1)), np.tile(np.arange(5.0), (20, 1)))
    learned = learn_mix(*untrained(data), data)
    assert max(learned.lstm, learned.content) < 10
    assert learned.cooccurrence < 100


def test_scores_and_weights_that_are_not_finite_end_the_training(small_data: PreparedData) -> None:
    lstm, *others = untrained(small_data)
    lstm.item_bias_table[...] = lstm.item_bias_table[...].at[3].set(np.nan)
    with pytest.raises(
        TrainingError, match=r"a score of a model or of co-occurrence is not finite; .* no mix is written"
    ):
        learn_mix(lstm, *others, small_data)
    huge = Candidates(
        np.full((1, 3, 2), np.inf, np.float32), np.zeros((1, 0, 2), np.float32), np.zeros((1, 2), np.float32)
    )
    with np.errstate(all="ignore"), pytest.raises(TrainingError, match="the loss of the mix is not finite"):
        fit_weights(huge)


def test_the_mix_asks_whether_to_stop_at_each_batch_and_iteration(small_data: PreparedData) -> None:
    models = untrained(small_data)
    asked = [0]

    def ask(end: int) -> None:
        asked[0] += 1
        if asked[0] == end:
            raise TrainingStopped

    learn_mix(*models, small_data, before_batch=lambda: ask(-1))
    batches = -(-len(small_data.split.validation.at_most(mix.MAX_MIX_CASES)) // 64)
    assert asked[0] > 3 * batches + 2  # for candidates, for both rankings, and iterations of both fits
    for end in (1, batches + 1, asked[0]):
        asked[0] = 0
        with pytest.raises(TrainingStopped):
            learn_mix(*models, small_data, before_batch=lambda end=end: ask(end))


def test_new_items_are_no_candidates(batch: CaseBatch, small_data: PreparedData) -> None:
    items = len(small_data.catalog)
    parts = np.zeros((len(batch.target), 3, items + 1), np.float32)
    new = np.arange(items + 1) % 3 == 1
    chosen, log_weight = choose(parts, np.zeros((len(parts), 6, items + 1)), batch, new, np.random.default_rng(0))
    rest = log_weight[:, 1:] > NEVER
    assert rest.any()
    assert not new[chosen[:, 1:][rest]].any()
