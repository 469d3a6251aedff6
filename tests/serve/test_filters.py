"""Filters, `seen` and `new_item_slots`: a filtered answer is the whole ranking without the items that the request
leaves out, for every way to give a history. A slate drawn from it has exact propensities. The log names the options."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import onnxruntime
import pytest

from jaxrec.data.events import pad_events
from jaxrec.data.prepared import PreparedData
from jaxrec.models.hybrid import Hybrid
from jaxrec.onnx.model_directory import export_model
from serve.api.filters import decode_filter
from serve.api.rules import MAX_ALLOWED_ITEMS
from serve.client import Event as SentEvent
from serve.client import ItemFilter as SentFilter
from serve.client import RecommenderClient, recommend_request
from serve.front.server import create_server
from serve.model.directory import read_artifact
from serve.model.events import Event
from serve.model.exploration import Exploration
from serve.model.filters import ItemFilter
from serve.model.live_catalog import NewestFilters
from serve.model.popular import POPULARITY
from serve.model.recommender import Answer, Query, Recommender
from serve.pb.recommender_pb2 import RecommendRequest, RecommendResponse, Seen
from serve.serving.states import StateCache
from serve.stores import open_store
from serve.stores.base import EventStore, UserEvent
from tests.serve.answers import answered, assert_same
from tests.serve.one_model import one_model
from tests.serve.stores.slates import slates_of

ITEMS, DAY, START = 60, 86_400, 1_000_000_000
NEW = np.arange(ITEMS + 1) % 4 == 1  # 1, 5, ... 57
TEMPERATURE = 0.5


@pytest.fixture(scope="module")
def free_hybrid(repeating_hybrid: Hybrid) -> Hybrid:
    """May recommend items of the history again, and every fourth item is new."""
    parts = repeating_hybrid.lstm, repeating_hybrid.content, repeating_hybrid.cooccurrence
    mix = repeating_hybrid.mix_weights(), repeating_hybrid.trend
    return Hybrid(*parts, *mix, new_items=NEW, repeat=repeating_hybrid.repeat)


@pytest.fixture(scope="module")
def free_directory(free_hybrid: Hybrid, small_data: PreparedData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("free") / "model"
    export_model(free_hybrid, small_data, out, training={}, metrics={}, licence="Synthetic.", index=False)
    return out


@pytest.fixture(scope="module")
def free_model(free_directory: Path) -> Recommender:
    """Without a trend, so that what is new stays new."""
    model = Recommender(read_artifact(free_directory), "cpu")
    model.engine.use_counts(np.zeros_like(model.engine.exported.counts))
    return model


@pytest.fixture(params=["model", "free_model"])
def either(request: pytest.FixtureRequest) -> Recommender:
    """One that excludes items of the history and knows no new ones, and one that does neither."""
    return request.getfixturevalue(request.param)


def allowed_ids(model: Recommender, asked: ItemFilter) -> set[str]:
    """One item after the other."""
    found = set()
    for item in range(1, ITEMS + 1):
        tags = set(model.catalog.genres[item])
        if (
            (asked.items is None or item in asked.items.tolist())
            and (not asked.any_tags or tags & set(asked.any_tags))
            and tags >= set(asked.all_tags)
            and not tags & set(asked.none_tags)
        ):
            found.add(model.catalog.item_ids[item])
    return found


TAGS = ["Action", "Comedy", "Drama", "Horror", "Romance", "Sci-Fi"]


def random_filter(rng: np.random.Generator) -> ItemFilter:
    tags = [tuple(rng.choice(TAGS, rng.integers(0, 3), replace=False).tolist()) for _ in range(3)]
    # Half of them without tags that have to be there, else little is left.
    any_tags, all_tags, none_tags = (one if rng.random() < 0.5 else () for one in tags)
    items = rng.integers(1, ITEMS + 1, rng.integers(0, 50)).astype(np.int32) if rng.random() < 0.4 else None
    return ItemFilter(items, any_tags, all_tags, none_tags)


def assert_first(found: Answer, whole: Answer, k: int) -> None:
    n = min(k, len(whole.items))
    assert len(found.items) == n
    if n:
        assert_same(found, dataclasses.replace(whole, items=whole.items[:n], scores=whole.scores[:n]))


def test_a_filtered_answer_is_the_whole_ranking_without_the_others(either: Recommender, tmp_path: Path) -> None:
    """Of a history that is sent along and of a stored one, beside another query in the same batch."""
    ids, sizes = either.catalog.item_ids, set()
    for seed in range(40):
        rng = np.random.default_rng(seed)
        asked, k, allow_seen = random_filter(rng), int(rng.integers(1, 70)), [None, True, False][seed % 3]
        events = [
            Event(ids[item], None if rng.random() < 0.5 else 4.0, START + at * DAY)
            for at, item in enumerate(rng.integers(1, ITEMS + 1, rng.integers(1, 12)))
        ]
        excluded = tuple(ids[item] for item in rng.integers(1, ITEMS + 1, rng.integers(0, 5)))
        left_out = (*excluded, *(set(ids[1:]) - allowed_ids(either, asked)))
        (whole,) = either.recommend([Query(events, ITEMS, left_out, allow_seen=allow_seen)])
        sizes.add(len(whole.items))
        query, other = Query(events, k, excluded, filter=asked, allow_seen=allow_seen), Query(events[:1], 9)
        (found, beside), (alone,) = either.recommend([query, other]), either.recommend([other])
        assert_first(found, whole, k)
        assert_first(beside, alone, 9)
        with open_store(tmp_path / f"{seed}.sqlite") as store:
            store.record([UserEvent(f"{at}", "ada", event) for at, event in enumerate(events)])
            stored = query._replace(events=(), user_id="ada")
            found, unfiltered = StateCache(either, store).recommend([stored, stored._replace(filter=None, k=ITEMS)])
        assert_first(found, whole, k)
        (expected,) = either.recommend([Query(events, ITEMS, excluded, allow_seen=allow_seen)])
        assert_first(unfiltered, expected, ITEMS)
        if len(whole.items) > 2:
            between = [float(whole.scores[at : at + 2].mean()) for at in (0, len(whole.scores) // 2)]
            for least in between:
                (cut,) = either.recommend([query._replace(k=ITEMS, filter=asked._replace(minimum_score=least))])
                assert_first(cut, whole, int(np.sum(whole.scores >= least)))
    assert 0 in sizes
    assert len(sizes) > 15


def test_as_many_items_come_as_there_are(either: Recommender) -> None:
    ids = either.catalog.item_ids
    asked = ItemFilter(all_tags=("Horror",))
    horror = allowed_ids(either, asked)
    assert 10 < len(horror) < 30
    history = [Event(ids[3], 4.0, START)]
    for k in (1, 10, 60):
        (answer,) = either.recommend([Query(history, k, filter=asked, allow_seen=True)])
        assert len(answer.items) == min(k, len(horror))
        assert {ids[item] for item in answer.items} <= horror


def graph_scores(directory: Path, model: Recommender, item: int, inputs: dict[str, Any]) -> np.ndarray:
    """[items + 1]: of `sequence.onnx` itself, for a history of one event without a rating."""
    session = onnxruntime.InferenceSession(directory / "sequence.onnx", providers=["CPUExecutionProvider"])
    minus_one = np.array([[-1]], np.float32)
    found, scores = session.run(
        ["items", "scores"],
        {
            **{"item": np.array([[item]], np.int32), "rating": minus_one, "gap": minus_one},
            **{"length": np.array([1], np.int32), "request_gap": minus_one[0], "k": np.array([ITEMS], np.int64)},
            **{"trend": model.engine.trend.values, "blocked": np.zeros((1, ITEMS + 1), bool)},
            **{"exclude": np.zeros((1, 1), np.int32), **inputs},
        },
    )
    of_item = np.full(ITEMS + 1, -np.inf, np.float32)
    of_item[found[0]] = scores[0]
    return of_item


def test_with_seen_items_of_the_history_come_or_stay_away(
    model: Recommender, model_directory: Path, free_model: Recommender, free_directory: Path
) -> None:
    """Those that come score as any other item; those of a model that scores them by their events stay away."""
    history = [Event(model.catalog.item_ids[3], None, START)]
    allowed = graph_scores(model_directory, model, 3, {})
    (answer,) = model.recommend([Query(history, ITEMS, allow_seen=True)])
    assert 3 in answer.items
    np.testing.assert_allclose(answer.scores, allowed[answer.items], atol=1e-4)
    assert len(answer.items) == ITEMS
    (answer,) = free_model.recommend([Query(history, ITEMS, allow_seen=False)])
    nothing = {"seen": np.zeros((1, 1), np.int32), "seen_score": np.zeros((1, 1), np.float32)}
    without = graph_scores(free_directory, free_model, 3, {**nothing, "exclude": np.array([[3]], np.int32)})
    assert sorted(answer.items.tolist()) == [item for item in range(1, ITEMS + 1) if item != 3]
    np.testing.assert_allclose(answer.scores, without[answer.items], atol=1e-4)
    (own,) = free_model.recommend([Query(history, ITEMS)])
    assert 3 in own.items


def uncapped_scores(hybrid: Hybrid, events: list[Event], model: Recommender) -> np.ndarray:
    """[items + 1]: the logits of the same models without new items."""
    plain = Hybrid(hybrid.lstm, hybrid.content, hybrid.cooccurrence, hybrid.mix_weights(), hybrid.trend)
    items = np.array([model.catalog.index[event.item_id] for event in events], np.int32)
    times = np.array([event.timestamp for event in events])
    padded = pad_events([items], [np.full(len(items), -1, np.float32)], [np.diff(times, prepend=times[0] + 1)], 8)
    logits, _ = plain.logits(padded, np.array([-1.0], np.float32), trend=np.asarray(model.engine.trend.values))
    return np.asarray(logits)[0]


@pytest.mark.parametrize("stored", [False, True], ids=["sent-along", "stored"])
@pytest.mark.parametrize(
    ("k", "slots", "asked", "trending"),
    [
        (10, 3, None, None),
        (5, 5, None, None),
        (10, 1, ItemFilter(any_tags=("Drama",)), None),
        (60, 40, None, None),  # there are 15 new items
        (10, 4, ItemFilter(items=np.array([*range(1, 30, 4), 2, 3, 4], np.int32)), None),
        (10, 10, ItemFilter(items=np.array([5, 9, 2, 3, 4], np.int32)), None),
        (10, 3, None, 21),
    ],
)
def test_new_items_have_their_places(
    free_model: Recommender,
    free_hybrid: Hybrid,
    store: EventStore,
    stored: bool,
    k: int,
    slots: int,
    asked: ItemFilter | None,
    trending: int | None,
) -> None:
    """By their logits in the same models without a cap. An item that has a trend is not new."""
    ids = free_model.catalog.item_ids
    events = [Event(ids[item], None, START + at * DAY) for at, item in enumerate((4, 10, 23))]
    counts = np.zeros_like(free_model.engine.exported.counts)
    if trending is not None:
        counts[:, trending] = 9
    free_model.engine.use_counts(counts)
    try:
        scores, excluded = uncapped_scores(free_hybrid, events, free_model), {4, 10, 23}
        query = Query(events, k, filter=asked, allow_seen=False, new_item_slots=slots)
        if stored:
            store.record([UserEvent(f"{at}", "ada", event) for at, event in enumerate(events)])
            (answer,) = StateCache(free_model, store).recommend([query._replace(events=(), user_id="ada")])
        else:
            (answer,) = free_model.recommend([query])
    finally:
        free_model.engine.use_counts(np.zeros_like(counts))
    allowed = {ids.index(one) for one in allowed_ids(free_model, asked or ItemFilter())} - excluded
    best = sorted(allowed, key=lambda item: -scores[item])
    new = [item for item in best if NEW[item] and item != trending]
    known = [item for item in best if item not in new]
    count = max(min(slots, len(new)), k - len(known))
    expected = sorted([*known[: k - min(count, len(new))], *new[:count]], key=lambda item: -scores[item])
    assert answer.items.tolist() == expected
    np.testing.assert_allclose(answer.scores, scores[answer.items], atol=1e-4)
    assert np.isin(answer.items, new).sum() == min(count, len(new)) > 0


def test_without_places_new_items_stay_below_the_first_ten(free_model: Recommender) -> None:
    history = [Event(free_model.catalog.item_ids[4], None, START)]
    plain, placed = free_model.recommend([Query(history, 12), Query(history, 12, new_item_slots=4)])
    assert not NEW[plain.items[:10]].any()
    assert NEW[placed.items].sum() == 4


def test_explanations_are_of_the_items_that_are_answered(either: Recommender, monkeypatch: pytest.MonkeyPatch) -> None:
    """Items that are far from the best are explained by their own scores, not by those of the last of the best. A new
    item that is alone has no known ones to stay below."""
    ids = either.catalog.item_ids
    events = [Event(ids[item], 4.0, START + at * DAY) for at, item in enumerate((4, 10, 23))]
    (whole,) = either.recommend([Query(events, ITEMS, allow_seen=False)])
    slots = 2 if either.new_item_count else 0
    query = Query(events, 3, explain=True, filter=ItemFilter(items=whole.items[-3:]), allow_seen=False)
    singles = [query._replace(filter=ItemFilter(items=np.array([item]))) for item in whole.items[-3:].tolist()]
    alone = {answer.items.item(): answer.explanations[0] for answer in either.recommend(singles)}
    assert any(explanation.events for explanation in alone.values())
    monkeypatch.setattr("serve.model.recommender.ASKED_ITEMS", 3)
    (answer,) = either.recommend([query._replace(new_item_slots=slots)])
    assert sorted(answer.items.tolist()) == sorted(alone)
    for item, explanation in zip(answer.items.tolist(), answer.explanations, strict=True):
        assert [one.event for one in explanation.events] == [one.event for one in alone[item].events]
        for found, expected in zip(explanation.events, alone[item].events, strict=True):
            assert found.influence == pytest.approx(expected.influence, abs=1e-4)


@pytest.mark.parametrize("stored", [False, True], ids=["sent-along", "stored"])
def test_a_refresh_of_the_trend_during_a_request_changes_nothing_of_it(
    free_model: Recommender, store: EventStore, stored: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the choice of new items and their ranking, the best of the new items gets a trend."""
    ids, zeros = free_model.catalog.item_ids, np.zeros_like(free_model.engine.exported.counts)
    events = [Event(ids[item], None, START + at * DAY) for at, item in enumerate((4, 10, 23))]
    query = Query(events, 10, allow_seen=False, new_item_slots=3)
    (expected,) = free_model.recommend([query])
    counts, masks = zeros.copy(), free_model.masks
    counts[:, next(item for item in expected.items.tolist() if NEW[item])] = 9

    def refreshed(*given: Any) -> list[Any]:
        found = masks(*given)
        free_model.engine.use_counts(counts)
        return found

    if stored:
        store.record([UserEvent(f"{at}", "ada", event) for at, event in enumerate(events)])
        query = query._replace(events=(), user_id="ada")
    answering = StateCache(free_model, store)
    with monkeypatch.context() as patched:
        patched.setattr(free_model, "masks", refreshed)
        try:
            (found,) = answering.recommend([query])
        finally:
            free_model.engine.use_counts(zeros)
    assert found.items.tolist() == expected.items.tolist()
    np.testing.assert_allclose(found.scores, expected.scores, atol=1e-4)


