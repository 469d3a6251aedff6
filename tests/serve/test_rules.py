"""Rules through a server: filters hold, pins are where they were asked for, propensities are exact or absent, and what
contradicts itself is refused."""

import math
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import grpc
import numpy as np
import pytest

from serve.api.rules import MAX_RULE_TAGS
from serve.client import (
    AppliedRule,
    Boost,
    Event,
    Item,
    ItemFilter,
    Pin,
    RecommenderClient,
    Rules,
    Status,
    UserEvent,
    recommend_request,
)
from serve.front.server import create_server
from serve.model import rules as model_rules
from serve.model.events import Event as ModelEvent
from serve.model.exploration import Exploration
from serve.model.filters import ItemFilter as FilterOfModel
from serve.model.recommender import Query, Recommender
from serve.model.rules import Rules as RulesOfModel
from serve.observability.metrics import Metrics
from serve.pb.recommender_pb2 import RecommendResponse
from serve.serving.catalogue import CatalogueRefresher
from serve.serving.loaded import LoadedModel
from serve.serving.reranker import Candidate, Reranker, RerankRequest
from serve.stores import open_store
from serve.stores.base import EventStore
from tests.serve.one_model import one_model
from tests.serve.stores.slates import slates_of

ITEMS, DAY, START = 60, 86_400, 1_000_000_000
TEMPERATURE = 0.5


def ids_of(answer: RecommendResponse) -> list[str]:
    return [one.item_id for one in answer.recommendations]


def history_of(model: Recommender, *items: int) -> list[Event]:
    return [
        Event(item_id=model.catalog.item_ids[item], rating=4.0, timestamp=START + at * DAY)
        for at, item in enumerate(items)
    ]


@contextmanager
def asking(model: Recommender, store: EventStore, **options: object) -> Iterator[RecommenderClient]:
    server = create_server(one_model(model, store, **options), store, "127.0.0.1:0")  # type: ignore[arg-type]
    server.start()
    try:
        with RecommenderClient(f"127.0.0.1:{server.port}", timeout_s=30) as client:
            yield client
    finally:
        server.drain()


