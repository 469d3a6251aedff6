"""A server's log as it is read back: whose responses count, and histories that give the server's own propensities."""

import contextlib
import json
import sqlite3
import time
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from flax import nnx

from jaxrec.data.prepared import PreparedData
from jaxrec.models.hybrid import Hybrid
from jaxrec.rl.reward_tables import fit_reward_tables
from jaxrec.rl.scoring import frozen_scoring
from jaxrec.rl.served.event_store import (
    DETERMINISTIC,
    NOT_SHOWN,
    OPTIONS,
    SHOWN_OTHERWISE,
    STILL_OPEN,
    ServedLog,
    read_served_log,
)
from jaxrec.rl.served.policy import EXACT, logged_logprobs
from jaxrec.rl.served.recommendations import History, Recommendation
from jaxrec.rl.served.states import served_states
from serve import client
from serve.front.server import create_server
from serve.model.directory import read_artifact
from serve.model.events import Event
from serve.model.exploration import Exploration
from serve.model.recommender import Recommender
from serve.stores.base import ShownItem, Slate, UserEvent
from serve.stores.sqlite.store import SQLiteStore
from tests.serve.one_model import one_model
from tests.serve.stores.slates import log_now

START, HOUR, DAY = 1_200_000_000, 3600, 86_400
TEMPERATURES = (0.5, 2.0)


def items_of(one: Recommendation) -> list[int]:
    return one.history.items.tolist()


def write_log(path: Path, data: PreparedData, events: list[tuple[int, str | None]], shown: dict[str, int]) -> None:
    """Of one user: events on one item after the other, each with its time and the recommendation that it names, and
    when each recommendation was shown."""
    raw = [str(item) for item in data.catalog.ids.raw_ids]
    with SQLiteStore(path) as store:
        for number, (timestamp, named) in enumerate(events):
            store.record([UserEvent(str(number), "u", Event(raw[number], 4.0, timestamp), named)])
        for name, timestamp in shown.items():
            log_now(store, Slate(name, "u", (raw[9],), (-0.5,), "reinforce", "v", timestamp, 0.5))


@pytest.fixture
def dated(small_data: PreparedData, tmp_path: Path) -> Callable[[int | None], ServedLog]:
    """Reads a log with a window: a, b, c and d are shown to one user at 100, 200, 290 and 310; a is answered after 5
    and after 200 seconds, b 5 seconds before, by a clock that is slow."""
    events = [(50, None), (105, "a"), (300, "a"), (195, "b")]
    write_log(tmp_path / "events.sqlite", small_data, events, {"a": 100, "b": 200, "c": 290, "d": 310})
    return lambda window: read_served_log(tmp_path / "events.sqlite", small_data.catalog, window)


@pytest.mark.parametrize(
    ("window", "responses"),
    [
        (0, [[], [4], [], []]),
        (5, [[2], [4], []]),  # d is the log's end, so its responses may still come
        (20, [[2], [4], []]),
        (21, [[2], [4]]),
        (200, [[2, 3]]),
        (211, []),
    ],
)
def test_a_response_counts_within_the_attribution_window(
    dated: Callable[[int | None], ServedLog], window: int, responses: list[list[int]]
) -> None:
    log = dated(window)
    assert [one.responses.tolist() for one in log.recommendations] == responses
    assert log.skipped.get(STILL_OPEN, 0) == 4 - len(responses)
    assert log.attribution_window == window


def test_a_late_answer_is_history_of_what_is_shown_after_it(dated: Callable[[int | None], ServedLog]) -> None:
    a, b, c, d = dated(0).recommendations
    # What answers b is no history of it, whatever its clock says.
    assert [items_of(one) for one in (a, b, c, d)] == [[1], [1, 2], [1, 2, 4], [1, 2, 4, 3]]


