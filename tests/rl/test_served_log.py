"""A server's log as it is read back: whose answers count, and histories that give the server's own propensities."""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from jaxrec.models.hybrid import Hybrid
from jaxrec.prepare import PreparedData
from jaxrec.rl.log_policy import logged_logprobs
from jaxrec.rl.log_states import log_states
from jaxrec.rl.rewards import reward_tables
from jaxrec.rl.scoring import frozen_scoring
from jaxrec.rl.served_policy import EXACT
from jaxrec.served_log import STILL_OPEN, Recommendation, ServedLog, read_served_log
from serve import client
from serve.artifact import read_artifact
from serve.exploration import Exploration
from serve.history import Event
from serve.loaded import one_model
from serve.recommender import Recommender
from serve.server import create_server
from serve.store import Shown, UserEvent
from serve.stores.sqlite import SQLiteStore

START, HOUR, DAY = 1_200_000_000, 3600, 86_400
TEMPERATURES = (0.5, 2.0)


def items_of(one: Recommendation) -> list[int]:
    return one.history.items.tolist()


@pytest.fixture
def dated(small_data: PreparedData, tmp_path: Path) -> Callable[[int | None], ServedLog]:
    """Reads a log with a horizon: a, b, c and d are shown to one user at 100, 200, 290 and 310; a is answered after 5
    and after 200 seconds, b 5 seconds before, by a clock that is slow."""
    raw = [str(item) for item in small_data.catalog.ids.raw_ids]
    with SQLiteStore(tmp_path / "events.sqlite") as store:
        for number, (timestamp, answered) in enumerate([(50, None), (105, "a"), (300, "a"), (195, "b")]):
            store.record([UserEvent(str(number), "u", Event(raw[number], 4.0, timestamp), answered)])
        for name, timestamp in (("a", 100), ("b", 200), ("c", 290), ("d", 310)):
            store.log_shown(Shown(name, "u", (raw[9],), (-0.5,), "reinforce", "v", timestamp, 0.5), wait=True)
    return lambda horizon: read_served_log(tmp_path / "events.sqlite", small_data.catalog, horizon)


@pytest.mark.parametrize(
    ("horizon", "answers"),
    [
        (0, [[], [4], [], []]),
        (5, [[2], [4], []]),  # d is the log's end, so its answers may still come
        (20, [[2], [4], []]),
        (21, [[2], [4]]),
        (200, [[2, 3]]),
        (211, []),
    ],
)
def test_an_answer_counts_within_the_horizon(
    dated: Callable[[int | None], ServedLog], horizon: int, answers: list[list[int]]
) -> None:
    log = dated(horizon)
    assert [one.answers.tolist() for one in log.recommendations] == answers
    assert log.skipped.get(STILL_OPEN, 0) == 4 - len(answers)
    assert log.horizon == horizon


def test_a_late_answer_is_history_of_what_is_shown_after_it(dated: Callable[[int | None], ServedLog]) -> None:
    a, b, c, d = dated(0).recommendations
    # What answers b is no history of it, whatever its clock says.
    assert [items_of(one) for one in (a, b, c, d)] == [[1], [1, 2], [1, 2, 4], [1, 2, 4, 3]]


def test_the_horizon_is_by_default_within_which_99_percent_of_the_answers_came(
    dated: Callable[[int | None], ServedLog], small_data: PreparedData, tmp_path: Path
) -> None:
    """Of few answers that is the latest: no answer that was seen is left out. Without one there is nothing to wait
    for."""
    assert dated(None).horizon == 200
    raw = [str(item) for item in small_data.catalog.ids.raw_ids]
    with SQLiteStore(tmp_path / "many.sqlite") as store:
        store.record([UserEvent("before", "u", Event(raw[0], None, START - 1))])
        store.log_shown(Shown("a", "u", (raw[1],), (-0.5,), "reinforce", "v", START, 0.5), wait=True)
        assert read_served_log(tmp_path / "many.sqlite", small_data.catalog).horizon == 0
        delays = [7] * 197 + [1000] * 3  # 98.5 % within 7 seconds
        events = [Event(raw[1], None, START + delay) for delay in delays]
        store.record([UserEvent(str(number), "u", event, "a") for number, event in enumerate(events)])
        assert read_served_log(tmp_path / "many.sqlite", small_data.catalog).horizon == 1000
        store.record([UserEvent(f"more {number}", "u", events[0], "a") for number in range(200)])  # 99.25 %
    log = read_served_log(tmp_path / "many.sqlite", small_data.catalog)
    assert log.horizon == 7
    assert [len(one.answers) for one in log.recommendations] == [397]


def test_the_log_does_not_end_later_than_now(small_data: PreparedData, tmp_path: Path) -> None:
    """A client whose clock is a century ahead does not close what was shown an hour ago."""
    raw, now = [str(item) for item in small_data.catalog.ids.raw_ids], int(time.time())
    with SQLiteStore(tmp_path / "events.sqlite") as store:
        store.record([UserEvent("1", "u", Event(raw[0], None, START))])
        store.record([UserEvent("2", "u", Event(raw[1], None, now + 36_500 * DAY))])
        for name, shown_at in (("a", now - 2 * DAY), ("b", now - HOUR)):
            store.log_shown(Shown(name, "u", (raw[9],), (-0.5,), "reinforce", "v", shown_at, 0.5), wait=True)
    log = read_served_log(tmp_path / "events.sqlite", small_data.catalog, DAY)
    assert (len(log.recommendations), log.skipped) == (1, {STILL_OPEN: 1})


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
    scoring = frozen_scoring(small_hybrid.with_policy(None), reward_tables(small_data))
    graphdef, head = nnx.split(small_hybrid.policy)

    def distance(**changed: object) -> np.ndarray:
        """[users, temperatures, told, excluded]: by how much the furthest slot is not reproduced, nats."""
        shown = [one._replace(**changed) for one in log.recommendations]
        states = log_states(small_hybrid.with_policy(None), shown, small_data.config.rating_scale, scoring.tables)
        found = logged_logprobs(graphdef, nnx.to_pure_dict(head), scoring, states)
        return np.abs(found - states.log_propensities).max(axis=1).reshape(users, 2, 3, 2)

    assert distance().max() <= EXACT / 10
    assert np.median(distance(request_time=None)[:, :, 1:], axis=0).min() > EXACT
    assert np.median(distance(excluded=np.zeros(0, np.int32))[..., 1], axis=0).min() > EXACT
    for at in range(2):
        assert np.median(distance(temperature=TEMPERATURES[1 - at])[:, at], axis=0).min() > EXACT
    past = [one for one in log.recommendations if one.request_time == START + 5 * DAY]
    assert len(past) == 4 * users
    assert all(0 < len(one.history.items) < 12 for one in past)
