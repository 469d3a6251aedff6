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
from jaxrec.evaluation.baselines import cooccurrence_scorer, popularity_scorer, recent_popularity_scorer
from jaxrec.evaluation.bootstrap import resample
from jaxrec.evaluation.ranking import rank_cases, summarize
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


def test_recent_popularity_counts_the_window_before_each_case() -> None:
    """Item "old" has three events, all long before the case; "new" has two in the two days before it."""
    day = SECONDS_PER_DAY
    events = [(u, "old", 0) for u in (1, 2, 3)] + [(u, "new", 100 * day) for u in (1, 2)]
    events += [(u, item, (101 + place) * day) for u in (1, 2, 3) for place, item in enumerate(("x", "y"))]
    data = prepare(pd.DataFrame(events, columns=[USER, ITEM, TIME]), None, PrepareConfig(1, 1))
    (batch,) = case_batches(data, data.split.test, 8)
    index = {raw: 1 + place for place, raw in enumerate(data.catalog.ids.raw_ids.tolist())}
    recent, ever = (
        np.asarray(scorer(batch))[0] for scorer in (recent_popularity_scorer(data, 3), popularity_scorer(data))
    )
    assert recent[index["new"]] > recent[index["old"]]
    assert ever[index["old"]] > ever[index["new"]]
    assert recent[index["old"]] < 1 <= recent[index["new"]]
