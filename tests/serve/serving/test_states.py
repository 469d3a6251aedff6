"""A stored user is answered as if the whole history were sent along, whatever happened before."""

import dataclasses
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serve.model.directory import Artifact
from serve.model.events import Event
from serve.model.filters import ItemFilter
from serve.model.live_catalog import Item, Overlay
from serve.model.popular import POPULARITY
from serve.model.recommender import Answer, Query, Recommender
from serve.serving import states as states_module
from serve.serving.states import StateCache
from serve.stores import open_store
from serve.stores.base import MOST_EVENTS, Changes, EventStore, SpilledState, UserEvent
from serve.stores.sqlite.store import SQLiteStore
from tests.serve.answers import assert_same

PATIENCE_S = 30.0

USERS = ("ada", "bob", "cy")
UNKNOWN = "no such movie"


@pytest.fixture(scope="module", params=[50, 6], ids=["whole", "window"])
def windowed(request: pytest.FixtureRequest, artifact: Artifact) -> Recommender:
    """A model that reads whole histories, and one that soon forgets their beginning."""
    info = dataclasses.replace(artifact.info, max_history=request.param)
    return Recommender(dataclasses.replace(artifact, info=info), "cpu")


def replayed(model: Recommender, store: EventStore, query: Query) -> Answer:
    """The answer to the same history sent along."""
    assert query.user_id is not None
    events = store.history(query.user_id, query.request_time)
    (answer,) = model.recommend([query._replace(events=events, user_id=None)])
    return answer


def checked(states: StateCache, model: Recommender, store: EventStore, queries: Sequence[Query]) -> None:
    expected = [replayed(model, store, query) for query in queries]
    for answer, of_query in zip(states.recommend(queries), expected, strict=True):
        assert_same(answer, of_query)
    # Not all can be answered so.
    for answer, of_query in zip(states.recommend_at_once(queries) or expected, expected, strict=True):
        assert_same(answer, of_query)


users = st.sampled_from(USERS)
times = st.integers(0, 40).map(lambda day: 1_000_000_000 + 86_400 * day)
ratings = st.one_of(st.none(), st.sampled_from([0.5, 3.0, 5.0]))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_interleaving_equals_a_replay(windowed: Recommender, tmp_path: Path, data: st.DataObject) -> None:
    ids = [*windowed.catalog.item_ids[1:], UNKNOWN, UNKNOWN, "added", "known to nobody"]
    overlay = Overlay(windowed.own_live, windowed.item_rows)
    overlay.apply((item_id, Item(item_id, tags=("Drama",), hidden=True)) for item_id in ids[::3])
    overlay.apply((item_id, Item(item_id, tags=("Drama", "Jazz"))) for item_id in (UNKNOWN, "added"))
    live = overlay.live()
    weights = st.sampled_from([1.0, 1.0, 1.0, 2.5, -1.0, -0.5, 0.0])
    events = st.builds(Event, st.sampled_from(ids), ratings, times, weights)
    queries = st.builds(
        Query,
        st.just(()),
        k=st.integers(1, 70),
        exclude_item_ids=st.lists(st.sampled_from(ids), max_size=3),
        request_time=st.one_of(st.none(), times),
        user_id=users,
        filter=st.sampled_from([None, ItemFilter(any_tags=("Drama",))]),
        allow_seen=st.sampled_from([None, True, False]),
        new_item_slots=st.just(0),
        withheld=st.sampled_from([None, live.withheld(0)]),
        live=st.just(live),
    )
    number = 0
    with open_store(tmp_path / f"{data.draw(st.uuids())}.sqlite") as store:
        states = StateCache(windowed, store, capacity=2)
        for _ in range(data.draw(st.integers(1, 12), "steps")):
            action = data.draw(st.sampled_from(["record", "record", "ask", "ask", "delete", "restart"]), "action")
            if action == "record":
                new = data.draw(st.lists(st.tuples(users, events), min_size=1, max_size=10))
                # Now and then an event comes twice.
                first = number - data.draw(st.integers(0, 1))
                store.record([UserEvent(f"e{first + at}", user, event) for at, (user, event) in enumerate(new)])
                number = first + len(new)
            elif action == "ask":
                checked(states, windowed, store, data.draw(st.lists(queries, min_size=1, max_size=4)))
            elif action == "delete":
                user = data.draw(users)
                store.delete_user(user)
                # Another process would not tell us.
                if data.draw(st.booleans(), "notified"):
                    states.forget(user)
            else:
                states.spill()
                store.flush()
                states = StateCache(windowed, store, capacity=2)
        checked(states, windowed, store, [Query((), 10, user_id=user) for user in USERS])


