"""The parts of a score: their sum is the score, for every kind of model, and each is what the model computed."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrec.data.prepared import PreparedData
from jaxrec.models.hybrid import Hybrid
from jaxrec.onnx.model_directory import export_model
from serve.client import RecommenderClient, UserEvent
from serve.model.directory import read_artifact
from serve.model.events import Event
from serve.model.exploration import Exploration
from serve.model.filters import ItemFilter
from serve.model.live_catalog import Item, Overlay
from serve.model.parts import Part, parts_of_logits, parts_of_popularity
from serve.model.popular import FALLBACKS
from serve.model.recommender import Answer, Query, Recommender
from serve.model.rules import Boost, Pin, Rules, Subject
from serve.model.trend import HALF_LIVES_S
from serve.observability.metrics import Metrics
from serve.serving.loaded import LoadedModel
from serve.serving.ruled import Origins, candidates_of
from serve.stores import open_store
from serve.stores.base import EventStore
from serve.stores.base import UserEvent as StoredEvent
from tests.conftest import heads
from tests.once import made_once

ITEMS, START, DAY = 60, 1_000_000_000, 86_400
NEW = np.arange(ITEMS + 1) % 4 == 1
KINDS = ("supervised", "no trend", "policy", "new items", "reranked", "repeats", "indexed", "quantized")
WITH_POLICY = ("policy", "reranked", "indexed", "quantized")


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def hybrid(
    kind: str,
    small_data: PreparedData,
    small_hybrid: Hybrid,
    repeating_hybrid: Hybrid,
    random_hybrid: Callable[[PreparedData, int, bool], Hybrid],
    with_random_reranker: Callable[[Hybrid, PreparedData], Hybrid],
) -> Hybrid:
    if kind == "repeats":
        return repeating_hybrid
    if kind in ("policy", "indexed", "quantized"):
        return small_hybrid
    plain = random_hybrid(small_data, 2, False)
    models = plain.lstm, plain.content, plain.cooccurrence, plain.mix_weights()
    if kind == "no trend":
        return Hybrid(*models)
    if kind == "supervised":
        return plain
    if kind == "new items":
        return Hybrid(*models, plain.trend, new_items=NEW)
    return with_random_reranker(Hybrid(*models, plain.trend, small_hybrid.policy, NEW), small_data)


@pytest.fixture(scope="module")
def model(kind: str, hybrid: Hybrid, small_data: PreparedData, tmp_path_factory: pytest.TempPathFactory) -> Recommender:
    """With added items in its catalogue, and with a trend of some items."""

    def export(out: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            # Random models are worse when quantized.
            patch.setattr("jaxrec.onnx.quantize.LEAST_OVERLAP", 0.0)
            patch.setattr("jaxrec.onnx.quantize.MOST_NDCG_LOSS", 1.0)
            given = {"training": {}, "metrics": {}, "licence": "None.", "heads": heads(hybrid, small_data)}
            export_model(hybrid, small_data, out, int8=kind == "quantized", index=kind == "indexed", **given)  # type: ignore[arg-type]

    found = Recommender(read_artifact(made_once(tmp_path_factory, f"parts of {kind}", export)), "cpu")
    own = found.own_catalog
    overlay = Overlay(found.own_live, found.item_rows)
    overlay.apply((f"added {at}", Item(f"added {at}", own.titles[at], own.genres[at])) for at in range(1, 21))
    found.live = overlay.live()
    counts = np.zeros((len(HALF_LIVES_S), ITEMS + 1), np.float32)
    # Of few items, so that new ones come among the first places if nothing holds them.
    counts[:, 2::9] = np.random.default_rng(0).exponential(size=(1, len(range(2, ITEMS + 1, 9)))) * 10
    of_added = np.zeros((len(HALF_LIVES_S), 20), np.float32)
    of_added[:, ::4] = 9.0
    found.engine.use_counts(counts, None, found.live.added_ids, of_added)
    return found


@pytest.fixture(scope="module")
def store(model: Recommender, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EventStore]:
    """With the events of some users."""
    rng, ids = np.random.default_rng(1), model.own_catalog.item_ids
    with open_store(tmp_path_factory.mktemp("parts") / "events.sqlite") as opened:
        opened.record(
            [
                StoredEvent(f"{user}-{at}", f"u{user}", Event(ids[int(item)], 4.0, START + at * DAY), None)
                for user in range(4)
                for at, item in enumerate(rng.integers(1, ITEMS + 1, 1 + 20 * user))
            ]
        )
        yield opened


def check(model: Recommender, kind: str, answer: Answer, query: Query) -> None:
    assert len(answer.explanations) == len(answer.items)
    moment = model._moment(query.live or model.own_live, model.engine.trend)
    for item, score, explanation in zip(
        answer.items.tolist(), answer.scores.tolist(), answer.explanations, strict=True
    ):
        parts = explanation.parts
        assert sum(parts.values()) == pytest.approx(score, rel=1e-5, abs=1e-5)
        assert list(parts) == sorted(parts)
        assert 0 not in parts.values()
        if answer.policy in FALLBACKS:
            assert set(parts) <= {Part.POPULARITY, Part.BOOST}
            continue
        # What no part explains would be said to be of the item's place: nothing is left over where nothing holds it.
        held = answer.origins[item].held if item in answer.origins else 0.0
        assert parts.get(Part.PLACE, 0) <= 0
        if not moment.new[item]:
            assert parts.get(Part.PLACE, 0) == pytest.approx(held, abs=1e-6)
        # A reranker knows the items of the graph alone.
        if kind not in WITH_POLICY:
            assert Part.POLICY not in parts
        if kind == "no trend" or (item <= ITEMS and not model.engine.trend.values[item]):
            assert Part.TREND not in parts
        assert (Part.BOOST in parts) == any(one.name == "BOOST" for one in answer.applied.get(item, ()))
        if kind != "repeats":
            assert Part.REPEAT not in parts


@pytest.fixture
def few_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that pins and boosts bring in items that are not among the best."""
    monkeypatch.setattr("serve.model.rules.CANDIDATES", 2)
    monkeypatch.setattr("serve.model.rules.CANDIDATES_OF_A_PLACE", 1)


