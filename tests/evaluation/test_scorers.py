"""Every scorer has one interface; the baselines by hand."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from flax import nnx

from jaxrec.config import PrepareConfig
from jaxrec.data.batches import CaseBatch, case_batches
from jaxrec.data.prepare import prepare
from jaxrec.data.prepared import PreparedData
from jaxrec.data.schema import ITEM, SECONDS_PER_DAY, TIME, USER
from jaxrec.data.split import Cases
from jaxrec.data.trend import HALF_LIVES_S, DecayedCounts
from jaxrec.evaluation import ranking
from jaxrec.evaluation.baselines import (
    cooccurrence_scorer,
    own_items_scorer,
    popularity_scorer,
    recent_popularity_scorer,
)
from jaxrec.evaluation.bootstrap import resample
from jaxrec.evaluation.metrics import MISS
from jaxrec.evaluation.ranking import rank_cases, rank_together, summarize, without_request_time
from jaxrec.evaluation.scorers import Scorer, Shared, hybrid_scorer, part_scorers, sequence_scorer
from jaxrec.models.hybrid import Hybrid

SCORERS: dict[str, Callable[[PreparedData, Hybrid], Scorer]] = {
    "popularity": lambda data, hybrid: popularity_scorer(data),
    "recent popularity": lambda data, hybrid: recent_popularity_scorer(data, DecayedCounts.of(data), 4),
    "co-occurrence": lambda data, hybrid: cooccurrence_scorer(hybrid.cooccurrence),
    "LSTM": lambda data, hybrid: sequence_scorer(hybrid.lstm),
    "content": lambda data, hybrid: sequence_scorer(hybrid.content),
    "hybrid": lambda data, hybrid: hybrid_scorer(hybrid.with_policy(None)),
    "policy": lambda data, hybrid: hybrid_scorer(hybrid),
}


@pytest.mark.parametrize("name", SCORERS)
def test_every_scorer_scores_every_item_and_is_ranked_alike(
    name: str, small_data: PreparedData, small_hybrid: Hybrid
) -> None:
    scorer, cases = SCORERS[name](small_data, small_hybrid), small_data.split.test
    (batch,) = case_batches(small_data, cases, 50)
    scores = np.asarray(scorer(batch))
    assert (scores.shape, scores.dtype) == ((64, len(small_data.catalog) + 1), np.float32)
    assert np.isfinite(scores[:, 1:]).all()
    ranked = rank_cases(scorer, small_data, cases, 50, request_time=True)
    row = summarize(name, True, ranked, small_data.train_popularity(), resample(cases.users))
    assert row.ndcg_10["low"] <= row.ndcg_10["mean"] <= row.ndcg_10["high"]
    assert row.cases == len(cases)


DAY = SECONDS_PER_DAY
ONE = PrepareConfig(1, 1)
# User 1 met "x" on day 10, and the target on day 20. The others trained on "a" before day 10 and on "b" between the
# two; their last two events are for validation and test.
EVENTS = [(1, "first", 0), (1, "x", 10), (1, "target", 20)]
EVENTS += [(2, "a", 8), (3, "a", 9), (2, "b", 17), (3, "b", 18), (4, "b", 19)]
EVENTS += [(user, item, day) for user in (2, 3, 4) for item, day in (("y", 30), ("z", 31))]


def case_of_user_1() -> tuple[PreparedData, CaseBatch]:
    log = pd.DataFrame([(u, i, day * DAY) for u, i, day in EVENTS], columns=[USER, ITEM, TIME])
    data = prepare(log, None, PrepareConfig(1, 1))
    (batch,) = case_batches(data, data.split.test, 8)
    return data, batch


def test_recent_popularity_decays_what_precedes_the_request_with_and_without_its_time() -> None:
    data, batch = case_of_user_1()
    scorer = recent_popularity_scorer(data, DecayedCounts.of(data), HALF_LIVES_S.index(DAY))
    for asked in (batch, without_request_time(batch)):
        scores = dict(zip(data.catalog.ids.raw_ids.tolist(), np.asarray(scorer(asked))[0, 1:], strict=True))
        # The request comes on day 20, and "y" and "z" later.
        assert scores["b"] == pytest.approx(1 / 8 + 1 / 4 + 1 / 2, abs=1e-4)
        assert scores["a"] == pytest.approx(2**-12 + 2**-11, abs=1e-4)
        assert scores["x"] == pytest.approx(2**-10, abs=1e-4)
        assert scores["y"] < 1e-5
        assert scores["z"] < 1e-5


def test_without_any_event_recent_popularity_is_popularity() -> None:
    data, batch = case_of_user_1()
    scorer = recent_popularity_scorer(data, DecayedCounts.of(data), 0)
    scores = np.asarray(scorer(batch._replace(time=np.zeros_like(batch.time))))[0]
    order = np.argsort(-scores[1:], kind="stable")
    np.testing.assert_array_equal(order, np.argsort(-data.train_popularity()[1:], kind="stable"))


def test_own_items_come_by_their_number_of_events_then_by_the_latest() -> None:
    """The user's history is c, a, b, a, b, d, and what is not of it comes last, all equal."""
    events = [(1, item, day) for day, item in enumerate(["c", "a", "b", "a", "b", "d", "e"])]
    events += [(2, item, day) for day, item in enumerate(["e", "f", "f"])]
    data = prepare(pd.DataFrame([(u, i, d * DAY) for u, i, d in events], columns=[USER, ITEM, TIME]), None, ONE)
    (batch,) = case_batches(data, data.split.test, 4, exclude_seen=False)
    scores = own_items_scorer(len(data.catalog))(batch)
    of_items = dict(zip(data.catalog.ids.raw_ids.tolist(), scores[0, 1:].tolist(), strict=True))
    assert of_items == {"c": 1, "d": 2, "a": 3, "b": 4, "e": 0, "f": 0}
    assert scores[0, 0] == 0
    assert scores.dtype == np.float32


