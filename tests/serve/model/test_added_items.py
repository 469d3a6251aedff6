"""Added items in a ranking: by their scores, and as the graphs rank the new items that they know."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrec.data.prepared import PreparedData
from jaxrec.models.hybrid import Hybrid
from jaxrec.models.new_items import capped_logits
from jaxrec.onnx.model_directory import export_model
from jaxrec.training.new_items import shift_logits, without_events_of
from serve.model.added_items import with_added
from serve.model.directory import read_artifact
from serve.model.events import Event
from serve.model.filters import ItemFilter
from serve.model.live_catalog import Item, Overlay
from serve.model.ranking.engine import Ranking
from serve.model.recommender import Query, Recommender
from serve.model.trend import HALF_LIVES_S
from tests.conftest import heads

ITEMS, START, DAY = 60, 1_000_000_000, 86_400
NEW = np.arange(ITEMS + 1) % 10 == 1
"""Items that the model was not trained on, with rows of the content heads."""


def ranking(scores: list[float]) -> Ranking:
    return Ranking(np.arange(1, len(scores) + 1, dtype=np.int32), np.array(scores, np.float32))


def test_a_new_item_stays_below_the_first_ten_others() -> None:
    known, new = ranking([float(score) for score in range(12, 0, -1)]), np.arange(15) > 12
    found = with_added(known, np.array([13, 14], np.int32), np.array([20.0, 2.5], np.float32), new, 20)
    # The example of `capped_logits`: the tenth of the known has 3.
    assert found.items.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 13, 14, 11, 12]
    np.testing.assert_allclose(found.scores[10:12], [2.9989, 2.5], atol=1e-4)
    no_more_new = with_added(known, np.array([13, 14], np.int32), np.array([20.0, 2.5], np.float32), new & False, 3)
    assert (no_more_new.items.tolist(), no_more_new.scores.tolist()) == ([13, 1, 2], [20, 12, 11])


def test_where_no_other_may_be_answered_new_items_keep_their_scores() -> None:
    found = with_added(ranking([]), np.array([1, 2], np.int32), np.array([3.0, 5.0], np.float32), np.ones(3, bool), 5)
    assert (found.items.tolist(), found.scores.tolist()) == ([2, 1], [5, 3])


@settings(deadline=None)
@given(st.data())
def test_as_if_the_graph_had_ranked_all(data: st.DataObject) -> None:
    count = data.draw(st.integers(2, 30))
    finite = st.floats(-20, 20, width=32)
    logits = np.array([0, *data.draw(st.lists(finite, min_size=count, max_size=count, unique=True))], np.float32)
    own = data.draw(st.integers(1, count - 1))
    new = np.array([False, *data.draw(st.lists(st.booleans(), min_size=count, max_size=count))])
    new[1 : own + 1] = False
    expected = np.array(capped_logits(logits[None], new))[0, 1:]
    order = np.argsort(-logits[1 : own + 1], kind="stable")
    known = Ranking((order + 1).astype(np.int32), logits[order + 1])
    added = np.arange(own + 1, count + 1, dtype=np.int32)
    found = with_added(known, added, logits[own + 1 :], new, count)
    scores = np.full(count, np.nan, np.float32)
    scores[found.items - 1] = found.scores
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    assert (np.diff(found.scores) <= 0).all()


@pytest.fixture(scope="module", params=["supervised", "reranked", "indexed"])
def twins(
    request: pytest.FixtureRequest,
    small_data: PreparedData,
    random_hybrid: Callable[[PreparedData, int, bool], Hybrid],
    with_random_reranker: Callable[[Hybrid, PreparedData], Hybrid],
    tmp_path_factory: pytest.TempPathFactory,
) -> Recommender:
    """A model with new items, and a catalogue in which each of these has a twin that is added."""
    base = random_hybrid(small_data, 5, False)
    given = heads(base, small_data)
    rows = [np.asarray(head.rows(given.features.matrix)) for head in (given.lstm, given.content)]
    base = without_events_of(base, NEW, rows)
    shift_logits(base, NEW, given.shift)
    parts = base.lstm, base.content, base.cooccurrence, base.mix_weights(), base.trend
    hybrid = Hybrid(*parts, new_items=None if request.param == "indexed" else NEW)
    if request.param == "reranked":
        hybrid = with_random_reranker(hybrid, small_data)
    out: Path = tmp_path_factory.mktemp("twins") / "model"
    options = {"training": {}, "metrics": {}, "licence": "None.", "heads": given, "index": request.param == "indexed"}
    export_model(hybrid, small_data, out, **options)  # type: ignore[arg-type]
    model = Recommender(read_artifact(out), "cpu")
    overlay = Overlay(model.own_live, model.item_rows)
    own = model.own_catalog
    overlay.apply(
        (f"twin {at}", Item(f"twin {at}", own.titles[at], own.genres[at])) for at in np.flatnonzero(NEW).tolist()
    )
    model.live = overlay.live()
    return model


def without_trend(model: Recommender) -> None:
    model.engine.use_counts(np.zeros((len(HALF_LIVES_S), ITEMS + 1), np.float32))


def twin_of(model: Recommender, item: int) -> int:
    return model.live.catalog.index[f"twin {item}"]


@pytest.mark.parametrize("slots", [0, 7])
def test_a_twin_ranks_as_the_new_item_that_the_model_knows(twins: Recommender, slots: int) -> None:
    model = twins
    without_trend(model)
    ids = model.own_catalog.item_ids
    history = [Event(ids[item], 4.0, START + at * DAY) for at, item in enumerate((4, 17, 29, 35))]
    query = Query(history, ITEMS + 20, live=model.live, new_item_slots=model.new_item_slots(slots, model.live))
    (answer,) = model.recommend([query])
    score = dict(zip(answer.items.tolist(), answer.scores.tolist(), strict=True))
    assert len(score) == ITEMS - len(history) + int(NEW.sum())
    if model.engine.search_by == "index":
        # To an index no item is new, and the twins are below its first ten.
        assert not any(item > ITEMS for item in answer.items[: 0 if slots else 10].tolist())
        return
    for item in np.flatnonzero(NEW).tolist():
        assert score[twin_of(model, item)] == pytest.approx(score[item], abs=2e-5)
    few, _ = model.recommend([query._replace(k=3), query._replace(k=12)])
    if not slots:
        assert few.items.tolist() == [item for item in answer.items.tolist() if item <= ITEMS and not NEW[item]][:3]


def _known(model: Recommender, history: list[Event]):  # type: ignore[no-untyped-def]
    from serve.model.events import known_events

    return known_events(history, model.own_catalog)


def test_events_in_the_trend_lift_the_cap(twins: Recommender) -> None:
    model = twins
    ids = model.own_catalog.item_ids
    query = Query([Event(ids[4], 4.0, START)], ITEMS + 20, live=model.live)
    counts = np.zeros((len(HALF_LIVES_S), ITEMS + 1), np.float32)
    of_added = np.zeros((len(HALF_LIVES_S), int(NEW.sum())), np.float32)
    added = model.live.added_ids
    model.engine.use_counts(counts, None, added, of_added)
    (before,) = model.recommend([query])
    own_before = dict(zip(before.items.tolist(), before.scores.tolist(), strict=True))
    of_added[:, 0] = 50.0
    model.engine.use_counts(counts, None, added, of_added)
    (after,) = model.recommend([query])
    first = ITEMS + 1
    scores = dict(zip(after.items.tolist(), after.scores.tolist(), strict=True))
    assert list(model.engine.trend.added) == [added[0]]
    # The others have the scores that they had: their trend is computed without the added items' counts.
    for item in set(own_before) - {first, *range(ITEMS + 1, ITEMS + 20)}:
        if not NEW[item]:
            assert scores[item] == pytest.approx(own_before[item], abs=1e-6)
    rows = [model._features(query, _known(model, list(query.events)), (), None)]
    (found,) = model.engine.rank(rows, 1, queries=True)
    assert found.query is not None
    assert model.live.added is not None
    of_trend = model.engine.trend.added[added[0]]
    expected = model.live.added.vectors[0] @ found.query + model.live.added.bias[0] + of_trend
    assert scores[first] == pytest.approx(float(expected), abs=1e-4)  # no cap


def test_as_many_events_are_the_same_trend(twins: Recommender) -> None:
    """Of an item of the model and of added ones, however many events these have, and more than all of the model."""
    model = twins
    counts = np.zeros((len(HALF_LIVES_S), ITEMS + 1), np.float32)
    counts[:, 5], counts[:, 6] = 30.0, 7.0
    for many in (0.0, 10_000.0):
        of_added = np.full((len(HALF_LIVES_S), int(NEW.sum())), many, np.float32)
        of_added[:, 2], of_added[:, 3] = 7.0, 0.0
        model.engine.use_counts(counts, None, model.live.added_ids, of_added)
        trend = model.engine.trend
        assert trend.added[model.live.added_ids[2]] == pytest.approx(float(trend.values[6]), rel=1e-5)
        assert model.live.added_ids[3] not in trend.added


def test_similar_items_of_and_with_added_ones(twins: Recommender) -> None:
    model = twins
    item = int(np.flatnonzero(NEW)[2])
    twin, live = f"twin {item}", model.live
    of_twin = model.similar(twin, ITEMS + 20, live)
    assert len(of_twin.items) == ITEMS + int(NEW.sum()) - 1
    assert twin_of(model, item) not in of_twin.items
    if model.engine.search_by == "index":
        return
    assert of_twin.scores[of_twin.items == item] == pytest.approx(1, abs=1e-5)
    of_item = model.similar(model.own_catalog.item_ids[item], 3, live)
    assert of_item.items[0] == twin_of(model, item)


def test_an_explanation_names_the_events_that_speak_for_an_added_item(twins: Recommender) -> None:
    model = twins
    without_trend(model)
    ids = model.own_catalog.item_ids
    history = [Event(ids[item], 4.0, START + at * DAY) for at, item in enumerate((4, 17, 29))]
    query = Query(history, ITEMS + 20, live=model.live, explain=True)
    (answer,) = model.recommend([query])
    explanations = dict(zip(answer.items.tolist(), answer.explanations, strict=True))
    (whole, *without) = (
        model.engine.rank([model._features(query, _known(model, part), (), None)], 1, queries=True)[0].query
        for part in (history, history[1:], [history[0], history[2]], history[:2])
    )
    assert model.live.added is not None
    assert whole is not None
    for at, vector in enumerate(model.live.added.vectors):
        found = {one.event.item: one.influence for one in explanations[ITEMS + 1 + at].events}
        lower = {item: float(vector @ (whole - part)) for item, part in zip((4, 17, 29), without, strict=True)}
        assert found == pytest.approx({item: by for item, by in lower.items() if by > 0}, abs=1e-4)


@pytest.mark.parametrize("slots", [0, 2])
def test_explanations_where_none_or_few_of_the_models_own_are_allowed(twins: Recommender, slots: int) -> None:
    model = twins
    added, ids = model.live.added_ids, model.own_catalog.item_ids
    history = [Event(ids[item], 4.0, START + at * DAY) for at, item in enumerate((4, 17, 29))]
    only_added = ItemFilter(items=np.array([model.live.catalog.index[one] for one in added], np.int32))
    for item_filter in (only_added, None):
        query = Query(history, 4, live=model.live, explain=True, filter=item_filter, new_item_slots=slots)
        (answer,) = model.recommend([query])
        assert len(answer.explanations) == 4
        assert item_filter is None or (answer.items > ITEMS).all()