def test_what_was_done_within_the_second_of_a_recommendation_is_history_of_it(
    small_data: PreparedData, tmp_path: Path
) -> None:
    """Unless it names that one or a later one. The user watches, and asks for more within the second, three times."""
    events = [(100, None), (100, "a"), (100, None), (100, "b"), (101, None)]
    write_log(tmp_path / "events.sqlite", small_data, events, {"a": 100, "b": 100, "c": 101})
    log = read_served_log(tmp_path / "events.sqlite", small_data.catalog, 0)
    assert not log.skipped
    # The third event came after a, which its time does not tell.
    assert [items_of(one) for one in log.recommendations] == [[1, 3], [1, 2, 3], [1, 2, 3, 4, 5]]
    assert [one.responses.tolist() for one in log.recommendations] == [[2], [4], []]


def test_what_was_taken_from_a_slate_within_its_second_is_no_history_of_it(
    small_data: PreparedData, tmp_path: Path
) -> None:
    """By a client that names no recommendation: of nine other items, and then of the one that was shown."""
    write_log(tmp_path / "events.sqlite", small_data, [(100, None)] * 10, {"a": 100, "b": 101})
    log = read_served_log(tmp_path / "events.sqlite", small_data.catalog, 0)
    assert [one.slate.tolist() for one in log.recommendations] == [[10], [10]]
    assert [items_of(one) for one in log.recommendations] == [[*range(1, 10)], [*range(1, 11)]]


def test_the_attribution_window_is_by_default_within_which_99_percent_of_the_responses_came(
    dated: Callable[[int | None], ServedLog], small_data: PreparedData, tmp_path: Path
) -> None:
    """Of few responses that is the latest: no response that was seen is left out. Without one there is nothing to wait
    for."""
    assert dated(None).attribution_window == 200
    raw = [str(item) for item in small_data.catalog.ids.raw_ids]
    with SQLiteStore(tmp_path / "many.sqlite") as store:
        store.record([UserEvent("before", "u", Event(raw[0], None, START - 1))])
        log_now(store, Slate("a", "u", (raw[1],), (-0.5,), "reinforce", "v", START, 0.5))
        assert read_served_log(tmp_path / "many.sqlite", small_data.catalog).attribution_window == 0
        delays = [7] * 197 + [1000] * 3  # 98.5 % within 7 seconds
        events = [Event(raw[1], None, START + delay) for delay in delays]
        store.record([UserEvent(str(number), "u", event, "a") for number, event in enumerate(events)])
        assert read_served_log(tmp_path / "many.sqlite", small_data.catalog).attribution_window == 1000
        store.record([UserEvent(f"more {number}", "u", events[0], "a") for number in range(200)])  # 99.25 %
    log = read_served_log(tmp_path / "many.sqlite", small_data.catalog)
    assert log.attribution_window == 7
    assert [len(one.responses) for one in log.recommendations] == [397]


def test_a_response_dated_after_now_changes_nothing_else(small_data: PreparedData, tmp_path: Path) -> None:
    """A client whose clock is 400 days ahead neither makes the window as long, nor closes what is open; its own
    response is too late to be one."""
    now = int(time.time())
    events: list[tuple[int, str | None]] = [(START, None), (now - 3 * DAY + 60, "a"), (now - 2 * DAY + 30, "b")]
    shown = {"a": now - 3 * DAY, "b": now - 2 * DAY, "c": now - HOUR}
    write_log(tmp_path / "right.sqlite", small_data, events, shown)
    write_log(tmp_path / "wrong.sqlite", small_data, [*events, (now + 400 * DAY, "b")], shown)
    right, wrong = (read_served_log(tmp_path / f"{name}.sqlite", small_data.catalog) for name in ("right", "wrong"))
    for log in (right, wrong):
        assert (log.attribution_window, log.skipped) == (60, {STILL_OPEN: 1})
        assert [one.responses.tolist() for one in log.recommendations] == [[2], [3]]
        assert [items_of(one) for one in log.recommendations] == [[1], [1, 2]]


@pytest.mark.parametrize("ahead", [DAY, 36_500 * DAY])
def test_an_event_that_answers_nothing_does_not_move_the_end(
    ahead: int, small_data: PreparedData, tmp_path: Path
) -> None:
    """Of whichever user, be it dated before now or after."""
    shown = {"a": START, "b": START + HOUR}
    write_log(tmp_path / "events.sqlite", small_data, [(START - 1, None), (START + HOUR + ahead, None)], shown)
    with SQLiteStore(tmp_path / "events.sqlite") as store:
        item = str(small_data.catalog.ids.raw_ids[0])
        # It names a recommendation, but none of its user.
        store.record([UserEvent("v", "v", Event(item, None, START + HOUR + ahead), "a")])
    log = read_served_log(tmp_path / "events.sqlite", small_data.catalog, HOUR)
    assert (len(log.recommendations), log.skipped) == (1, {STILL_OPEN: 1})


