"""The lists that the evaluation judges are those that are served: same features, same exclusions, same order."""

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

from jaxrec.config import PrepareConfig
from jaxrec.data import schema, trend
from jaxrec.data.events import pad_events
from jaxrec.data.prepare import prepare
from jaxrec.data.prepared import PreparedData
from jaxrec.data.schema import UNKNOWN_GAP
from jaxrec.data.trend import DecayedCounts
from jaxrec.errors import DataError
from jaxrec.evaluation.ranking import rank_cases
from jaxrec.evaluation.scorers import hybrid_scorer
from jaxrec.models.hybrid import Hybrid
from jaxrec.models.masks import exclude_items
from jaxrec.onnx.model_directory import export_model
from serve.api import rules
from serve.api.errors import InvalidRequest
from serve.client import Event as ServedEvent
from serve.client import RecommenderClient
from serve.front.server import create_server
from serve.model import trend as serve_trend
from serve.model.directory import read_artifact
from serve.model.events import Event
from serve.model.recommender import Query, Recommender
from serve.stores import open_store
from tests.serve.one_model import one_model

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


@pytest.fixture(scope="module", params=["policy", "policy that shifts the reranker"])
def served(
    request: pytest.FixtureRequest,
    small_data: PreparedData,
    small_hybrid: Hybrid,
    model_directory: Path,
    with_random_reranker: Callable[[Hybrid, PreparedData], Hybrid],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Hybrid, Path]:
    """A model and its directory."""
    if request.param == "policy":
        return small_hybrid, model_directory
    hybrid, folder = with_random_reranker(small_hybrid, small_data), tmp_path_factory.mktemp("reranked") / "model"
    export_model(hybrid, small_data, folder, training={}, metrics={}, licence="none")
    return hybrid, folder


@pytest.mark.parametrize("max_history", [50, 7], ids=["whole", "truncated"])
@pytest.mark.parametrize("request_time", [False, True], ids=["without-time", "with-time"])
def test_evaluated_lists_are_the_served_ones(
    small_data: PreparedData,
    served: tuple[Hybrid, Path],
    request_time: bool,
    max_history: int,
) -> None:
    hybrid, folder = served
    artifact = read_artifact(folder)
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
    found = []
    for query, row in zip(queries, cases.rows, strict=True):
        recommender.engine.use_counts(counts.before(histories.times[row, None])[0])  # as the server has them then
        found.append(recommender.recommend([query])[0].items)
    ranked = rank_cases(hybrid_scorer(hybrid, counts), small_data, cases, max_history, request_time)
    np.testing.assert_array_equal(np.stack(found), ranked.top)


def test_a_server_answers_the_logits_of_the_model(
    small_data: PreparedData, served: tuple[Hybrid, Path], tmp_path: Path
) -> None:
    """Over gRPC, to requests with their history: its items and scores are those of JAX."""
    hybrid, folder = served
    histories, ids = small_data.histories, small_data.catalog.ids
    counts = DecayedCounts.of(small_data)
    latest, model = counts.until(counts.last_time), Recommender(read_artifact(folder), "cpu")
    model.engine.use_counts(latest)
    trend = np.asarray(hybrid.trend(latest))
    with open_store(tmp_path / "events.sqlite") as store, contextlib.ExitStack() as at_the_end:
        server = create_server(one_model(model, store), store, "127.0.0.1:0")
        server.start()
        at_the_end.callback(server.drain)
        with RecommenderClient(f"127.0.0.1:{server.port}") as client:
            for user in range(5):
                rows = slice(histories.offsets[user], histories.offsets[user + 1])
                items, times = histories.items[rows], histories.times[rows]
                sent = [
                    ServedEvent(item_id=str(raw), rating=float(rating), timestamp=int(at))
                    for raw, rating, at in zip(ids.decode(items), histories.ratings[rows], times, strict=True)
                ]
                answer = client.recommend(history=sent, k=10, request_time=int(times[-1]) + 60).recommendations
                gaps = np.concatenate([[UNKNOWN_GAP], np.diff(times)])
                events = pad_events([items], [small_data.unit_ratings()[rows]], [gaps], 50)
                logits, _ = hybrid.logits(events, jnp.full(1, 60.0), exclude=items[None], trend=trend)
                logits = np.asarray(exclude_items(logits, items[None]))[0]
                best = np.argsort(-logits)[:10]
                assert [one.item_id for one in answer] == [str(raw) for raw in ids.decode(best)]
                np.testing.assert_allclose([one.score for one in answer], logits[best], atol=1e-4)


def test_both_sides_count_with_the_same_half_lives(small_data: PreparedData, model_directory: Path) -> None:
    assert trend.HALF_LIVES_S == serve_trend.HALF_LIVES_S
    exported = read_artifact(model_directory).trend
    later = exported.counted_until + 100_000
    np.testing.assert_allclose(exported.at(later), DecayedCounts.of(small_data).until(later), rtol=1e-5)