def test_the_hybrid_adds_the_trend_of_each_case(small_data: PreparedData, small_hybrid: Hybrid) -> None:
    counts = DecayedCounts.of(small_data)
    (batch,) = case_batches(small_data, small_data.split.test, 50)
    plain, with_trend = (np.asarray(hybrid_scorer(small_hybrid, one)(batch)) for one in (None, counts))
    trend = np.asarray(small_hybrid.trend(counts.before(batch.time)))
    assert np.ptp(trend, axis=0).max() > 0.01  # the cases are of different times
    np.testing.assert_allclose(with_trend[:, 1:], (plain + trend)[:, 1:], rtol=1e-4, atol=1e-4)


def test_the_order_of_the_cases_changes_no_rank(small_data: PreparedData, small_hybrid: Hybrid) -> None:
    cases = small_data.split.test
    order = np.random.default_rng(0).permutation(len(cases))
    scorer = hybrid_scorer(small_hybrid, DecayedCounts.of(small_data))
    ranked = rank_cases(scorer, small_data, cases, 50, request_time=True)
    shuffled = rank_cases(scorer, small_data, Cases(cases.users[order], cases.rows[order]), 50, request_time=True)
    np.testing.assert_array_equal(shuffled.ranks, ranked.ranks[order])
    np.testing.assert_array_equal(shuffled.top, ranked.top[order])


def test_scorers_that_share_rank_as_each_alone(
    small_data: PreparedData, small_hybrid: Hybrid, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in groups of like length, and with batches that do not hold all cases."""
    monkeypatch.setattr(ranking, "FEW_CASES", 0)
    monkeypatch.setattr(ranking, "LENGTHS", (5, 10))
    monkeypatch.setattr(ranking, "LARGEST_BATCH", 16)
    counts, shared = DecayedCounts.of(small_data), Shared()
    other = DecayedCounts(np.array([1, 2]), np.array([0, 10]), len(small_data.catalog))

    def made(shared: Shared | None) -> dict[str, Scorer]:
        return {
            "recent": recent_popularity_scorer(small_data, counts, 3, shared),
            "recent of others": recent_popularity_scorer(small_data, other, 3, shared),
            "LSTM": sequence_scorer(small_hybrid.lstm, shared),
            "content": sequence_scorer(small_hybrid.content, shared),
            "hybrid": hybrid_scorer(small_hybrid.with_policy(None), counts, shared),
            "without its trend": hybrid_scorer(small_hybrid, None, shared),
            "trend of others": hybrid_scorer(small_hybrid, other, shared),
        }

    cases = small_data.split.test
    asked = {(name, time): (scorer, time) for name, scorer in made(shared).items() for time in (False, True)}
    together = rank_together(asked, small_data, cases, 50)
    monkeypatch.undo()
    for (name, time), found in together.items():
        alone = rank_cases(made(None)[name], small_data, cases, 50, time)
        np.testing.assert_array_equal(found.ranks, alone.ranks, name)
        np.testing.assert_array_equal(found.top, alone.top, name)
    assert len({found.ranks.tobytes() for found in together.values()}) > 8  # they differ


def test_a_model_alone_recommends_no_new_items(small_data: PreparedData, small_hybrid: Hybrid) -> None:
    """Their biases are shifted for the mix, where a cap holds them down: alone they would be in every answer."""
    new = np.zeros(len(small_data.catalog) + 1, bool)
    new[3:6] = True
    lstm = nnx.clone(small_hybrid.lstm)
    lstm.item_bias_table[...] += 100.0 * jnp.asarray(new)
    mix = lstm, small_hybrid.content, small_hybrid.cooccurrence, small_hybrid.mix_weights(), small_hybrid.trend
    whole, cases = Hybrid(*mix, new_items=new), small_data.split.test
    asked = small_data, cases, 50, True
    shifted = rank_cases(sequence_scorer(lstm), *asked)
    assert new[shifted.top[:, 0]].mean() > 0.8
    targets = small_data.histories.items[cases.rows]
    assert new[targets].any()
    alone = part_scorers(whole)
    ranked = rank_cases(alone["TimeRatingAwareLSTM"], *asked)
    assert not new[ranked.top].any()
    assert (ranked.ranks[new[targets]] == MISS).all()
    # The others rank as they did before the shift, without the new items.
    (batch,) = case_batches(small_data, cases, 50)
    scores = np.asarray(sequence_scorer(lstm)(batch))
    np.testing.assert_array_equal(np.asarray(alone["TimeRatingAwareLSTM"](batch))[:, ~new], scores[:, ~new])
    assert not new[rank_cases(alone["TimeRatingAwareContentModel"], *asked).top].any()


def test_what_is_shared_is_computed_once_for_each_batch(small_data: PreparedData) -> None:
    cases, calls = small_data.split.test, list[int]()
    first, second = (next(case_batches(small_data, cases, length)) for length in (50, 20))
    shared = Shared()
    for batch in (first, without_request_time(first), second, second, first):
        shared.once(batch, "key", lambda: calls.append(len(calls)))
    assert len(calls) == 3