@pytest.mark.parametrize(("window", "closed"), [(None, 2), (14, 2), (13, 3), (10, 3), (15, 1), (16, 0)])
def test_responses_go_on_after_the_last_recommendation(
    window: int | None, closed: int, small_data: PreparedData, tmp_path: Path
) -> None:
    """A burst whose responses all come later: they end the log, and by default come within 14 seconds."""
    events = [(START - 1, None), (START + 10, "a"), (START + 15, "b"), (START + 12, "c")]
    write_log(tmp_path / "events.sqlite", small_data, events, {"a": START, "b": START + 1, "c": START + 2})
    log = read_served_log(tmp_path / "events.sqlite", small_data.catalog, window)
    assert log.attribution_window == (window or 14)
    assert [one.time for one in log.recommendations] == [START, START + 1, START + 2][:closed]
    assert log.skipped.get(STILL_OPEN, 0) == 3 - closed


def write_random_log(path: Path, data: PreparedData, users: int, events: int, shown: int) -> None:
    """Users with as many events and recommendations each within a minute, of known and unknown items, with and without
    ratings; recommendations of whatever cannot be learned from, and events that name one's own, others' or none."""
    rng, raw = np.random.default_rng(users), [*map(str, data.catalog.ids.raw_ids.tolist()), "nobody knows it"]
    SQLiteStore(path).close()
    names = [f"{user}.{number}" for user in range(users) for number in range(shown)]
    impressions, acts = [], []
    for name in names:
        slate = rng.choice(len(raw) - (rng.random() < 0.9), 3, replace=False)
        drawn, temperature = [-1.0, -0.5, -2.0] if rng.random() < 0.9 else [], 0.5 if rng.random() < 0.9 else None
        user = name.split(".")[0] if rng.random() < 0.9 else None
        columns = json.dumps([raw[item] for item in slate]), json.dumps(drawn), "reinforce", f"v{rng.integers(2)}"
        told = int(rng.integers(60)) if rng.random() < 0.5 else None
        excluded = json.dumps([raw[item] for item in rng.integers(0, len(raw), rng.integers(3))])
        impressions.append((name, user, *columns, int(rng.integers(60)), temperature, told, excluded))
    for number in range(users * events):
        user, item = number // events, raw[rng.integers(len(raw))]
        named = names[rng.integers(len(names))] if rng.random() < 0.1 else f"{user}.{rng.integers(2 * shown)}"
        rating = float(rng.integers(1, 6)) if rng.random() < 0.5 else None
        weight = float(rng.choice([1.0, 1.0, 2.5, 0.0, -1.0]))
        acts.append((f"e{number}", str(user), item, rating, int(rng.integers(60)), named, weight))
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.executemany(
            "INSERT INTO shown (recommendation_id, user_id, item_ids, log_propensities, policy, model_version, "
            "timestamp, temperature, request_time, excluded_item_ids) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            impressions,
        )
        connection.executemany(
            "INSERT INTO events (event_id, user_id, item_id, rating, timestamp, recommendation_id, weight) "
            "VALUES (?, ?, ?, ?, ?, ?, ?)",
            acts,
        )