@pytest.fixture
def few_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the small catalogue is larger than the candidates."""
    monkeypatch.setattr(model_rules, "CANDIDATES", 8)
    monkeypatch.setattr(model_rules, "CANDIDATES_OF_A_PLACE", 2)


def tag_pins_beside(pins: Sequence[Pin], k: int, tags: Sequence[str], rng: np.random.Generator) -> list[Pin]:
    """At most two pins of tags, at the first places that are free."""
    free = [position for position in range(1, k + 1) if position not in [pin.position for pin in pins]]
    chosen = [str(tag) for tag in rng.choice(tags, rng.integers(0, 3))]
    return [Pin(tag=tag, position=position) for tag, position in zip(chosen, free, strict=False)]


@pytest.mark.usefixtures("few_candidates")
def test_rules_never_break_what_the_request_says(client: RecommenderClient, model: Recommender) -> None:
    """For random rules, filters and exclusions, of histories, stored users and users without a history: nothing comes
    that may not, pins are where they were asked for, at most so many of a tag come, and as many as there can be."""
    ids, genres = model.catalog.item_ids, model.catalog.genres
    tags = model.filters.tags
    tags_of = {item_id: set(of_item) for item_id, of_item in zip(ids, genres, strict=True)}
    stored = [
        UserEvent(event_id=f"{item}", user_id="ada", item_id=ids[item], timestamp=START + item) for item in (3, 9, 27)
    ]
    client.record_events(stored)
    short = tag_pins_held = 0
    for seed in range(120):
        rng = np.random.default_rng(seed)
        k = int(rng.integers(1, 20))
        none_tags = [] if rng.random() < 0.6 else [str(rng.choice(tags))]
        excluded = rng.permutation(ids[1:])[:6].tolist()
        seen = {ids[item] for item in (3, 9, 27)} if seed % 3 else set()
        allowed = {
            item_id for item_id in ids[1:] if item_id not in excluded and not tags_of[item_id] & set(none_tags)
        } - (seen if seed % 3 else set())
        max_per_tag = int(rng.choice([0, 1, 2, 5]))
        pins = [
            Pin(item_id=item_id, position=int(position))
            for item_id, position in zip(
                rng.permutation(sorted(allowed))[: rng.integers(0, min(k, 3))],
                rng.permutation(np.arange(1, k + 1)),
                strict=False,
            )
        ]
        tag_pins = tag_pins_beside(pins, k, [tag for tag in tags if tag not in none_tags], rng)
        asked_for = Counter(tag for pin in pins for tag in tags_of[pin.item_id])
        asked_for.update(pin.tag for pin in tag_pins)
        if max_per_tag:
            max_per_tag = max([max_per_tag, *asked_for.values()])
        boosts = [
            Boost(tag=str(rng.choice(tags)), factor=float(rng.choice([0.1, 5, 100]))),
            Boost(item_id=str(rng.choice(ids[1:])), factor=50),
        ][: rng.integers(0, 3)]
        rules = Rules(
            boosts=boosts, diversity=float(rng.choice([0, 0.4, 1])), max_per_tag=max_per_tag, pins=[*pins, *tag_pins]
        )
        whom = [{"user_id": "nobody"}, {"user_id": "ada"}, {"history": history_of(model, 3, 9, 27)}][seed % 3]
        question = {"k": k, "rules": rules, "filter": ItemFilter(none_tags=none_tags), "exclude_item_ids": excluded}
        if seed % 2:
            answer = client.recommend(**whom, **question)  # type: ignore[arg-type]
        else:
            (answer,) = client.batch_recommend([recommend_request(**whom, **question)])  # type: ignore[arg-type]
        found = ids_of(answer)
        assert set(found) <= allowed
        assert len(set(found)) == len(found)
        if len(found) == k:
            assert all(found[pin.position - 1] == pin.item_id for pin in pins)
        assert {pin.item_id for pin in pins} <= set(found)
        if not max_per_tag and len(found) == k:
            assert all(pin.tag in tags_of[found[pin.position - 1]] for pin in tag_pins)
            tag_pins_held += len(tag_pins)
        counts = Counter(tag for item_id in found for tag in tags_of[item_id])
        if max_per_tag:
            assert max(counts.values(), default=0) <= max_per_tag
        if len(found) < min(k, len(allowed)):
            short += 1
            # No further item could be added.
            assert max_per_tag
            assert all(any(counts[tag] >= max_per_tag for tag in tags_of[item_id]) for item_id in allowed - set(found))
    assert short > 5
    assert tag_pins_held > 5


def test_no_rules_are_no_change(client: RecommenderClient, model: Recommender) -> None:
    """An absent message, an empty one, and rules that say nothing: the same answer to the bit."""
    history = history_of(model, 1, 2, 3)
    plain = client.recommend(history=history, k=20)
    for rules in (Rules(), Rules(diversity=0), Rules(boosts=[Boost(tag="Drama", factor=1)])):
        answer = client.recommend(history=history, k=20, rules=rules)
        assert list(answer.recommendations) == list(plain.recommendations)


def test_diversity_makes_answers_less_alike(client: RecommenderClient, model: Recommender) -> None:
    def likeness(answer: RecommendResponse) -> float:
        items = np.array([model.catalog.index[item_id] for item_id in ids_of(answer)], np.int32)
        directions = model.directions(items, model.live)
        return float((directions @ directions.T)[np.triu_indices(len(items), 1)].mean())

    found = []
    for diversity in (0.0, 0.3, 0.9):
        answers = [
            client.recommend(history=history_of(model, item, item + 1), k=10, rules=Rules(diversity=diversity))
            for item in range(1, 30)
        ]
        found.append(np.mean([likeness(answer) for answer in answers]))
        # The best item stays.
        assert all(
            answer.recommendations[0].item_id
            == client.recommend(history=history_of(model, item, item + 1), k=1).recommendations[0].item_id
            for item, answer in zip(range(1, 30), answers, strict=True)
        )
    assert found[0] > found[1] > found[2]
    assert any(AppliedRule.APPLIED_RULE_DIVERSITY in one.applied for one in answers[0].recommendations)


@pytest.mark.usefixtures("few_candidates")
def test_boosts_and_pins_reach_items_far_behind(client: RecommenderClient, model: Recommender) -> None:
    """The last item of the ranking is pinned, one with the tag of the last one is, and what is boosted comes."""
    history = history_of(model, 1, 2)
    whole = client.recommend(history=history, k=ITEMS)
    last = whole.recommendations[-1]
    rules = Rules(pins=[Pin(item_id=last.item_id, position=2)])
    answer = client.recommend(history=history, k=5, rules=rules, explain=True)
    assert ids_of(answer) == [ids_of(whole)[0], last.item_id, *ids_of(whole)[1:4]]
    assert list(answer.recommendations[1].applied) == [AppliedRule.APPLIED_RULE_PIN]
    assert not any(one.applied for at, one in enumerate(answer.recommendations) if at != 1)
    assert all(one.explanation.text for one in answer.recommendations)
    tag = "Horror"
    answer = client.recommend(history=history, k=5, rules=Rules(pins=[Pin(tag=tag, position=5)]))
    behind = [one for one in whole.recommendations[4:] if tag in one.genres]
    assert ids_of(answer)[4] == behind[0].item_id
    boosted = client.recommend(history=history, k=5, rules=Rules(boosts=[Boost(tag=tag, factor=100)]))
    scores = {one.item_id: one.score + (math.log(100) if tag in one.genres else 0.0) for one in whole.recommendations}
    assert ids_of(boosted) == sorted(scores, key=scores.__getitem__, reverse=True)[:5]
    for one in boosted.recommendations:
        assert one.score == pytest.approx(scores[one.item_id], rel=1e-4)
        assert (AppliedRule.APPLIED_RULE_BOOST in one.applied) == (tag in one.genres)
    # Users without a history: numbers of events are multiplied.
    popular = client.recommend(user_id="nobody", k=ITEMS)
    many = {one.item_id: one.score * (100 if tag in one.genres else 1) for one in popular.recommendations}
    boosted = client.recommend(user_id="nobody", k=3, rules=Rules(boosts=[Boost(tag=tag, factor=100)]))
    assert [one.score for one in boosted.recommendations] == pytest.approx(sorted(many.values(), reverse=True)[:3])


def test_propensities_are_exact_or_absent(model: Recommender, store: EventStore) -> None:
    """Boosts change what is drawn from; other rules are not drawn, and the log says so."""
    history = history_of(model, 1, 2, 3)
    boosts = [Boost(tag="Drama", factor=3), Boost(item_id=model.catalog.item_ids[9], factor=0.5)]
    with asking(model, store) as plain:
        scores = {
            one.item_id: one.score
            for one in plain.recommend(history=history, k=ITEMS, rules=Rules(boosts=boosts)).recommendations
        }
    with asking(model, store, exploration=Exploration(TEMPERATURE, seed=3)) as client:
        shown = set()
        for _ in range(20):
            answer = client.recommend(history=history, k=3, rules=Rules(boosts=boosts))
            left = {item_id: math.exp(score / TEMPERATURE) for item_id, score in scores.items()}
            for one in answer.recommendations:
                share = left[one.item_id] / sum(left.values())
                assert one.log_propensity == pytest.approx(math.log(share), rel=1e-3, abs=1e-3)
                del left[one.item_id]
            assert answer.log_propensity == pytest.approx(sum(one.log_propensity for one in answer.recommendations))
            shown.add(tuple(ids_of(answer)))
        assert len(shown) > 3
        for rules in (Rules(diversity=0.5), Rules(max_per_tag=3), Rules(pins=[Pin(tag="Drama", position=1)])):
            answers = [client.recommend(history=history, k=3, rules=rules) for _ in range(3)]
            assert all(answer.log_propensity == 0 for answer in answers)
            assert len({tuple(ids_of(answer)) for answer in answers}) == 1
        assert client.recommend(history=history, k=3).log_propensity < 0
    store.flush()
    noted = Counter(one.request_options for one in slates_of(store, None))
    assert noted == {("rules",): 1 + 20 + 9, (): 1}


DRAMA_FIRST = Pin(tag="Drama", position=1)
KNOWN_FIRST = Rules(pins=[Pin(item_id="1007", position=1)])
BAD: Sequence[tuple[Rules, dict[str, object], str]] = [
    (Rules(diversity=-0.1), {}, "rules.diversity: expected 0 to 1, came -0.1"),
    (Rules(diversity=math.nan), {}, "rules.diversity: expected 0 to 1, came nan"),
    (Rules(max_per_tag=-1), {}, "rules.max_per_tag: expected 1 to 1000"),
    (Rules(boosts=[Boost(factor=2)]), {}, "rules.boosts[0].subject: expected item_id or tag, came neither"),
    *(
        (Rules(boosts=[Boost(tag="Drama", factor=factor)]), {}, "rules.boosts[0].factor: expected 0.01 to 100")
        for factor in (0, math.nan, math.inf, -1, 0.009, 101)
    ),
    (Rules(boosts=[Boost(tag="none such", factor=2)]), {}, "rules.boosts[0].tag: expected one of the"),
    (
        Rules(boosts=[Boost(item_id="none such", factor=2)]),
        {},
        "rules.boosts[0].item_id: expected an item of the",
    ),
    (Rules(boosts=[Boost(item_id="", factor=2)]), {}, "rules.boosts[0].item_id: expected an id"),
    (Rules(boosts=[Boost(tag="Drama", factor=2)] * 101), {}, "rules.boosts: expected at most 100"),
    (Rules(pins=[Pin(position=1)]), {}, "rules.pins[0].subject: expected item_id or tag, came neither"),
    (Rules(pins=[Pin(tag="Drama")]), {}, "rules.pins[0].position: expected 1 to k, which is 3, came 0"),
    (Rules(pins=[Pin(tag="Drama", position=4)]), {}, "rules.pins[0].position: expected 1 to k, which is 3, came 4"),
    (Rules(pins=[DRAMA_FIRST] * 4), {}, "rules.pins: expected at most 3"),
    (Rules(pins=[DRAMA_FIRST] * 2), {}, "rules.pins[1].position: expected each position once, came 1"),
    (Rules(pins=[Pin(item_id="none such", position=1)]), {}, "rules.pins[0].item_id: expected an item of the model"),
    (
        Rules(pins=[Pin(item_id="1007", position=at) for at in (1, 2)]),
        {},
        "rules.pins[1].item_id: expected each item once",
    ),
    (
        KNOWN_FIRST,
        {"exclude_item_ids": ["1007"]},
        "rules.pins[0].item_id: expected an item that may be answered, came one of exclude_item_ids",
    ),
    (
        KNOWN_FIRST,
        {"filter": ItemFilter(allow_item_ids=["1014"])},
        "rules.pins[0].item_id: expected an item that may be answered, came one that filter leaves out",
    ),
    (
        Rules(pins=[DRAMA_FIRST]),
        {"filter": ItemFilter(none_tags=["Drama"])},
        "rules.pins[0].tag: expected no tag of filter.none_tags, came 'Drama'",
    ),
    (
        Rules(max_per_tag=1, pins=[Pin(tag="Drama", position=at) for at in (1, 2)]),
        {},
        "rules.pins: expected at most max_per_tag, 1, of a tag, came 2 of 'Drama'",
    ),
    (Rules(diversity=0.5), {"new_item_slots": 1}, "new_item_slots: expected 0 with rules, came 1"),
]


@pytest.mark.parametrize(("rules", "options", "message"), BAD)
def test_contradictions_are_refused_with_their_field(
    client: RecommenderClient, rules: Rules, options: dict[str, object], message: str
) -> None:
    with pytest.raises(grpc.RpcError) as failure:
        client.recommend(user_id="ada", k=3, rules=rules, **options)  # type: ignore[arg-type]
    assert failure.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert failure.value.details().startswith(message)
    (entry,) = client.batch_recommend([recommend_request(user_id="ada", k=3, rules=rules, **options)])  # type: ignore[arg-type]
    assert isinstance(entry, Status)
    assert entry.message.startswith(message)


def test_pins_of_hidden_items_and_many_tags_are_refused(model: Recommender, tmp_path: Path) -> None:
    with open_store(tmp_path / "own.sqlite") as store:
        refresher = CatalogueRefresher(store, 3_600.0)
        fresh = Recommender.__new__(Recommender)
        fresh.__dict__.update(model.__dict__)
        refresher.prepare(fresh)
        with asking(fresh, store) as client:
            hidden, tagged = fresh.catalog.item_ids[1], fresh.catalog.item_ids[2]
            names = [f"tag {at}" for at in range(MAX_RULE_TAGS + 1)]
            client.upsert_items([Item(item_id=hidden, hidden=True), Item(item_id=tagged, tags=names)])
            refresher.refresh()
            pinned = Rules(pins=[Pin(item_id=hidden, position=1)])
            many = Rules(boosts=[Boost(tag=tag, factor=2) for tag in names])
            for rules, message in (
                (pinned, "rules.pins[0].item_id: expected an item that may be answered, came one that is hidden"),
                (many, "rules: expected at most 10 different tags in boosts and pins, came 11"),
            ):
                with pytest.raises(grpc.RpcError) as failure:
                    client.recommend(user_id="ada", k=3, rules=rules)
                assert failure.value.details().startswith(message)
            # Whether it may be answered then is not known.
            with pytest.raises(grpc.RpcError) as failure:
                client.recommend(user_id="ada", k=3, rules=pinned, request_time=-1)
            assert failure.value.details().startswith("request_time: ")
            assert "rules.pins" not in failure.value.details()
            few = Rules(boosts=many.boosts[:MAX_RULE_TAGS], diversity=1.0)
            assert hidden not in ids_of(client.recommend(user_id="ada", k=ITEMS, rules=few))


def test_a_batch_has_no_more_ruled_items_than_one_answer(client: RecommenderClient) -> None:
    ruled = recommend_request(user_id="ada", k=500, rules=Rules(diversity=0.5))
    plain = recommend_request(user_id="ada", k=500)
    assert len(client.batch_recommend([ruled, ruled, plain])) == 3
    with pytest.raises(grpc.RpcError) as failure:
        client.batch_recommend([ruled, ruled, recommend_request(user_id="ada", rules=Rules(diversity=0.5))])
    assert failure.value.details() == (
        "requests: expected at most 1000 items (k), or rankings, with rules in all, came 1010"
    )


def backwards(request: RerankRequest, candidates: Sequence[Candidate]) -> Sequence[str]:
    return [one.item_id for one in reversed(candidates)]


def counted(metrics: Metrics, result: str) -> float:
    return metrics.registry.get_sample_value("jaxrec_reranker_calls_total", {"result": result}) or 0.0


@pytest.mark.usefixtures("few_candidates")
def test_an_own_re_ranker_orders_the_candidates(model: Recommender, store: EventStore) -> None:
    metrics, history = Metrics(), history_of(model, 1, 2)
    asked_for: list[tuple[RerankRequest, Sequence[Candidate]]] = []

    def noting(request: RerankRequest, candidates: Sequence[Candidate]) -> Sequence[str]:
        asked_for.append((request, candidates))
        return backwards(request, candidates)

    with asking(model, store) as client:
        whole = client.recommend(history=history, k=8)
    reranker = Reranker(noting, 30.0, metrics.reranked)
    with asking(model, store, reranker=reranker, exploration=Exploration(TEMPERATURE)) as client:
        answer = client.recommend(history=history, k=3)
        assert ids_of(answer) == ids_of(whole)[:4:-1]
        assert all(list(one.applied) == [AppliedRule.APPLIED_RULE_RERANKER] for one in answer.recommendations)
        assert answer.log_propensity == 0
        ((request, candidates),) = asked_for
        assert (request.user_id, request.k, len(request.history)) == (None, 3, 2)
        first = whole.recommendations[0]
        assert candidates[0] == Candidate(first.item_id, first.score, first.title, tuple(first.genres), {})
        # Rules come after it.
        pinned = client.recommend(history=history, k=3, rules=Rules(pins=[Pin(item_id=ids_of(whole)[0], position=1)]))
        assert ids_of(pinned) == [ids_of(whole)[0], *ids_of(whole)[:5:-1]]
        batch = client.batch_recommend([recommend_request(history=history, k=3)] * 2)
        assert [ids_of(one) for one in batch] == [ids_of(answer)] * 2
    assert counted(metrics, "ok") == 4
    store.flush()
    assert [one.request_options for one in slates_of(store, None)][-1] == ("reranker",)


class Interrupt(BaseException):
    """None of the exceptions that programs usually catch."""


def test_a_re_ranker_that_fails_changes_nothing(model: Recommender, store: EventStore) -> None:
    """Whatever it raises, also what would end a program, and whatever it returns."""
    metrics, history = Metrics(), history_of(model, 1, 2)
    raised = {
        1: RuntimeError("bad"),
        4: SystemExit(1),
        5: TimeoutError("its own"),
        6: Interrupt(),
        7: KeyboardInterrupt(),
    }

    def bad(request: RerankRequest, candidates: Sequence[Candidate]) -> Sequence[str]:
        if request.k in raised:
            raise raised[request.k]
        return ["none such"] if request.k == 2 else [candidates[0].item_id] * 2

    with asking(model, store) as client:
        expected = ids_of(client.recommend(history=history, k=7))
    with asking(model, store, reranker=Reranker(bad, 30.0, metrics.reranked)) as client:
        for k in range(1, 8):
            answer = client.recommend(history=history, k=k)
            assert ids_of(answer) == expected[:k]
            assert not any(one.applied for one in answer.recommendations)
    assert counted(metrics, "failed") == 7
    assert not counted(metrics, "ok") + counted(metrics, "late") + counted(metrics, "busy")


def test_a_re_ranker_that_is_late_changes_nothing(model: Recommender, store: EventStore) -> None:
    metrics, history, released = Metrics(), history_of(model, 1, 2), threading.Event()

    def blocked(request: RerankRequest, candidates: Sequence[Candidate]) -> Sequence[str]:
        released.wait()
        return backwards(request, candidates)

    with asking(model, store) as client:
        expected = ids_of(client.recommend(history=history, k=4))
    with asking(model, store, reranker=Reranker(blocked, 0.05, metrics.reranked)) as client:
        try:
            for _ in range(6):
                assert ids_of(client.recommend(history=history, k=4)) == expected
        finally:
            released.set()
    # Each late call holds one of four threads.
    assert (counted(metrics, "late"), counted(metrics, "busy")) == (4, 2)


def test_a_catalogue_that_contradicts_itself_ends_no_call(model: Recommender, store: EventStore) -> None:
    """Tags that no filter knows: what `max_per_tag` asks to leave out comes again, and the answer is short."""
    catalog = model.own_catalog
    tagged = replace(catalog, genres=tuple(("everywhere",) for _ in catalog.genres))
    query = Query(
        events=[ModelEvent(catalog.item_ids[1], None, START)],
        k=3,
        rules=RulesOfModel(max_per_tag=1),
        live=replace(model.own_live, catalog=tagged),
        filter=FilterOfModel(),
    )
    loaded = LoadedModel(model, store, Metrics())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_rules, "CANDIDATES", 8)
        patch.setattr(model_rules, "CANDIDATES_OF_A_PLACE", 2)
        answer = loaded.recommend(query, deadline_s=60.0)
    assert len(answer.items) == 1


@pytest.mark.usefixtures("few_candidates")
def test_a_batch_with_rules_is_ranked_at_once(model: Recommender, store: EventStore) -> None:
    """All rankings of a batch share runs of the model, and each answer is that of the request alone."""
    metrics, ids = Metrics(), model.catalog.item_ids
    requests = [
        recommend_request(
            history=history_of(model, at, at + 1),
            k=5,
            rules=Rules(pins=[Pin(item_id=ids[40], position=1), Pin(tag="Drama", position=2 + at % 3)], diversity=0.2),
        )
        for at in range(1, 17)
    ]
    server = create_server(one_model(model, store, metrics), store, "127.0.0.1:0", metrics=metrics)
    server.start()
    with RecommenderClient(f"127.0.0.1:{server.port}", timeout_s=60) as client:
        answers = client.batch_recommend(requests)
        runs = metrics.registry.get_sample_value("jaxrec_batch_size_count")
        rows = metrics.registry.get_sample_value("jaxrec_batch_size_sum")
        singly = [client.batch_recommend([one])[0] for one in requests]
    server.drain()
    # Of all items, of the pinned item and of the tag: sixteen at a time.
    assert (runs, rows) == (3, 48)
    assert [ids_of(one) for one in answers] == [ids_of(one) for one in singly]


def test_a_batch_is_bounded_by_its_rankings_and_re_ranked_requests(model: Recommender, store: EventStore) -> None:
    tags = model.filters.tags[:5]
    many = recommend_request(user_id="ada", k=1, rules=Rules(boosts=[Boost(tag=tag, factor=2) for tag in tags]))
    plain = recommend_request(user_id="ada", k=500)
    with asking(model, store) as client:
        assert len(client.batch_recommend([many] * 166)) == 166
        assert len(client.batch_recommend([plain] * 3)) == 3
        with pytest.raises(grpc.RpcError) as failure:
            client.batch_recommend([many] * 167)
        assert failure.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        expected = "requests: expected at most 1000 items (k), or rankings, with rules in all, came"
        assert failure.value.details() == f"{expected} 1002"
    with asking(model, store, reranker=Reranker(backwards, 30.0)) as client:
        assert len(client.batch_recommend([plain] * 2)) == 2
        with pytest.raises(grpc.RpcError) as failure:
            client.batch_recommend([plain] * 3)
        assert failure.value.details() == f"{expected} 1500"
