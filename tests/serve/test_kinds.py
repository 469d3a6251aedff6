"""What a view, a dislike and a skip change for the user: in stored and in sent histories, and in the log."""

import subprocess
import sys
import time
from pathlib import Path

import grpc
import pytest

from serve.api.event_types import BUILT_IN, EventTypesError, read_event_types
from serve.client import Event, RecommenderClient, UserEvent
from serve.front.server import create_server
from serve.model.events import Event as StoredEvent
from serve.model.recommender import Recommender
from serve.serving import states as states_module
from serve.stores.base import EventStore
from serve.stores.base import UserEvent as Stored
from tests.serve.one_model import one_model
from tests.serve.serving.test_states import CountedRuns
from tests.serve.stores.slates import slates_of

ALL = 60
"""Items of the catalogue."""


def sent(*kinds: tuple[int, str], ids: list[str]) -> list[UserEvent]:
    """An event a second on the items of these numbers, of these types."""
    return [
        UserEvent(event_id=f"{kind}-{number}-{at}", user_id="u", item_id=ids[number], timestamp=1_000 + at, type=kind)
        for at, (number, kind) in enumerate(kinds)
    ]


def answered(client: RecommenderClient, events: list[UserEvent], **asked: object) -> tuple[set[str], set[str]]:
    """All that can be recommended to the stored user, and to the same history sent along."""
    history = [Event(item_id=one.item_id, timestamp=one.timestamp, type=one.type) for one in events]
    stored = client.recommend(user_id="u", k=ALL, **asked)  # type: ignore[arg-type]
    along = client.recommend(history=history, k=ALL, **asked)  # type: ignore[arg-type]
    assert stored.policy == along.policy
    return {one.item_id for one in stored.recommendations}, {one.item_id for one in along.recommendations}


def test_a_disliked_item_is_out_at_once_and_a_later_like_brings_it_back(
    client: RecommenderClient, model: Recommender
) -> None:
    ids = model.catalog.item_ids
    every = set(ids[1:])
    steps = [
        # What came, and what may not be recommended: with items of the history, and without.
        ((3, "view"), set(), {3}),
        ((5, "dislike"), {5}, {3, 5}),
        ((6, "skip"), {5}, {3, 5}),
        ((3, "dislike"), {3, 5}, {3, 5}),
        ((5, "like"), {3}, {3, 5}),
        ((7, ""), {3}, {3, 5, 7}),
    ]
    kinds = [kind for kind, _, _ in steps]
    for at in range(len(steps)):
        events = sent(*kinds[: at + 1], ids=ids)
        client.record_events(events[-1:])
        _, disliked, excluded = steps[at]
        expected = every - {ids[number] for number in disliked}
        assert answered(client, events, allow_seen=True) == (expected, expected)
        expected = every - {ids[number] for number in excluded}
        assert answered(client, events) == (expected, expected)


def test_the_sequence_has_positive_events_alone(client: RecommenderClient, model: Recommender) -> None:
    """The same scores as without the others."""
    ids = model.catalog.item_ids
    events = sent((3, "view"), (5, "dislike"), (9, "purchase"), (6, "skip"), ids=ids)
    client.record_events(events)
    positive = [Event(item_id=one.item_id, timestamp=one.timestamp) for one in (events[0], events[2])]
    expected = client.recommend(history=positive, exclude_item_ids=[ids[5]], k=5).recommendations
    found = client.recommend(user_id="u", k=5).recommendations
    assert [one.item_id for one in found] == [one.item_id for one in expected]
    assert [one.score for one in found] == pytest.approx([one.score for one in expected], abs=1e-4)


def test_without_positive_events_the_popular_items_come_without_the_disliked(
    client: RecommenderClient, model: Recommender
) -> None:
    best = client.recommend(history=[], k=2).recommendations
    events = [UserEvent(event_id="1", user_id="u", item_id=best[0].item_id, timestamp=1, type="dislike")]
    client.record_events(events)
    history = [Event(item_id=best[0].item_id, timestamp=1, type="dislike")]
    for answer in (client.recommend(user_id="u", k=1), client.recommend(history=history, k=1)):
        assert (answer.policy, answer.recommendations[0].item_id) == ("popularity", best[1].item_id)
        assert answer.ignored_event_count == 0
    profile = client.get_user_profile("u")
    assert (profile.event_count, len(profile.watch_list)) == (0, 0)


def test_a_late_dislike_does_not_undo_a_newer_like(client: RecommenderClient, model: Recommender) -> None:
    """Which event is the last is a matter of their times."""
    ids = model.catalog.item_ids
    item = ids[5]
    liked = UserEvent(event_id="1", user_id="u", item_id=item, timestamp=20, type="like")
    client.record_events([UserEvent(event_id="0", user_id="u", item_id=ids[3], timestamp=1), liked])
    assert item in answered(client, [liked], allow_seen=True)[0]
    client.record_events([UserEvent(event_id="2", user_id="u", item_id=item, timestamp=10, type="dislike")])
    assert item in answered(client, [liked], allow_seen=True)[0]
    client.record_events([UserEvent(event_id="3", user_id="u", item_id=item, timestamp=20, type="dislike")])
    assert item not in answered(client, [liked], allow_seen=True)[0]