def simply_read(path: Path, data: PreparedData, window: int) -> list[tuple[Any, ...]]:
    """What the module's text says, of one recommendation after the other: (user, time, version, history items, history
    times, slate, items of the responses, their ratings, their weights, request time, excluded items)."""
    index = {str(raw): number for number, raw in enumerate(data.catalog.ids.raw_ids.tolist(), start=1)}
    with contextlib.closing(sqlite3.connect(path)) as connection:
        every = connection.execute(
            "SELECT user_id, item_id, rating, timestamp, recommendation_id, weight FROM events"
            " ORDER BY timestamp, arrival"
        ).fetchall()
        shown = connection.execute(
            "SELECT recommendation_id, user_id, item_ids, log_propensities, model_version, timestamp, temperature, "
            "request_time, excluded_item_ids FROM shown WHERE user_id IS NOT NULL ORDER BY user_id, timestamp, number"
        ).fetchall()
    events = [event for event in every if event[5] > 0]
    when = {name: (user, at) for name, user, _, _, _, at, *_ in shown}
    names = list(when)
    came = sorted(at for user, _, _, at, name, _ in events if when.get(name, ("", 0))[0] == user)
    end = max(came[-(-99 * len(came) // 100) - 1], *(at for _, at in when.values()))
    found = []
    for name, user, items, drawn, version, at, temperature, told, excluded in shown:
        slate = [index.get(item, 0) for item in json.loads(items)]
        if not json.loads(drawn) or temperature is None or 0 in slate or at > end - window:
            continue
        later = [other for other in names[names.index(name) :] if when[other][0] == user]
        own = [event for event in events if event[0] == user]
        history = [
            (index[item], stamp)
            for _, item, _, stamp, answered, _ in own
            if item in index and stamp <= min(at, at if told is None else told) and answered not in later
            if not (stamp == at and index[item] in slate)
        ]
        responses = [
            (index.get(item, 0), rating, weight)
            for _, item, rating, stamp, of, weight in own
            if of == name and stamp - at <= window
        ]
        if history:
            left_out = [index[item] for item in json.loads(excluded) if item in index]
            rows = [[*column] for column in zip(*history, strict=True)]
            found.append(
                (user, at, version, *rows, slate, *([*zip(*responses, strict=True)] or [(), (), ()]), told, left_out)
            )
    return found


def test_the_log_is_what_a_simple_reader_finds(small_data: PreparedData, tmp_path: Path) -> None:
    path, window = tmp_path / "events.sqlite", 10
    write_random_log(path, small_data, users=30, events=20, shown=10)
    expected, log = simply_read(path, small_data, window), read_served_log(path, small_data.catalog, window)
    assert len(log.recommendations) == len(expected) > 100
    assert log.shown == 300
    assert sum(log.skipped.values()) == 300 - len(expected)
    assert log.recommendations.with_response() == sum(len(one[6]) > 0 for one in expected) > 10
    for one, (user, at, version, items, times, slate, responses, ratings, weights, told, excluded) in zip(
        log.recommendations, expected, strict=True
    ):
        assert (log.users[one.user], one.time, log.versions[one.version]) == (user, at, version)
        assert (one.history.items.tolist(), one.history.times.tolist()) == (items, times)
        assert (one.slate.tolist(), one.log_propensities.tolist()) == (slate, [-1.0, -0.5, -2.0])
        assert one.responses.tolist() == list(responses)
        np.testing.assert_array_equal(one.response_ratings, np.array(ratings, np.float32))  # None is NaN
        assert one.response_weights.tolist() == list(weights)
        assert (one.temperature, one.request_time, one.excluded.tolist()) == (0.5, told, excluded)
    last = log.recommendations[-1]
    assert last.time == log.recommendations[len(expected) - 1].time == expected[-1][1]
    assert [one.time for one in log.recommendations[2:4]] == [expected[2][1], expected[3][1]]
    with pytest.raises(IndexError):
        log.recommendations[len(expected)]


def test_memory_of_reading_is_that_of_what_is_kept(small_data: PreparedData, tmp_path: Path) -> None:
    """A log of ten times as many users takes ten times as much to keep, and as much beside that while it is read."""
    beside, kept = [], []
    for users in (40, 400):
        path = tmp_path / f"{users}.sqlite"
        write_random_log(path, small_data, users, events=100, shown=10)
        read_served_log(path, small_data.catalog, 10)  # what is imported
        tracemalloc.start()
        try:
            log = read_served_log(path, small_data.catalog, 10)
            now, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        beside.append(peak - now)
        kept.append(now)
        # 16 bytes an event, and some 200 a recommendation: no objects.
        assert now < users * 100 * 16 + len(log.recommendations) * 400
    assert 8 < kept[1] / kept[0] < 12
    assert beside[1] < 3 * beside[0]


def distances(recommendations: Sequence[Recommendation], data: PreparedData, hybrid: Hybrid) -> np.ndarray:
    """[recommendations]: by how much the furthest slot of each is not reproduced, nats."""
    scoring = frozen_scoring(hybrid.with_policy(None), fit_reward_tables(data))
    graphdef, head = nnx.split(hybrid.policy)
    states = served_states(hybrid.with_policy(None), recommendations, data.config.rating_scale, scoring)
    found = logged_logprobs(graphdef, nnx.to_pure_dict(head), scoring, states)
    return np.abs(found - states.log_propensities).max(axis=1)


def test_what_a_real_server_drew_is_reproduced(
    model_directory: Path, small_data: PreparedData, small_hybrid: Hybrid, tmp_path: Path
) -> None:
    """At two temperatures in one log, and whether the request told its time (after the last event, or before some),
    excluded items, both, or neither; and not where one of these is ignored."""
    path, rng, users = tmp_path / "events.sqlite", np.random.default_rng(0), 8
    raw, model = small_data.catalog.ids.raw_ids.astype(str), Recommender(read_artifact(model_directory), "cpu")
    with SQLiteStore(path) as store:
        for user in range(users):
            times = START + np.sort(rng.integers(0, 9 * DAY, 12))
            events = [
                Event(str(item), 3.0, int(at)) for item, at in zip(rng.choice(raw, 12, False), times, strict=True)
            ]
            events.append(Event("nobody knows it", None, START + 9 * DAY + HOUR))
            store.record([UserEvent(f"{user}-{at}", f"user {user}", event) for at, event in enumerate(events)])
        for temperature in TEMPERATURES:
            models = one_model(model, store, exploration=Exploration(temperature, seed=1))
            server = create_server(models, store, "127.0.0.1:0")
            server.start()
            with client.RecommenderClient(f"127.0.0.1:{server.port}", timeout_s=30.0) as asking:
                for user in range(users):
                    excluded = ["nobody knows it", *rng.choice(raw, 25, False).tolist()]
                    requests = [
                        client.recommend_request(
                            user_id=f"user {user}", k=3, request_time=told, exclude_item_ids=left_out
                        )
                        for told in (None, START + 10 * DAY, START + 5 * DAY)
                        for left_out in ([], excluded)
                    ]
                    asking.recommend(user_id=f"user {user}", k=3)
                    asking.batch_recommend(requests[1:])
            server.drain()
    log = read_served_log(path, small_data.catalog)
    assert (log.shown, len(log.recommendations), log.skipped) == (12 * users, 12 * users, {})
    assert log.versions == [model.info.model_version]

    def distance(**changed: object) -> np.ndarray:
        """[users, temperatures, told, excluded]: by how much the furthest slot is not reproduced, nats."""
        changed_log = [one._replace(**changed) for one in log.recommendations]
        return distances(changed_log, small_data, small_hybrid).reshape(users, 2, 3, 2)

    assert distance().max() <= EXACT / 10
    assert np.median(distance(request_time=None)[:, :, 1:], axis=0).min() > EXACT
    assert np.median(distance(excluded=np.zeros(0, np.int32))[..., 1], axis=0).min() > EXACT
    for at in range(2):
        assert np.median(distance(temperature=TEMPERATURES[1 - at])[:, at], axis=0).min() > EXACT
    past = [one for one in log.recommendations if one.request_time == START + 5 * DAY]
    assert len(past) == 4 * users
    assert all(0 < len(one.history.items) < 12 for one in past)


def test_slates_with_request_options_are_counted_and_left_out(
    model_directory: Path, small_data: PreparedData, small_hybrid: Hybrid, tmp_path: Path
) -> None:
    """Of a real server that explores: what is learned from is reproduced; a filtered slate would not be."""
    path, users = tmp_path / "events.sqlite", 4
    raw, model = small_data.catalog.ids.raw_ids.astype(str), Recommender(read_artifact(model_directory), "cpu")
    options: list[dict[str, Any]] = [
        {"filter": client.ItemFilter(any_tags=["Drama"])},
        {"filter": client.ItemFilter(minimum_score=-1.0)},
        {"allow_seen": True},
        {"history": [client.Event(item_id=raw[1], timestamp=START)]},
    ]
    with SQLiteStore(path) as store:
        for user in range(users):
            events = [Event(str(item), 3.0, START + HOUR * at) for at, item in enumerate(raw[user::9])]
            store.record([UserEvent(f"{user}-{at}", f"user {user}", event) for at, event in enumerate(events)])
        server = create_server(one_model(model, store, exploration=Exploration(1.0, seed=1)), store, "127.0.0.1:0")
        server.start()
        with client.RecommenderClient(f"127.0.0.1:{server.port}", timeout_s=30.0) as asking:
            for user in range(users):
                # What the model does with the history by itself, a filter without a condition, and the same version.
                version = model.info.model_version
                named = {"model_version": version if user % 2 else ""}
                asking.recommend(user_id=f"user {user}", k=3, allow_seen=False, filter=client.ItemFilter(), **named)
                answers = [asking.recommend(user_id=f"user {user}", k=3, **one) for one in options]
                assert all(answer.log_propensity < 0 for answer in answers)
        server.drain()
    log = read_served_log(path, small_data.catalog)
    assert (len(log.recommendations), log.skipped, log.shown) == (users, {OPTIONS: 4 * users}, 5 * users)
    assert distances(log.recommendations, small_data, small_hybrid).max() <= EXACT / 10
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE shown SET request_options = '[]' WHERE request_options = '[\"filter\"]'")
    unmarked = read_served_log(path, small_data.catalog)
    assert len(unmarked.recommendations) == 3 * users
    assert distances(unmarked.recommendations, small_data, small_hybrid).max() > EXACT


def test_what_was_not_drawn_is_counted_as_that_with_request_options_too(
    small_data: PreparedData, tmp_path: Path
) -> None:
    """So that the hint about --explore is given; of places for new items and most rules, it would be wrong."""
    item, path = str(small_data.catalog.ids.raw_ids[0]), tmp_path / "events.sqlite"
    with SQLiteStore(path) as store:
        store.record([UserEvent("1", "ada", Event(item, None, START))])
        cases: list[tuple[tuple[str, ...], tuple[str, ...], tuple[float, ...]]] = [
            (("filter",), (item,), ()),
            (("filter",), (item,), (-1.0,)),
            (("filter",), (), ()),
            (("filter", "new_item_slots"), (item,), ()),
            (("rules",), (item,), ()),
            (("rules",), (item,), (-1.0,)),
            (("not_shown_within",), (item,), ()),
            (("model_version",), (item,), ()),
            (("model_version", "filter"), (item,), (-1.0,)),
            (("not_shown_within", "filter"), (item,), (-1.0,)),
        ]
        for at, (options, slate, log_propensities) in enumerate(cases):
            one = Slate(f"{at}", "ada", slate, log_propensities, "reinforce", "v", START + 1)
            store.log_slate(one._replace(temperature=1.0, request_options=options))
    log = read_served_log(path, small_data.catalog)
    assert log.skipped == {DETERMINISTIC: 3, OPTIONS: 7}


SLATE_OF_SHOWN = {
    # What was recorded as shown (position, place in the slate), and what is left of the slate.
    "none": ([], None),
    "all": ([(1, 0), (2, 1), (3, 2)], 3),
    "first": ([(1, 0)], 1),
    "first two, reported late": ([(2, 1), (1, 0)], 2),
    "without positions": ([(0, 1), (0, 0)], 2),
    "further down the page": ([(11, 0), (15, 1)], 2),
    "gap": ([(1, 0), (2, 2)], None),
    "other order": ([(1, 1), (2, 0)], None),
    "another item": ([(1, 0), (2, 7)], None),
}


@pytest.mark.parametrize("case", SLATE_OF_SHOWN)
def test_a_slate_counts_as_far_as_it_was_shown(case: str, small_data: PreparedData, tmp_path: Path) -> None:
    recorded, left = SLATE_OF_SHOWN[case]
    raw, path = small_data.catalog.ids.raw_ids.astype(str).tolist(), tmp_path / "events.sqlite"
    with SQLiteStore(path) as store:
        store.record([UserEvent("1", "ada", Event(raw[0], None, START))])
        slate, propensities = tuple(raw[1:4]), (-0.5, -1.0, -2.0)
        for name, user in (("a", "ada"), ("b", "bob")):
            log_now(store, Slate(name, user, slate, propensities, "reinforce", "v", START + 1, temperature=0.5))
        # What was shown to others changes nothing but that impressions are recorded.
        store.record_shown([ShownItem("b", raw[9], 1, START + 2, START)])
        store.record_shown([ShownItem("a", raw[1 + at], position, START + 2, START) for position, at in recorded])
    log = read_served_log(path, small_data.catalog, 0)
    if left is None:
        reasons = {SHOWN_OTHERWISE: 2} if recorded else {SHOWN_OTHERWISE: 1, NOT_SHOWN: 1}
        assert (len(log.recommendations), log.skipped) == (0, reasons)
        return
    (one,) = log.recommendations
    assert (one.slate.tolist(), one.log_propensities.tolist()) == ([2, 3, 4][:left], [-0.5, -1.0, -2.0][:left])
    assert one.answered == 3
    assert log.skipped == {SHOWN_OTHERWISE: 1}


def test_slates_without_impressions_count_until_the_first_that_has_some(
    small_data: PreparedData, tmp_path: Path
) -> None:
    """The first day without a client that records them; from then on, what has none was not on a screen."""
    raw, path = small_data.catalog.ids.raw_ids.astype(str).tolist(), tmp_path / "events.sqlite"
    with SQLiteStore(path) as store:
        store.record([UserEvent("1", "ada", Event(raw[0], None, START))])
        for day in range(4):
            one = Slate(f"{day}", "ada", (raw[1],), (-0.5,), "reinforce", "v", START + day * DAY, temperature=0.5)
            log_now(store, one)
        store.record_shown([ShownItem("2", raw[1], 1, START, START)])
    log = read_served_log(path, small_data.catalog, 0)
    assert [one.time for one in log.recommendations] == [START, START + DAY, START + 2 * DAY]
    assert log.skipped == {NOT_SHOWN: 1}


def test_what_a_real_server_read_within_the_second_is_reproduced(
    model_directory: Path,
    small_data: PreparedData,
    small_hybrid: Hybrid,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """New users watch and ask, three times within one second of the server's clock. The last of it is history too: not
    reproduced without."""
    path, rng, users = tmp_path / "events.sqlite", np.random.default_rng(1), 6
    raw, model = small_data.catalog.ids.raw_ids.astype(str), Recommender(read_artifact(model_directory), "cpu")
    monkeypatch.setattr("serve.api.service.time", SimpleNamespace(time=lambda: START + 0.5, monotonic=time.monotonic))
    with SQLiteStore(path) as store:
        server = create_server(one_model(model, store, exploration=Exploration(1.0, seed=1)), store, "127.0.0.1:0")
        server.start()
        with client.RecommenderClient(f"127.0.0.1:{server.port}", timeout_s=30.0) as asking:
            for user in range(users):
                named: str | None = None
                for at, item in enumerate(rng.choice(raw, 3, replace=False)):
                    event = Event(str(item), 3.0, START)
                    store.record([UserEvent(f"{user}-{at}", f"user {user}", event, named)])
                    named = asking.recommend(user_id=f"user {user}", k=3).recommendation_id
        server.drain()
    log = read_served_log(path, small_data.catalog)
    assert (len(log.recommendations), log.skipped) == (3 * users, {})
    assert {one.time for one in log.recommendations} == {START}
    assert [len(one.history.items) for one in log.recommendations] == [1, 2, 3] * users
    assert distances(log.recommendations, small_data, small_hybrid).max() <= EXACT / 10
    without_last = [
        one._replace(history=History(*(column[:-1] for column in one.history)))
        for one in log.recommendations
        if len(one.history.items) > 1
    ]
    assert np.median(distances(without_last, small_data, small_hybrid)) > EXACT