@pytest.mark.parametrize("excluded", ["history", "request"])
def test_items_that_have_been_excluded_since_are_explained(model: Recommender, excluded: str) -> None:
    """The history that explains an answer is read later: by then it can have the only allowed item."""
    ids = model.catalog.item_ids
    events = [Event(ids[item], 4.0, START + at * DAY) for at, item in enumerate((4, 10, 23))]
    (answer,) = model.recommend([Query(events, 1)])
    (item,) = answer.items.tolist()
    query = Query(events, 1, filter=ItemFilter(items=np.array([item], np.int32)))
    (expected,) = model.explain(query, answer)
    if excluded == "request":
        (found,) = model.explain(query._replace(exclude_item_ids=(ids[item],)), answer)
        assert found == expected
        return
    more = query._replace(events=[*events, Event(ids[item], None, START + 9 * DAY)])
    (found,) = model.explain(more, answer)
    assert found.text


def test_an_empty_answer_has_no_explanations(either: Recommender) -> None:
    ids = either.catalog.item_ids
    events = [Event(ids[item], 4.0, START + at * DAY) for at, item in enumerate((4, 10, 23))]
    nothing = ItemFilter(items=np.array([4], np.int32))
    (answer,) = either.recommend([Query(events, 3, explain=True, filter=nothing, allow_seen=False)])
    assert (len(answer.items), answer.explanations) == (0, ())
    assert either.explain(Query(events, 3, filter=nothing), answer) == ()