def test_asked_for_an_earlier_time_the_dislike_has_not_happened(client: RecommenderClient, model: Recommender) -> None:
    ids = model.catalog.item_ids
    client.record_events(sent((3, "view"), (5, "dislike"), ids=ids))
    items = {one.item_id for one in client.recommend(user_id="u", k=ALL, request_time=1_000).recommendations}
    assert ids[5] in items
    items = {one.item_id for one in client.recommend(user_id="u", k=ALL, request_time=1_001).recommendations}
    assert ids[5] not in items


def test_the_log_notes_what_was_excluded_as_disliked(
    client: RecommenderClient, store: EventStore, model: Recommender
) -> None:
    ids = model.catalog.item_ids
    client.record_events(sent((3, "view"), (5, "dislike"), (8, "dislike"), ids=ids))
    client.recommend(user_id="u", exclude_item_ids=[ids[9], ids[8]])
    store.flush()
    (shown,) = slates_of(store, "u")
    assert shown.excluded_item_ids == (ids[9], ids[8], ids[5])
    assert shown.request_options == ()


def test_a_spilled_state_still_knows_the_disliked_items(model: Recommender, store: EventStore) -> None:
    ids = model.catalog.item_ids
    events = [StoredEvent(ids[3], None, 1), StoredEvent(ids[5], None, 2, -1.0)]
    store.record([Stored(str(at), "u", event) for at, event in enumerate(events)])
    states = states_module.StateCache(model, store)
    query = states_module.Query((), ALL, user_id="u")
    states.recommend([query])
    states.spill()
    store.flush()
    again = states_module.StateCache(model, store)
    (answer,) = again.recommend([query])
    assert not {3, 5} & set(answer.items.tolist())
    assert len(answer.items) == ALL - 2


def test_types_of_a_file_are_accepted_and_named(model: Recommender, store: EventStore, tmp_path: Path) -> None:
    path = tmp_path / "types.toml"
    path.write_text("bookmark = 3\nhide = -2.5\nimpression = 0\nskip = -1\n")
    types = read_event_types(path)
    assert types == {**BUILT_IN, "bookmark": 3.0, "hide": -2.5, "impression": 0.0, "skip": -1.0}
    server = create_server(one_model(model, store), store, "127.0.0.1:0", event_types=types)
    server.start()
    with RecommenderClient(f"127.0.0.1:{server.port}") as client:
        found = client.get_model_info().event_types
        assert [(one.name, one.weight) for one in found] == sorted(types.items())
        kinds = [(3, "bookmark"), (5, "hide"), (6, "impression"), (7, "skip")]
        client.record_events(sent(*kinds, ids=model.catalog.item_ids))
        assert [event.weight for event in store.history("u")] == [3.0, -2.5, -1.0]
        with pytest.raises(
            grpc.RpcError, match=r"events\[0\].type: expected one of bookmark, click, dislike, hide, imp"
        ):
            client.record_events(sent((3, "Bookmark"), ids=model.catalog.item_ids))
    server.drain()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("view", "expected TOML in UTF-8"),
        ("view = 'much'", "view: expected a weight in -1000..1000, came much"),
        ("view = true", "view: expected a weight in -1000..1000, came True"),
        ("view = nan", "view: expected a weight in -1000..1000, came nan"),
        ("view = -inf", "view: expected a weight in -1000..1000, came -inf"),
        ("view = 1001", "view: expected a weight in -1000..1000, came 1001"),
        ("[view]\nweight = 1", "view: expected a weight in -1000..1000, came {'weight': 1}"),
        ('"" = 1', "expected names of 1 to 64 characters"),
        ('" view" = 1', "expected names of 1 to 64 characters"),
        ('"a\\u0000" = 1', "expected names of 1 to 64 characters"),
        (f"{'x' * 65} = 1", "expected names of 1 to 64 characters"),
        ("interaction = 0", "interaction: expected a weight above 0, came 0"),
        ("\n".join(f"t{at} = 1" for at in range(93)), "expected at most 100 types with the built-in ones, came 101"),
    ],
)
def test_a_bad_file_of_types_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "types.toml"
    path.write_text(text)
    with pytest.raises(EventTypesError) as failure:
        read_event_types(path)
    assert str(failure.value).startswith(f"{path}: {message}")


def test_a_server_says_what_is_wrong_with_its_types(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "serve", "run", "m", "--event-types", str(tmp_path / "none.toml")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert "none.toml: cannot be read: No such file or directory" in ended.stderr


def test_a_repeated_dislike_costs_no_replay(
    model: Recommender, store: EventStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = model.catalog.item_ids
    store.record([Stored(str(at), "u", StoredEvent(ids[at], None, at)) for at in range(1, 5)])
    states = states_module.StateCache(model, store)
    query = states_module.Query((), 5, user_id="u")
    states.recommend([query])
    runs = CountedRuns(model, monkeypatch)
    now = int(time.time())
    for at in range(3):
        store.record([Stored(f"d{at}", "u", StoredEvent(ids[10 + at], None, now + at, -1.0))])
        (answer,) = states.recommend([query._replace(k=ALL)])
        assert not set(range(10, 11 + at)) & set(answer.items.tolist())
    assert runs.replayed == 0
