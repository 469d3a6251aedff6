"""Models that may recommend items of the history again: the server scores these items as training does, however it
learns of their events."""

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
from serve.model.ranking.faiss_index import ItemIndex
from serve.model.ranking.search import Search
from serve.model.recommender import Query, Recommender
from serve.model.repeat import Repeat as ServedRepeat
from serve.model.repeat import item_stats, updated_stats
from serve.pb import open_inference_pb2 as pb
from serve.pb.open_inference_pb2_grpc import GRPCInferenceServiceStub
from serve.serving.states import StateCache
from serve.serving.user_state import UserState
from serve.settings import SearchBy
from serve.stores import open_store
from serve.stores.base import MOST_EVENTS, EventStore, UserEvent
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


def test_items_of_the_history_score_as_they_were_trained(artifact: Artifact, hybrid: Hybrid) -> None:
    """Parity of the two implementations, on histories with equal times and requests with and without a time."""
    rng = np.random.default_rng(3)
    table, repeat = np.asarray(hybrid.repeat.table[...]), artifact.info.repeat
    for length in (1, 2, 3, 10, 60, 300):
        items, times = rng.integers(1, 9, length), np.sort(rng.integers(0, 20 * length, length)) * 977
        history = [KnownEvent(item, None, at) for item, at in zip(items.tolist(), times.tolist(), strict=True)]
        half = length // 2
        stats = item_stats(history)
        if half:
            piecewise = updated_stats(item_stats(history[:half]), half, history[half:])
            np.testing.assert_array_equal(piecewise, stats)
        for request_time in (None, int(times[-1]), int(times[-1]) + 5 * DAY):
            found, places = trained_buckets(items, times, request_time)
            order = np.argsort(found)
            seen = repeat.scores_of(stats, length, int(times[-1]), request_time)
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
        assert any(len(user.stats) for user in states._users.values())


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


def test_new_rows_keep_the_order_of_the_items_and_leave_the_old_ones_as_they_are() -> None:
    old = item_stats([KnownEvent(5, None, 10), KnownEvent(3, None, 20)])
    before = old.tolist()
    new = updated_stats(old, 2, [KnownEvent(4, None, 30), KnownEvent(5, None, 40), KnownEvent(9, None, 50)])
    assert new.tolist() == [(3, 1, 1, 20, 20), (4, 1, 2, 30, 30), (5, 2, 3, 10, 40), (9, 1, 4, 50, 50)]
    assert old.tolist() == before == [(3, 1, 1, 20, 20), (5, 1, 0, 10, 10)]
    assert updated_stats(old, 2, []).tolist() == before


def test_a_first_answer_counts_the_history_once(
    model: Recommender, store: EventStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No score is computed for the state, which does not depend on it."""
    calls, scores_of = [], ServedRepeat.scores_of

    def counted(name: str, function: Callable) -> Callable:
        return lambda *given: calls.append(name) or function(*given)

    monkeypatch.setattr(ServedRepeat, "scores_of", counted("scores", scores_of))
    for module in ("model.features", "serving.states"):
        monkeypatch.setattr(f"serve.{module}.item_stats", counted("stats", item_stats))
    record(store, "ada", [Event(model.catalog.item_ids[1 + at % 5], None, 10**9 + at * DAY) for at in range(9)])
    StateCache(model, store).recommend([Query((), 5, user_id="ada")])
    assert sorted(calls) == ["scores", "stats"]


@pytest.mark.parametrize("new", ["known", "not known"])
def test_events_that_the_store_does_not_give_any_more_do_not_count(
    model: Recommender, store: EventStore, new: str
) -> None:
    """The oldest events of MOST_EVENTS are all on one item; as many new ones make the store leave those out, and the
    answer is the same as after a restart."""
    ids, old = model.catalog.item_ids, 20
    filler = "not known" if new == "not known" else ids[2]  # a history of which the model reads all, or its end
    items = [ids[1]] * old + [filler] * (MOST_EVENTS - old - 1) + [ids[2]]
    record(store, "ada", [Event(item, None, 10**9 + 60 * at) for at, item in enumerate(items)])
    states, query = StateCache(model, store), Query((), 5, user_id="ada")
    states.recommend([query])
    for at in range(3):
        item = "not known" if new == "not known" and at == 1 else ids[3]
        record(store, "ada", [Event(item, None, 10**9 + 60 * (MOST_EVENTS + at))], f"new {at} ")
        checked(states, model, store, [query])
    states.spill()
    store.flush()
    found = store.load_state("ada", model.info.model_version)
    assert found is not None
    state = UserState.from_bytes(0, found.state, model.engine.state_width, len(ids) - 1, repeats=True)
    assert state is not None
    assert state.stats["count"][0] == old - 3


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("item", [0, 2]),
        ("item", [1, 99]),
        ("item", [2, 2]),
        ("count", [0, 3]),
        ("count", [3, 1]),
        ("place", [3, 1]),
        ("place", [-1, 1]),
        ("first", [2**40, 2**40]),
    ],
)
def test_a_spilled_state_with_rows_of_no_history_is_not_used(
    model: Recommender, store: EventStore, field: str, values: list[int]
) -> None:
    """Items are 1 to 40, each once and in order; the history has three events, on items 1 and 2."""
    ids = model.catalog.item_ids
    record(store, "ada", [Event(ids[item], None, 10**9 + DAY * at) for at, item in enumerate((1, 2, 1))])
    states = StateCache(model, store)
    states.recommend([Query((), 5, user_id="ada")])
    states.spill()
    store.flush()
    spilled = store.load_state("ada", model.info.model_version)
    assert spilled is not None
    asked = model.engine.state_width, len(ids) - 1, True
    read = UserState.from_bytes(0, spilled.state, *asked)
    assert read is not None
    stats = read.stats.copy()
    assert stats.tolist() == [(1, 2, 2, 10**9, 10**9 + 2 * DAY), (2, 1, 1, 10**9 + DAY, 10**9 + DAY)]
    stats[field] = values
    damaged = spilled.state[: -len(stats.tobytes())] + stats.tobytes()
    assert UserState.from_bytes(0, damaged, *asked) is None
    store.save_states([spilled._replace(state=damaged)])
    store.flush()
    checked(StateCache(model, store), model, store, [Query((), 40, user_id="ada")])


def test_the_index_names_more_candidates_only_for_what_is_subtracted(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    """4 candidates and 2 for an answer of 2 items; the index is searched for the next power of two."""
    assert artifact.index is not None
    search = Search(artifact, dataclasses.replace(artifact.index, candidates=4, candidates_per_answer=1))
    searched, original = [], ItemIndex.search
    monkeypatch.setattr(ItemIndex, "search", lambda *given: searched.append(given[2]) or original(*given))
    rng = np.random.default_rng(5)
    query = rng.normal(size=(1, artifact.item_vectors.shape[1])).astype(np.float32)
    state, nothing = np.zeros((1, len(artifact.index.recent_weights)), np.float32), np.zeros((1, 1), np.int32)
    trending = search.trending(np.zeros(41, np.float32))
    items = np.arange(1, 21, dtype=np.int32)[None]
    for added in (0.0, 1.0, -1.0):
        scores = np.full((1, 20), added, np.float32)
        search.best(query, state, nothing, np.array([2]), trending, (items, scores))
    assert searched == [8, 8, 32]


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