def test_popular_items_are_filtered_too(model: Recommender) -> None:
    ids, catalog = model.catalog.item_ids, model.catalog
    asked = ItemFilter(any_tags=("Drama",), minimum_score=float(np.median(catalog.popularity[1:])))
    (answer,) = model.recommend([Query((), 60, (ids[catalog.by_popularity[0]],), filter=asked)])
    expected = [
        item
        for item in catalog.by_popularity.tolist()[1:]
        if "Drama" in catalog.genres[item] and catalog.popularity[item] >= asked.minimum_score
    ]
    assert answer.policy == POPULARITY
    assert answer.items.tolist() == expected
    assert 3 < len(expected) < 40
    (few,) = model.recommend([Query((), 2, filter=asked)])
    assert len(few.items) == 2


def item_ids(response: RecommendResponse) -> list[str]:
    return [one.item_id for one in response.recommendations]


def sent(model: Recommender, *items: int) -> list[SentEvent]:
    return [SentEvent(item_id=model.catalog.item_ids[item], timestamp=START + at) for at, item in enumerate(items)]


@pytest.fixture
def connect(store: EventStore) -> Iterator[Callable[..., RecommenderClient]]:
    """Starts a server of a model, and connects to it."""
    ending: list[Callable[[], None]] = []

    def started(model: Recommender, exploration: Exploration | None = None) -> RecommenderClient:
        server = create_server(one_model(model, store, exploration=exploration), store, "127.0.0.1:0")
        server.start()
        client = RecommenderClient(f"127.0.0.1:{server.port}", timeout_s=30)
        ending.extend((server.drain, client.close))
        return client

    yield started
    while ending:
        ending.pop()()


