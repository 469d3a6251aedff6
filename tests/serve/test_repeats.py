"""Models that may answer items of the history: the server counts the meetings as training does, however it learns of
them."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest

from jaxrec.config import PrepareConfig
from jaxrec.data.prepare import prepare
from jaxrec.data.prepared import PreparedData
from jaxrec.evaluation.ranking import rank_cases
from jaxrec.evaluation.scorers import hybrid_scorer
from jaxrec.models.hybrid import Hybrid
from jaxrec.models.repeat import TABLE_SIZE, Repeat
from jaxrec.models.repeat import repeat_buckets as trained_buckets
from jaxrec.onnx.model_directory import export_model
from serve.front.server import create_server
from serve.model.directory import Artifact, read_artifact
from serve.model.events import Event, KnownEvent
from serve.model.manifest import ArtifactError, ModelInfo
from serve.model.recommender import Query, Recommender
from serve.model.repeat import meetings, met_again
from serve.pb import open_inference_pb2 as pb
from serve.pb.open_inference_pb2_grpc import GRPCInferenceServiceStub
from serve.serving.states import StateCache
from serve.settings import SearchBy
from serve.stores import open_store
from serve.stores.base import EventStore, UserEvent
from tests.groceries import groceries
from tests.serve.api.test_inference_protocol import features, request
from tests.serve.one_model import one_model
from tests.serve.serving.test_states import checked, record

DAY = 86_400


@pytest.fixture(scope="module")
def data() -> PreparedData:
    log = groceries(users=30, items=40, staples=6, days=40, new_share=0.2, seed=0).log
    return prepare(log, None, PrepareConfig(1, 1))


@pytest.fixture(scope="module")
def hybrid(data: PreparedData, random_hybrid: Callable[[PreparedData, int, bool], Hybrid]) -> Hybrid:
    """A random model with a random table of repeats."""
    plain, rng = random_hybrid(data, 2, False), np.random.default_rng(2)
    table = np.append(0, rng.normal(size=TABLE_SIZE - 1))
    parts = plain.lstm, plain.content, plain.cooccurrence, plain.mix_weights(), plain.trend
    return Hybrid(*parts, repeat=Repeat(table))


@pytest.fixture(scope="module")
def directory(data: PreparedData, hybrid: Hybrid, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared: copy it before changing it."""
    out = tmp_path_factory.mktemp("repeats") / "model"
    export_model(hybrid, data, out, training={}, metrics={}, licence="Synthetic.", index=True)
    return out


@pytest.fixture(scope="module")
def artifact(directory: Path) -> Artifact:
    return read_artifact(directory)


@pytest.fixture(scope="module")
def model(artifact: Artifact) -> Recommender:
    return Recommender(artifact, "cpu", search_by="exact")


def test_meetings_score_as_they_were_trained(artifact: Artifact, hybrid: Hybrid) -> None:
    """Parity of the two implementations, on histories with equal times and requests with and without a time."""
    rng = np.random.default_rng(3)
    table, repeat = np.asarray(hybrid.repeat.table[...]), artifact.info.repeat
    for length in (1, 2, 3, 10, 60, 300):
        items, times = rng.integers(1, 9, length), np.sort(rng.integers(0, 20 * length, length)) * 977
        history = [KnownEvent(item, None, at) for item, at in zip(items.tolist(), times.tolist(), strict=True)]
        half = length // 2
        met = meetings(history)
        if half:
            piecewise = met_again(meetings(history[:half]), half, history[half:])
            np.testing.assert_array_equal(np.sort(piecewise, order="item"), met)
        for request_time in (None, int(times[-1]), int(times[-1]) + 5 * DAY):
            found, places = trained_buckets(items, times, request_time)
            order = np.argsort(found)
            seen = repeat.scores_of(met, length, int(times[-1]), request_time)
            np.testing.assert_array_equal(seen.items, found[order])
            np.testing.assert_allclose(seen.scores, table[places[order]].sum(axis=1), atol=1e-5)


@pytest.mark.parametrize("search_by", ["exact", "index"])
@pytest.mark.parametrize("request_time", [False, True], ids=["without-time", "with-time"])
def test_evaluated_lists_are_the_served_ones(
    artifact: Artifact, data: PreparedData, hybrid: Hybrid, request_time: bool, search_by: SearchBy
) -> None:
    histories, cases = data.histories, data.split.test
    queries = []
    for user, row in zip(cases.users, cases.rows, strict=True):
        rows = slice(histories.offsets[user], row)
        raw_items = data.catalog.ids.decode(histories.items[rows]).tolist()
        times = histories.times[rows].tolist()
        events = [Event(str(item), None, at) for item, at in zip(raw_items, times, strict=True)]
        queries.append(Query(events, k=10, request_time=int(histories.times[row]) if request_time else None))
    model = Recommender(artifact, "cpu", search_by=search_by)
    model.engine.use_counts(np.zeros_like(artifact.trend.counts))
    served = np.stack([answer.items for answer in model.recommend(queries)])
    ranked = rank_cases(hybrid_scorer(hybrid), data, cases, 50, request_time, exclude_seen=False)
    np.testing.assert_array_equal(served, ranked.top)
    starts = histories.offsets[cases.users]
    bounds = zip(served, starts, cases.rows, strict=True)
    assert sum(np.isin(row, histories.items[start:stop]).sum() for row, start, stop in bounds) > len(cases)