def history(model: Recommender, count: int, first: int = 1) -> list[Event]:
    """An event a day on one item after the other."""
    return [Event(model.catalog.item_ids[first + at], 4.0, 1_000_000_000 + 86_400 * at) for at in range(count)]


def record(store: EventStore, user: str, events: Sequence[Event], name: str = "") -> None:
    store.record([UserEvent(f"{user} {name}{at}", user, event) for at, event in enumerate(events)])


class CountedRuns:
    """Counts the rows that each graph of a model runs, through the real engine."""

    def __init__(self, model: Recommender, monkeypatch: pytest.MonkeyPatch) -> None:
        self.replayed = self.stepped = 0
        replay, step = model.engine.replay, model.engine.step

        def counted_replay(rows, k=1, *trend, **options):  # type: ignore[no-untyped-def]
            self.replayed += len(rows)
            return replay(rows, k, *trend, **options)

        def counted_step(rows, k, *trend, **options):  # type: ignore[no-untyped-def]
            self.stepped += len(rows)
            return step(rows, k, *trend, **options)

        monkeypatch.setattr(model.engine, "replay", counted_replay)
        monkeypatch.setattr(model.engine, "step", counted_step)


def test_an_answer_costs_one_step(model: Recommender, store: EventStore, monkeypatch: pytest.MonkeyPatch) -> None:
    states = StateCache(model, store)
    record(store, "ada", history(model, 20))
    query = Query((), 5, user_id="ada")
    states.recommend([query])
    runs = CountedRuns(model, monkeypatch)
    states.recommend([query])
    assert (runs.replayed, runs.stepped) == (0, 1)
    record(store, "ada", [Event(model.catalog.item_ids[30], None, 1_100_000_000)], "later")
    states.recommend([query])
    assert (runs.replayed, runs.stepped) == (0, 2)