def test_request_options_reach_the_model(client: RecommenderClient, model: Recommender) -> None:
    history, ids = sent(model, 3, 8), model.catalog.item_ids
    everything = client.recommend(history=history, k=60)
    scores = {one.item_id: one.score for one in everything.recommendations}
    filters: list[tuple[dict[str, Any], ItemFilter]] = [
        ({"any_tags": ["Drama", "Horror"]}, ItemFilter(any_tags=("Drama", "Horror"))),
        ({"all_tags": ["Drama", "Horror"]}, ItemFilter(all_tags=("Drama", "Horror"))),
        ({"none_tags": ["Drama", "Horror"]}, ItemFilter(none_tags=("Drama", "Horror"))),
        ({"allow_item_ids": [*ids[1:9], "nobody knows it"]}, ItemFilter(items=np.arange(1, 9, dtype=np.int32))),
    ]
    for message, asked in filters:
        expected = [one for one in item_ids(everything) if one in allowed_ids(model, asked)]
        assert 2 < len(expected) < 58
        request = recommend_request(history=history, k=60, filter=SentFilter(**message))
        (batched,) = answered(client.batch_recommend([request]))
        for answer in (batched, client.recommend(history=history, k=60, filter=SentFilter(**message))):
            assert item_ids(answer) == expected
            assert [one.score for one in answer.recommendations] == pytest.approx(
                [scores[i] for i in expected], abs=1e-4
            )
    minimum = sorted(scores.values())[-5] - 1e-3
    few = client.recommend(history=history, k=60, filter=SentFilter(minimum_score=minimum))
    assert item_ids(few) == item_ids(everything)[:5]
    nothing = client.recommend(history=history, filter=SentFilter(allow_item_ids=["nobody knows it"]), explain=True)
    assert item_ids(nothing) == []
    assert item_ids(client.recommend(history=history, k=60, filter=SentFilter())) == item_ids(everything)
    assert ids[3] in item_ids(client.recommend(history=history, k=60, allow_seen=True))
    # Of a model without new items it changes nothing.
    assert item_ids(client.recommend(history=history, k=60, new_item_slots=30)) == item_ids(everything)


