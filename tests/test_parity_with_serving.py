"""The lists that the evaluation judges are those that are served: same features, same exclusions, same order."""

import dataclasses
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from jaxrec.config import PrepareConfig
from jaxrec.data import schema, trend
from jaxrec.data.prepare import prepare
from jaxrec.data.prepared import PreparedData
from jaxrec.data.trend import DecayedCounts
from jaxrec.errors import DataError
from jaxrec.evaluation.ranking import rank_cases
from jaxrec.evaluation.scorers import hybrid_scorer
from jaxrec.models.hybrid import Hybrid
from serve.api import rules
from serve.api.errors import InvalidRequest
from serve.model import trend as serve_trend
from serve.model.directory import read_artifact
from serve.model.events import Event
from serve.model.recommender import Query, Recommender

IDS = ["a", "é日", "a b", "7", "", " a", "a ", "a\0b", "x" * 512, "x" * 513]


@pytest.mark.parametrize("raw", IDS, ids=range(len(IDS)))
def test_an_id_can_be_prepared_if_and_only_if_it_can_be_served(raw: str) -> None:
    assert rules.MAX_ID_LENGTH == schema.MAX_ID_LENGTH
    log = pd.DataFrame({"user": ["u", "u", "u"], "item": ["one", "two", raw], "time": 1_500_000_000})
    prepared = served = True
    try:
        prepare(log, None, PrepareConfig(1, 1))
    except DataError:
        prepared = False
    try:
        rules.check_id("item_id", raw)
    except InvalidRequest:
        served = False
    assert prepared is served is (raw in {"a", "é日", "a b", "7", "x" * 512})


@pytest.mark.parametrize("max_history", [50, 7], ids=["whole", "truncated"])
@pytest.mark.parametrize("request_time", [False, True], ids=["without-time", "with-time"])
def test_evaluated_lists_are_the_served_ones(
    small_data: PreparedData,
    small_hybrid: Hybrid,
    model_directory: Path,
    request_time: bool,
    max_history: int,
) -> None:
    artifact = read_artifact(model_directory)
    artifact = dataclasses.replace(artifact, info=dataclasses.replace(artifact.info, max_history=max_history))
    histories, cases = small_data.histories, small_data.split.test
    queries = []
    for user, row in zip(cases.users, cases.rows, strict=True):
        rows = range(histories.offsets[user], row)
        raw_items = small_data.catalog.ids.decode(histories.items[rows.start : rows.stop])
        events = [
            Event(str(item), float(histories.ratings[i]), int(histories.times[i]))
            for item, i in zip(raw_items, rows, strict=True)
        ]
        queries.append(Query(events, k=10, request_time=int(histories.times[row]) if request_time else None))
    recommender, counts = Recommender(artifact, "cpu"), DecayedCounts.of(small_data)
    served = []
    for query, row in zip(queries, cases.rows, strict=True):
        recommender.engine.use_counts(counts.before(histories.times[row, None])[0])  # as the server has them then
        served.append(recommender.recommend([query])[0].items)
    ranked = rank_cases(hybrid_scorer(small_hybrid, counts), small_data, cases, max_history, request_time)
    np.testing.assert_array_equal(np.stack(served), ranked.top)


def test_both_sides_count_with_the_same_half_lives(small_data: PreparedData, model_directory: Path) -> None:
    assert trend.HALF_LIVES_S == serve_trend.HALF_LIVES_S
    exported = read_artifact(model_directory).trend
    later = exported.counted_until + 100_000
    np.testing.assert_allclose(exported.at(later), DecayedCounts.of(small_data).until(later), rtol=1e-5)