@pytest.mark.parametrize("max_history", [50, 6], ids=["whole", "window"])
def test_a_stored_user_is_answered_as_if_the_history_were_sent_along(
    model: Recommender, tmp_path: Path, max_history: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Events of many users that come in order, at equal times and late; asked with and without a time; restarted."""
    monkeypatch.setattr(model, "info", _with_window(model, max_history))
    rng = np.random.default_rng(4)
    ids, now, number = [*model.catalog.item_ids[1:12], "not known"], {"ada": 10**9, "bob": 10**9}, 0
    with open_store(tmp_path / "events.sqlite") as store:
        states = StateCache(model, store, capacity=1)
        for step in range(60):
            user = ("ada", "bob")[step % 2]
            for _ in range(rng.integers(1, 4)):
                now[user] += int(rng.integers(0, 3)) * DAY
                late = 4 * DAY if rng.random() < 0.1 else 0
                event = Event(ids[rng.integers(len(ids))], None, max(10**9, now[user] - late))
                store.record([UserEvent(f"e{number}", user, event)])
                number += 1
            if step % 7 == 6:
                states.spill()
                store.flush()
                states = StateCache(model, store, capacity=1)
            at = [None, now[user], now[user] + 3 * DAY, now[user] - 5 * DAY][step % 4]
            checked(states, model, store, [Query((), 20, (ids[0],), at, user_id=user)])
        assert any(len(user.met) for user in states._users.values())


def _with_window(model: Recommender, max_history: int) -> ModelInfo:
    return dataclasses.replace(model.info, max_history=max_history)


def test_of_a_long_history_only_the_end_is_read_again(
    model: Recommender, store: EventStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "info", _with_window(model, 6))
    states, ids = StateCache(model, store), model.catalog.item_ids
    events = [Event(ids[1 + at % 5], None, 10**9 + at * DAY) for at in range(40)]
    record(store, "ada", events[:30])
    checked(states, model, store, [Query((), 5, user_id="ada")])
    read = []
    original = store.changes
    monkeypatch.setattr(store, "changes", lambda *asked: read.append(asked) or original(*asked))
    for at in range(30, 40):
        record(store, "ada", [events[at]], f"new {at} ")
        states.recommend([Query((), 5, user_id="ada")])
    assert all(len(asked) == 3 or asked[1:] for asked in read)
    monkeypatch.undo()
    monkeypatch.setattr(model, "info", _with_window(model, 6))
    checked(states, model, store, [Query((), 5, user_id="ada")])


def test_only_what_the_request_excludes_is_left_out(model: Recommender) -> None:
    ids = model.catalog.item_ids
    events = [Event(ids[1], None, 10**9), Event(ids[2], None, 10**9 + DAY)]
    everything, without = model.recommend([Query(events, 40), Query(events, 40, (ids[1],))])
    assert sorted(everything.items.tolist()) == list(range(1, len(ids)))
    assert 1 not in without.items
    assert 2 in without.items
    (explained,) = model.recommend([Query(events, 5, explain=True)])
    assert len(explained.explanations) == 5


@pytest.fixture
def inference(model: Recommender, store: EventStore) -> Iterator[GRPCInferenceServiceStub]:
    server = create_server(one_model(model, store), store, "127.0.0.1:0")
    server.start()
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        yield GRPCInferenceServiceStub(channel)
    server.drain()


def test_raw_tensors_come_with_what_is_added(inference: GRPCInferenceServiceStub) -> None:
    metadata = inference.ModelMetadata(pb.ModelMetadataRequest(name="jaxrec"), timeout=30)
    assert {"seen", "seen_score"} < {tensor.name for tensor in metadata.inputs}
    nothing = {"exclude": np.zeros((2, 1), np.int32), "k": np.array([40], np.int64)}

    def scores(seen: list[list[int]], score: list[list[float]]) -> np.ndarray:
        added = {"seen": np.array(seen, np.int32), "seen_score": np.array(score, np.float32)}
        answer = inference.ModelInfer(request(features(**nothing, **added)), timeout=30)
        items, found = (
            np.frombuffer(answer.raw_output_contents[at], kind).reshape(2, 40) for at, kind in ((1, "<i4"), (2, "<f4"))
        )
        return np.take_along_axis(found, np.argsort(items, axis=1), axis=1)

    plain, more = scores([[0], [0]], [[0], [0]]), scores([[5, 7], [0, 3]], [[2, -1], [0, 1]])
    expected = np.zeros((2, 40))
    expected[0, [4, 6]], expected[1, 2] = [2, -1], 1
    np.testing.assert_allclose(more - plain, expected, atol=1e-4)
    for wrong, where in (([[5, 5], [1, 2]], "each item once"), ([[41, 0], [1, 2]], r"0\.\.40")):
        with pytest.raises(grpc.RpcError, match=where):
            scores(wrong, [[0, 0], [0, 0]])
    with pytest.raises(grpc.RpcError, match="seen_score"):
        scores([[1], [2]], [[float("nan")], [0]])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"items": "sometimes"}, 'seen.items is "sometimes", expected exclude or allow'),
        ({"items": "exclude"}, "seen_score"),
        ({"count": {"edges": [2, 1], "scores": [[0, 0, 0]]}}, "seen.count.edges"),
        ({"ago": {"edges": [1], "scores": [[0]]}}, "seen.ago.scores"),
        ({"age": {"edges": [1]}}, "seen.age.scores is missing"),
    ],
)
def test_a_manifest_that_says_something_else_is_refused(
    directory: Path, tmp_path: Path, changed: dict, message: str
) -> None:
    copy = tmp_path / "model"
    shutil.copytree(directory, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["seen"] |= changed
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match=message):
        Recommender(read_artifact(copy), "cpu", search_by="exact")