def test_similar_items_are_filtered_before_the_best_are_chosen(client: RecommenderClient, model: Recommender) -> None:
    ids = model.catalog.item_ids
    everything = client.similar_items(ids[7], 60).items
    drama = [one.item_id for one in everything if "Drama" in one.genres]
    found = client.similar_items(ids[7], 3, exclude_item_ids=drama[:1], filter=SentFilter(any_tags=["Drama"]))
    assert [one.item_id for one in found.items] == drama[1:4]
    least = everything[4].similarity
    found = client.similar_items(ids[7], 60, filter=SentFilter(minimum_score=least))
    assert [one.item_id for one in found.items] == [one.item_id for one in everything[:5]]
    found = client.similar_items(ids[7], 5, filter=SentFilter(allow_item_ids=[ids[7]]))
    assert not found.items


def test_model_info_has_the_limits_and_what_the_model_does_by_itself(
    connect: Callable[..., RecommenderClient], model: Recommender, free_model: Recommender
) -> None:
    info = connect(model).get_model_info()
    assert (info.limits.max_allowed_items, info.limits.max_tags) == (10_000, 100)
    assert (info.seen, info.new_item_count) == (Seen.SEEN_EXCLUDE, 0)
    info = connect(free_model).get_model_info()
    assert (info.seen, info.new_item_count) == (Seen.SEEN_ALLOW, 15)