@pytest.mark.usefixtures("few_candidates")
def test_an_item_that_only_a_rule_made_a_candidate_has_parts(model: Recommender, kind: str, store: EventStore) -> None:
    history = [Event(model.own_catalog.item_ids[item], 4.0, START + item * DAY) for item in (4, 17, 29)]
    query = Query(history, ITEMS + 20, explain=True, live=model.live, allow_seen=True)
    (whole,) = model.recommend([query])
    rules = Rules(tuple(Boost(Subject(item=item), 1e6) for item in whole.items.tolist()[5::5]))
    found = LoadedModel(model, store, Metrics()).recommend(query._replace(k=2, rules=rules))
    assert set(found.items.tolist()) & set(found.origins)
    check(model, kind, found, query._replace(rules=rules))


def test_parts_are_of_the_ranking_that_an_item_came_from(model: Recommender, kind: str) -> None:
    """The trend can change between the rankings that one answer with rules is made of."""
    history = [Event(model.own_catalog.item_ids[item], 4.0, START + item * DAY) for item in (4, 17, 29)]
    query = Query(history, 5, explain=True, live=model.live, allow_seen=True)
    (first,) = model.recommend([query])
    trend = model.engine.trend
    others = np.setdiff1d(np.arange(2, ITEMS + 1, 3), first.items).astype(np.int32)
    try:
        model.engine.use_counts(np.full((len(HALF_LIVES_S), ITEMS + 1), 7.0, np.float32))
        (second,) = model.recommend([query._replace(filter=ItemFilter(items=others))])
    finally:
        model.engine.trend = trend
    rules = Rules(pins=tuple(Pin(Subject(item=int(item)), 1 + at) for at, item in enumerate(second.items)))
    candidates, origins = candidates_of([first, second], rules, model.live), Origins([first, second])
    answer = replace(first, items=candidates.items, scores=candidates.scores, origins=origins.found)
    explanations = model.explain(query, replace(answer, explanations=()))
    assert all(answer.origins[item].basis is second.basis for item in second.items.tolist())
    if kind != "no trend":
        assert any(one.held < 0 for one in answer.origins.values())
    of_second = {item: at for at, item in enumerate(second.items.tolist())}
    for item, score, explanation in zip(answer.items.tolist(), answer.scores.tolist(), explanations, strict=True):
        parts = explanation.parts
        assert sum(parts.values()) == pytest.approx(score, rel=1e-5, abs=1e-5)
        basis = second.basis if item in of_second else first.basis
        assert basis is not None
        if not model.live.catalog.new[item]:
            assert parts.get(Part.TREND, 0) == pytest.approx(float(basis.trend.values[item]), abs=1e-6)
            held = score - float(second.scores[of_second[item]]) if item in of_second else 0.0
            assert parts.get(Part.PLACE, 0) == pytest.approx(held, abs=1e-5)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_the_parts_of_a_score_add_up_to_it(
    data: st.DataObject, model: Recommender, kind: str, store: EventStore
) -> None:
    ids, live = model.own_catalog.item_ids, model.live
    loaded = LoadedModel(model, store, Metrics(), data.draw(st.sampled_from([None, Exploration(1.0)])))
    places = data.draw(st.lists(st.integers(1, ITEMS), max_size=30))
    history = [
        Event(ids[item], data.draw(st.sampled_from([None, 0.5, 5.0])), START + at * DAY)
        for at, item in enumerate(places)
    ]
    user = data.draw(st.sampled_from([None, "u0", "u3", "nobody"])) if not history else None
    tag = data.draw(st.sampled_from([None, "Drama", "Horror"]))
    slots = data.draw(st.sampled_from([0, 0, 3]))
    rules = None
    if not slots and data.draw(st.booleans()):
        boost = Boost(Subject(tag="Comedy"), data.draw(st.sampled_from([0.1, 5.0])))
        more = {"diversity": 0.5, "pins": (Pin(Subject(item=5), 1),)} if data.draw(st.booleans()) else {}
        rules = Rules(boosts=(boost, Boost(Subject(item=7), 2.0)), **more)  # type: ignore[arg-type]
    query = Query(
        history,
        data.draw(st.sampled_from([1, 10, 40])),
        user_id=user,
        request_time=data.draw(st.sampled_from([None, START + 400 * DAY])),
        explain=True,
        filter=None if tag is None else ItemFilter(any_tags=(tag,)),
        allow_seen=data.draw(st.sampled_from([None, True, False])),
        new_item_slots=model.new_item_slots(slots, live),
        live=data.draw(st.sampled_from([None, live])),
        rules=rules,
    )
    check(model, kind, loaded.recommend(query), query)


