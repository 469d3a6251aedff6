"""Every scorer has one interface; the baselines by hand."""

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest

from jaxrec.config import PrepareConfig
from jaxrec.data.batches import case_batches
from jaxrec.data.prepare import prepare
from jaxrec.data.prepared import PreparedData
from jaxrec.data.schema import ITEM, SECONDS_PER_DAY, TIME, USER
from jaxrec.data.split import Cases
from jaxrec.evaluation.baselines import cooccurrence_scorer, popularity_scorer, recent_popularity_scorer
from jaxrec.evaluation.bootstrap import resample
from jaxrec.evaluation.ranking import rank_cases, summarize, without_request_time
from jaxrec.evaluation.scorers import Scorer, hybrid_scorer, sequence_scorer
from jaxrec.models.hybrid import Hybrid

SCORERS: dict[str, Callable[[PreparedData, Hybrid], Scorer]] = {
    "popularity": lambda data, hybrid: popularity_scorer(data),
    "recent popularity": lambda data, hybrid: recent_popularity_scorer(data, 30.0),
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
# User 1 met "x" on day 10, and the target on day 20. The others trained on "a" before day 10 and on "b" between the
# two; their last two events are for validation and test.
EVENTS = [(1, "first", 0), (1, "x", 10), (1, "target", 20)]
EVENTS += [(2, "a", 8), (3, "a", 9), (2, "b", 17), (3, "b", 18), (4, "b", 19)]
EVENTS += [(user, item, day) for user in (2, 3, 4) for item, day in (("y", 30), ("z", 31))]


def recent_counts(request_time: bool, window_days: float) -> dict[str, int]:
    """Of user 1's test case: how often each item was counted, without what breaks ties."""
    log = pd.DataFrame([(u, i, day * DAY) for u, i, day in EVENTS], columns=[USER, ITEM, TIME])
    data = prepare(log, None, PrepareConfig(1, 1))
    (batch,) = case_batches(data, data.split.test, 8)
    asked = batch if request_time else without_request_time(batch)
    scores = np.asarray(recent_popularity_scorer(data, window_days)(asked))[0]
    return {
        raw: int(score) for raw, score in zip(data.catalog.ids.raw_ids.tolist(), scores[1:], strict=True) if score >= 1
    }


def test_recent_popularity_with_request_time_counts_what_precedes_the_request() -> None:
    assert recent_counts(True, window_days=5) == {"b": 3}  # days 15 to 20
    assert recent_counts(True, window_days=11.5) == {"a": 1, "b": 3}  # from day 8.5
    assert recent_counts(True, window_days=365) == {"first": 1, "a": 2, "b": 3}  # "x" is for validation


def test_recent_popularity_without_request_time_counts_what_precedes_the_last_event() -> None:
    assert recent_counts(False, window_days=5) == {"a": 2}  # days 5 to 10: nothing of the days before the target
    assert recent_counts(False, window_days=1.5) == {"a": 1}  # from day 8.5
    assert recent_counts(False, window_days=365) == {"first": 1, "a": 2}


def test_without_any_time_recent_popularity_is_popularity() -> None:
    log = pd.DataFrame([(u, i, day * DAY) for u, i, day in EVENTS], columns=[USER, ITEM, TIME])
    data = prepare(log, None, PrepareConfig(1, 1))
    (batch,) = case_batches(data, Cases(np.array([0]), data.histories.offsets[:1]), 8)  # a target without a history
    scores = np.asarray(recent_popularity_scorer(data, 365)(without_request_time(batch)))[0]
    order = np.argsort(-scores[1:], kind="stable")
    np.testing.assert_array_equal(order, np.argsort(-data.train_popularity()[1:], kind="stable"))
    assert scores.max() < 1  # no event is counted