def test_what_is_drawn_of_a_filtered_ranking_has_exact_propensities(
    connect: Callable[..., RecommenderClient], model: Recommender
) -> None:
    """Over the allowed items with at least the minimum score alone."""
    exploring, plain = connect(model, Exploration(TEMPERATURE)), connect(model)
    history, drama = sent(model, 3, 8, 9), SentFilter(any_tags=["Drama"])
    scores = [one.score for one in plain.recommend(history=history, k=60, filter=drama).recommendations]
    asked = SentFilter(any_tags=["Drama"], minimum_score=float(np.mean(scores)))
    of_item = {one.item_id: one.score for one in plain.recommend(history=history, k=60, filter=asked).recommendations}
    assert 3 < len(of_item) < len(scores)
    answer = exploring.recommend(history=history, k=3, filter=asked)
    left = sum(math.exp(score / TEMPERATURE) for score in of_item.values())
    for one in answer.recommendations:
        weight = math.exp(of_item[one.item_id] / TEMPERATURE)
        assert one.log_propensity == pytest.approx(math.log(weight / left), abs=1e-3)
        left -= weight
    nothing = exploring.recommend(history=history, filter=SentFilter(allow_item_ids=["nobody knows it"]))
    assert (item_ids(nothing), nothing.log_propensity) == ([], 0)


def test_answers_with_places_for_new_items_are_not_drawn(
    connect: Callable[..., RecommenderClient], free_model: Recommender
) -> None:
    exploring, plain = connect(free_model, Exploration(TEMPERATURE)), connect(free_model)
    history = sent(free_model, 3, 8, 9)
    expected = plain.recommend(history=history, k=5, new_item_slots=2)
    for _ in range(3):
        answer = exploring.recommend(history=history, k=5, new_item_slots=2)
        assert item_ids(answer) == item_ids(expected)
        assert answer.log_propensity == 0
        assert all(one.log_propensity == 0 for one in answer.recommendations)