def test_a_spilled_state_comes_back_without_a_replay(
    model: Recommender, store: EventStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = StateCache(model, store, capacity=1)
    for user in USERS:
        record(store, user, history(model, 20))
        states.recommend([Query((), 5, user_id=user)])
    assert len(states) == 1
    store.flush()
    runs = CountedRuns(model, monkeypatch)
    states.recommend([Query((), 5, user_id=USERS[0])])
    assert (runs.replayed, runs.stepped) == (0, 1)


def test_an_event_of_a_user_with_thousands_costs_no_reading_of_them(
    artifact: Artifact, store: EventStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = dataclasses.replace(artifact.info, max_history=6)
    model = Recommender(dataclasses.replace(artifact, info=info), "cpu")
    states, query, read = StateCache(model, store), Query((), 10, user_id="ada"), []
    changes = store.changes

    def watched(user_id: str, since: int = 0, most: int = MOST_EVENTS) -> Changes:
        found = changes(user_id, since, most)
        read.append(len(found.events))
        return found

    record(store, "ada", [Event(UNKNOWN, None, 5), *history(model, 40)])
    states.recommend([query])
    monkeypatch.setattr(store, "changes", watched)
    late = Event(model.catalog.item_ids[55], None, 7)
    for name, new in (("late", late), ("unknown", Event(UNKNOWN, None, 8)), ("last", late._replace(timestamp=2**33))):
        record(store, "ada", [new], name)
        checked(states, model, store, [query])
    assert max(read) <= 2 * 6
    # Of very many items the oldest may be recommended again.
    monkeypatch.setattr(states_module, "MOST_EXCLUDED", 30)
    record(store, "ada", [late._replace(timestamp=2**34)], "once more")
    checked(states, model, store, [query])
    assert max(read) == 45


@pytest.mark.parametrize("what", ["item", "excluded item", "number"])
def test_a_spilled_state_that_no_model_can_use_is_rebuilt(model: Recommender, store: EventStore, what: str) -> None:
    """As one of another model that had the same version and more items."""
    record(store, "ada", history(model, 20))
    states = StateCache(model, store)
    states.recommend([Query((), 5, user_id="ada")])
    states.spill()
    store.flush()
    spilled = store.load_state("ada", model.info.model_version)
    assert spilled is not None
    content, beyond = bytearray(spilled.state), (len(model.catalog) + 1).to_bytes(4, "little")
    if what == "item":
        content[48:52] = beyond
    elif what == "excluded item":
        content[-4:] = beyond
    else:
        content[60:64] = np.float32(np.nan).tobytes()
    store.save_states([spilled._replace(state=bytes(content))])
    store.flush()
    checked(StateCache(model, store), model, store, [Query((), 5, user_id="ada")])


def test_the_state_of_another_model_version_is_not_used(artifact: Artifact, store: EventStore) -> None:
    info = dataclasses.replace(artifact.info, model_version="another")
    old, new = Recommender(dataclasses.replace(artifact, info=info), "cpu"), Recommender(artifact, "cpu")
    record(store, "ada", history(old, 5))
    states = StateCache(old, store)
    states.recommend([Query((), 5, user_id="ada")])
    states.spill()
    store.flush()
    assert store.load_state("ada", "another") is not None
    assert store.load_state("ada", new.info.model_version) is None
    checked(StateCache(new, store), new, store, [Query((), 5, user_id="ada")])


def test_a_deleted_user_is_forgotten_without_notice(model: Recommender, store: EventStore) -> None:
    states = StateCache(model, store)
    record(store, "ada", history(model, 5))
    states.recommend([Query((), 5, user_id="ada")])
    store.delete_user("ada")
    (answer,) = states.recommend([Query((), 5, user_id="ada")])
    assert answer.policy == POPULARITY
    record(store, "ada", history(model, 2, first=30), "again")
    checked(states, model, store, [Query((), 5, user_id="ada")])


def test_stored_users_cost_nothing_until_they_come(model: Recommender, store: EventStore) -> None:
    record(store, "ada", history(model, 5))
    states = StateCache(model, store)
    for number in range(200):
        record(store, f"user {number}", history(model, 1))
    assert len(states) == 0
    states.recommend([Query((), 5, user_id="ada")])
    assert len(states) == 1


class SlowStore(SQLiteStore):
    """Whose reads of some users wait."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.slow: set[str] = set()
        self.is_read, self.goes_on = threading.Event(), threading.Event()

    def load_state(self, user_id: str, model_version: str) -> SpilledState | None:
        if user_id in self.slow:
            self.is_read.set()
            assert self.goes_on.wait(PATIENCE_S)
        return super().load_state(user_id, model_version)

    def changes(self, user_id: str, since: int = 0, most: int = MOST_EVENTS) -> Changes:
        if user_id in self.slow and since:
            self.is_read.set()
            assert self.goes_on.wait(PATIENCE_S)
        return super().changes(user_id, since, most)


def test_a_user_whose_history_is_read_keeps_nobody_waiting(model: Recommender, tmp_path: Path) -> None:
    with SlowStore(tmp_path / "s") as store, ThreadPoolExecutor(2) as threads:
        for user in ("cold", "warm"):
            record(store, user, history(model, 3), user)
        states, store.slow = StateCache(model, store), {"cold"}
        states.recommend([Query((), 3, user_id="warm")])
        cold = threads.submit(states.recommend, [Query((), 3, user_id="cold")])
        try:
            assert store.is_read.wait(PATIENCE_S)
            warm = threads.submit(states.recommend, [Query((), 3, user_id="warm")])
            (answer,) = warm.result(PATIENCE_S)
            assert not cold.done()
            # What is recorded while the history is read is in the answer.
            record(store, "cold", history(model, 1, 4), "late")
        finally:
            store.goes_on.set()
        assert_same(answer, replayed(model, store, Query((), 3, user_id="warm")))
        assert_same(cold.result(PATIENCE_S)[0], replayed(model, store, Query((), 3, user_id="cold")))


@pytest.mark.parametrize("deletes", [False, True])
def test_a_user_in_memory_whose_events_are_read_keeps_nobody_waiting(
    model: Recommender, tmp_path: Path, deletes: bool
) -> None:
    """Nor is a state kept of a user who is deleted while they are read."""
    with SlowStore(tmp_path / "s") as store, ThreadPoolExecutor(2) as threads:
        for user in ("busy", "warm"):
            record(store, user, history(model, 3), user)
        states = StateCache(model, store)
        states.recommend([Query((), 3, user_id="busy"), Query((), 3, user_id="warm")])
        record(store, "busy", history(model, 1, 4), "late")
        store.slow = {"busy"}
        busy = threads.submit(states.recommend, [Query((), 3, user_id="busy")])
        try:
            assert store.is_read.wait(PATIENCE_S)
            (warm,) = threads.submit(states.recommend, [Query((), 3, user_id="warm")]).result(PATIENCE_S)
            assert not busy.done()
            if deletes:
                store.delete_user("busy")
                states.forget("busy")
        finally:
            store.goes_on.set()
        assert_same(warm, replayed(model, store, Query((), 3, user_id="warm")))
        assert_same(busy.result(PATIENCE_S)[0], replayed(model, store, Query((), 3, user_id="busy")))
        assert states.has("busy") is not deletes


def test_users_without_events_push_no_state_out(model: Recommender, store: EventStore) -> None:
    item = model.catalog.item_ids[1]
    store.record([UserEvent("e", "real", Event(item, 4.0, 1))])
    states = StateCache(model, store, capacity=10)
    states.recommend([Query((), 3, user_id="real")])
    for number in range(100):
        states.recommend([Query((), 3, user_id=f"nobody {number}")])
    assert states.has("real")
    assert len(states) == 1
    store.delete_user("real")
    checked(states, model, store, [Query((), 3, user_id="real")])
    assert len(states) == 0


def test_a_batch_asks_once_for_the_revisions_of_all_its_users(
    model: Recommender, store: EventStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    users = [f"user {number}" for number in range(5)]
    store.record([UserEvent(user, user, Event(model.catalog.item_ids[1], 4.0, 1)) for user in users])
    states = StateCache(model, store)
    queries = [Query((), 3, user_id=user) for user in users]
    states.recommend(queries)
    asked: list[Sequence[str]] = []
    revisions = store.revisions

    def counted(user_ids: Sequence[str]) -> dict[str, int]:
        asked.append(user_ids)
        return revisions(user_ids)

    monkeypatch.setattr(store, "revisions", counted)
    states.recommend(queries)
    assert [sorted(one) for one in asked] == [users]


def test_without_stored_users_the_store_is_not_asked(
    model: Recommender, store: EventStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []
    monkeypatch.setattr(store, "revisions", asked.append)
    states = StateCache(model, store)
    (answer,) = states.recommend([Query((Event(model.catalog.item_ids[1], 4.0, 1),), 5)])
    assert len(answer.items) == 5
    assert asked == []


def test_states_in_memory_are_answered_at_once(model: Recommender, store: EventStore) -> None:
    record(store, "ada", history(model, 5))
    record(store, "bob", history(model, 3, first=20))
    states = StateCache(model, store)
    queries = [Query((), 5, user_id="ada"), Query((), 7, user_id="bob"), Query((), 3, user_id="ada")]
    assert states.recommend_at_once(queries) is None
    expected = states.recommend(queries)
    for answer, other in zip(states.recommend_at_once(queries) or [], expected, strict=True):
        assert_same(answer, other)


@pytest.mark.parametrize(
    "query",
    [
        Query((), 5, user_id="bob"),
        Query((), 5, user_id="ada", request_time=1),
        Query([Event("x", 4.0, 1)], 5),
    ],
    ids=["not in memory", "as of an earlier time", "sent along"],
)
def test_what_takes_longer_is_not_answered_at_once(model: Recommender, store: EventStore, query: Query) -> None:
    record(store, "ada", history(model, 5))
    record(store, "bob", history(model, 3, first=20))
    states, ada = StateCache(model, store), Query((), 5, user_id="ada")
    states.recommend([ada])
    assert states.recommend_at_once([ada]) is not None
    assert states.recommend_at_once([ada, query]) is None


def test_nothing_is_computed_before_all_are_known_to_be_in_memory(
    model: Recommender, store: EventStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    record(store, "ada", history(model, 5))
    record(store, "bob", history(model, 3, first=20))
    states, asked, masks = StateCache(model, store), list[str | None](), model.masks
    ada, bob = Query((), 5, user_id="ada"), Query((), 5, user_id="bob")
    states.recommend([ada])

    def counted(query: Query, *arguments: Any) -> Any:
        asked.append(query.user_id)
        return masks(query, *arguments)

    monkeypatch.setattr(model, "masks", counted)
    assert states.recommend_at_once([ada, bob]) is None
    assert asked == []
    states.recommend([bob])
    asked.clear()
    assert states.recommend_at_once([ada, bob]) is not None
    assert asked == ["ada", "bob"]


def test_new_events_and_other_threads_are_not_waited_for(
    model: Recommender, store: EventStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    record(store, "ada", history(model, 5))
    states, query = StateCache(model, store), Query((), 5, user_id="ada")
    states.recommend([query])
    record(store, "ada", history(model, 1, first=40), "later")
    assert states.recommend_at_once([query]) is None
    states.recommend([query])
    assert states.recommend_at_once([query]) is not None
    with states._lock:
        assert states.recommend_at_once([query]) is None
    monkeypatch.setattr(store, "revisions_at_once", lambda user_ids: None)
    assert states.recommend_at_once([query]) is None