def test_each_part_is_what_the_model_computes(model: Recommender, hybrid: Hybrid, kind: str) -> None:
    """Of the whole catalogue, beside JAX: for what no reranker changes and nothing holds."""
    ids = model.own_catalog.item_ids
    history = [Event(ids[item], 4.0, START + at * DAY) for at, item in enumerate((4, 17, 29, 36, 5))]
    query = Query(history, ITEMS, explain=True, request_time=START + 9 * DAY, allow_seen=True)
    (answer,) = model.recommend([query])
    assert answer.basis is not None
    expected = hybrid.parts(answer.basis.state, np.array([answer.basis.request_gap], np.float32))
    parts = dict(zip((Part.LSTM, Part.CONTENT, Part.POLICY, Part.COOCCURRENCE), expected, strict=True))
    trend = np.asarray(hybrid.trend(np.zeros((len(HALF_LIVES_S), ITEMS + 1), np.float32)))
    assert trend.shape == (ITEMS + 1,)
    for item, explanation in zip(answer.items.tolist(), answer.explanations, strict=True):
        for part, values in parts.items():
            if part is Part.POLICY and kind == "reranked":
                continue
            assert explanation.parts.get(part, 0) == pytest.approx(float(values[0, item]), abs=1e-4), (item, part)
        assert explanation.parts.get(Part.TREND, 0) == pytest.approx(float(model.engine.trend.values[item]), abs=1e-6)
    if kind == "reranked":
        # What the reranker changes is the policy's, and more than nothing.
        of_head = np.asarray(parts[Part.POLICY])[0]
        changed = [
            abs(explanation.parts.get(Part.POLICY, 0) - of_head[item])
            for item, explanation in zip(answer.items.tolist(), answer.explanations, strict=True)
            if not NEW[item]
        ]
        assert max(changed) > 0.1
    if kind == "new items":
        held = [Part.PLACE in explanation.parts for explanation in answer.explanations]
        assert any(held)


def test_what_no_part_explains_is_a_rerankers_or_the_places() -> None:
    scores = np.array([5.0, 5.0, 5.0], np.float32)
    of_lstm = np.array([5.00001, 6.0, 4.0], np.float32)
    of_policy = parts_of_logits(scores, {Part.LSTM: of_lstm}, np.array([False, False, True]))
    assert of_policy[0] == {Part.LSTM: pytest.approx(5, abs=1e-4)}
    assert of_policy[1] == {Part.LSTM: 6, Part.PLACE: -1}
    assert of_policy[2] == {Part.LSTM: 4, Part.POLICY: 1}


def test_of_what_is_popular_boosts_are_a_part() -> None:
    found = parts_of_popularity(np.array([6.0, 4.0], np.float32), np.array([3.0, 1.0]))
    assert found == [{Part.POPULARITY: 2, Part.BOOST: 4}, {Part.POPULARITY: 4}]


def test_answers_without_reasons_have_no_parts(client: RecommenderClient) -> None:
    client.record_events([UserEvent(event_id="1", user_id="7", item_id="1007", timestamp=3)])
    plain, explained = (client.recommend(user_id="7", k=5, explain=explain) for explain in (False, True))
    assert not any(one.HasField("explanation") for one in plain.recommendations)
    for one in explained.recommendations:
        assert sum(part.value for part in one.explanation.parts) == pytest.approx(one.score, rel=1e-4, abs=1e-4)
        assert len(one.explanation.parts) >= 2