def test_the_log_names_the_options_that_change_what_the_model_does(
    connect: Callable[..., RecommenderClient], free_model: Recommender, store: EventStore
) -> None:
    client, history = connect(free_model), sent(free_model, 3, 8)
    asked: list[dict[str, Any]] = [
        {},
        {"allow_seen": True, "filter": SentFilter()},  # as the model has it
        {"filter": SentFilter(minimum_score=0.0)},
        {"allow_seen": False},
        {"new_item_slots": 1, "filter": SentFilter(any_tags=["Drama"])},
    ]
    for options in asked:
        client.recommend(history=history, **options)
    store.flush()
    noted = [one.request_options for one in slates_of(store, None)]
    assert noted == [(), (), ("filter",), ("seen",), ("filter", "new_item_slots")]


def test_an_index_does_not_know_what_new_items_are_like(
    connect: Callable[..., RecommenderClient],
    free_hybrid: Hybrid,
    small_data: PreparedData,
    tmp_path: Path,
) -> None:
    out = tmp_path / "model"
    export_model(free_hybrid, small_data, out, training={}, metrics={}, licence="Synthetic.", index=True)
    model = Recommender(read_artifact(out), "cpu")
    client, history = connect(model), sent(model, 3)
    reason = f"new_item_slots: the model {model.info.model_version} was exported with an index"
    with pytest.raises(grpc.RpcError) as failure:
        client.recommend(history=history, new_item_slots=1)
    assert failure.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert failure.value.details().startswith(reason)
    requests = [recommend_request(history=history), recommend_request(history=history, new_item_slots=1)]
    (answer, error) = client.batch_recommend(requests)
    assert len(answer.recommendations) == 10
    assert error.code == grpc.StatusCode.FAILED_PRECONDITION.value[0]
    assert error.message.startswith(reason)
    assert len(client.recommend(history=history).recommendations) == 10
    assert client.get_model_info().new_item_count == 0


def test_the_same_tags_in_another_order_are_the_same_filter(free_model: Recommender) -> None:
    """So they share a mask."""
    one = RecommendRequest(user_id="7", filter=SentFilter(any_tags=["Drama", "Action"], none_tags=["Horror"]))
    other = RecommendRequest(
        user_id="7", filter=SentFilter(any_tags=["Action", "Drama", "Action"], none_tags=["Horror"])
    )
    first, second = (decode_filter(request, free_model, free_model.live) for request in (one, other))
    assert first == second == ItemFilter(any_tags=("Action", "Drama"), none_tags=("Horror",))
    assert free_model.filters.blocked(first) is free_model.filters.blocked(second)


def test_the_allow_lists_that_were_used_last_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as there is room for; one that is used again is new again."""
    monkeypatch.setattr("serve.model.live_catalog.MOST_FILTER_BYTES", 100)
    kept, lists = NewestFilters(), {name: ItemFilter() for name in (b"a", b"b", b"c", b"large")}
    for name in (b"a", b"b"):
        kept.put(name, lists[name], 50)
    assert kept.get(b"a") is lists[b"a"]
    kept.put(b"c", lists[b"c"], 40)
    kept.put(b"c", lists[b"c"], 40)
    assert [kept.get(name) for name in (b"a", b"b", b"c")] == [lists[b"a"], None, lists[b"c"]]
    kept.put(b"large", lists[b"large"], 101)
    assert kept.get(b"large") is None
    assert kept.size == 90


def test_the_longest_allow_list_is_kept(free_model: Recommender) -> None:
    ids = [f"unknown {at:03}" for at in range(MAX_ALLOWED_ITEMS - 1)]
    request = RecommendRequest(filter={"allow_item_ids": [free_model.catalog.item_ids[1], *ids]})
    found = decode_filter(request, free_model, free_model.live)
    assert found is not None
    assert decode_filter(request, free_model, free_model.live) is found


def test_as_many_places_as_a_request_may_ask_for(
    connect: Callable[..., RecommenderClient], free_model: Recommender
) -> None:
    """All 15 new items come, and all others."""
    answer = connect(free_model).recommend(history=sent(free_model, 3, 8), k=1000, new_item_slots=1000)
    assert len(answer.recommendations) == ITEMS
    answer = connect(free_model).recommend(history=sent(free_model, 3, 8), k=20, new_item_slots=20)
    new = {free_model.catalog.item_ids[item] for item in np.flatnonzero(NEW)}
    assert len(new & set(item_ids(answer))) == len(new) == 15
