"""The trends of a server's recommendations, computed again from the events that it had counted."""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from flax import nnx

from jaxrec.config import PrepareConfig, RatingScale
from jaxrec.data.prepare import prepare
from jaxrec.data.prepared import PreparedData
from jaxrec.data.schema import GENRES, ITEM, TIME, TITLE
from jaxrec.data.trend import HALF_LIVES_S
from jaxrec.models.hybrid import Hybrid
from jaxrec.models.trend import Trend
from jaxrec.onnx.model_directory import export_model
from jaxrec.rl.reward_tables import fit_reward_tables
from jaxrec.rl.scoring import Scoring, frozen_scoring
from jaxrec.rl.served.event_store import read_arrived_events, read_served_log
from jaxrec.rl.served.policy import EXACT, logged_logprobs
from jaxrec.rl.served.states import served_states
from jaxrec.rl.served.trends import ArrivedEvents, Moment, served_trends
from serve.client import RecommenderClient
from serve.front.server import create_server
from serve.model.directory import read_artifact
from serve.model.events import Event
from serve.model.exploration import Exploration
from serve.model.recommender import Recommender
from serve.serving.trend import TrendRefresher
from serve.stores.base import UserEvent
from serve.stores.sqlite.store import SQLiteStore
from tests.serve.one_model import one_model
from tests.synthetic import random_log

HOUR, DAY, DAYS, USERS = 3600, 86_400, 4, 6


def arrived(*events: tuple[int, int, int]) -> ArrivedEvents:
    """Item, time and arrival of each."""
    return ArrivedEvents(*np.array(events, np.int64).reshape(-1, 3).T)


def last_time(data: PreparedData) -> int:
    return int(np.asarray(data.histories.times).max())


def simply_counted(data: PreparedData, events: ArrivedEvents, moment: Moment, until: int) -> np.ndarray:
    """[half-lives, items + 1]: one event after the other; those of the run count up to `until`."""
    counts = np.zeros((len(HALF_LIVES_S), len(data.catalog) + 1))
    own = zip(np.asarray(data.histories.items).tolist(), np.asarray(data.histories.times).tolist(), strict=True)
    arrived = zip(*(column.tolist() for column in events), strict=True)
    later = [(item, at) for item, at, arrival in arrived if arrival <= (moment.arrival or 0) and at > until]
    for item, at in [*((item, at) for item, at in own if at <= until), *later]:
        counts[:, item] += 0.5 ** (max(moment.time - at, 0) / np.array(HALF_LIVES_S))
    return counts


@pytest.mark.parametrize("days_before", [0, 40])
def test_counts_are_those_that_the_server_began_with_and_of_what_arrived_later(
    days_before: int, small_data: PreparedData, small_hybrid: Hybrid
) -> None:
    """Of a server that began with the run itself, and of one that began with an earlier model, long before the run's
    last event; then the store has events of the run's data, too."""
    begun = last_time(small_data) - days_before * DAY
    events = arrived(
        (3, begun + HOUR, 1),
        (4, begun, 2),  # in the run's data, and imported
        (5, begun + 2 * HOUR, 5),
        (3, begun + 90 * 60, 6),
        (7, begun + 3 * HOUR, 9),
    )
    # The order of the moments does not matter.
    moments = [Moment(begun + 4 * HOUR, 9), Moment(begun + 2 * HOUR + 5, 6), Moment(begun + HOUR, 0)]
    trends, seconds = served_trends(small_hybrid, small_data, moments, events, begun)
    assert seconds == 0
    assert not trends.at(np.array([0])).any()
    for number, moment in enumerate(moments, start=1):
        counts = simply_counted(small_data, events, moment, begun).astype(np.float32)
        np.testing.assert_allclose(trends.at(np.array([number]))[0], small_hybrid.trend(counts), rtol=2e-4, atol=1e-5)


def test_without_the_store_the_counts_are_those_of_the_run(small_data: PreparedData, small_hybrid: Hybrid) -> None:
    """All of them, though the store began with fewer; with the store, each count is the larger one."""
    end = last_time(small_data)
    moments, events = [Moment(end + HOUR, 1), Moment(end + HOUR, None)], arrived((3, end + 1, 1))
    trends, _ = served_trends(small_hybrid, small_data, moments, events, end - DAY)
    stored, exported = (
        simply_counted(small_data, events, moment, until).astype(np.float32)
        for moment, until in zip(moments, (end - DAY, end), strict=True)
    )
    assert (stored > exported).any()
    assert (stored < exported).any()
    for number, counts in enumerate((np.maximum(stored, exported), exported), start=1):
        np.testing.assert_allclose(trends.at(np.array([number]))[0], small_hybrid.trend(counts), rtol=2e-4, atol=1e-5)


def test_of_two_servers_one_is_behind(small_data: PreparedData, small_hybrid: Hybrid) -> None:
    """It counted one event more and is two seconds before the other: it gets the counts of the other's second."""
    end = last_time(small_data)
    events = arrived((3, end + 1, 1), (4, end + 2, 2))
    behind, same = (
        served_trends(small_hybrid, small_data, [Moment(end + 10, 1), Moment(end + at, 2)], events, end)[0]
        for at in (8, 10)
    )
    np.testing.assert_allclose(behind.values[-1], same.values[-1], rtol=1e-4)


def test_an_event_dated_ahead_counts_as_of_when_it_arrived(small_data: PreparedData, small_hybrid: Hybrid) -> None:
    end = last_time(small_data)
    moments = [Moment(end + HOUR, 1), Moment(end + 2 * HOUR, 1)]
    ahead, true = (
        served_trends(small_hybrid, small_data, moments, arrived((3, end + hours * HOUR, 1)), end)[0]
        for hours in (9, 1)
    )
    np.testing.assert_array_equal(ahead.values, true.values)


def test_moments_share_a_trend_where_memory_is_short(small_data: PreparedData, small_hybrid: Hybrid) -> None:
    """Those of the same four seconds; a quiet night between two moments does not put them together."""
    end, width = 4 * (last_time(small_data) // 4 + 1), 4 * (len(small_data.catalog) + 1)
    events = arrived(*((1 + at, end - at, at) for at in range(1, 7)))
    times = [end, end + 1, end + 3, end + 4, end + 7, end + 10 * HOUR]
    moments = [Moment(time, at) for at, time in enumerate(times, start=1)]
    every, seconds = served_trends(small_hybrid, small_data, moments, events, end - 9, most_bytes=6 * width)
    assert (every.of_moment.tolist(), seconds) == ([0, 1, 2, 3, 4, 5, 6], 0)
    some, seconds = served_trends(small_hybrid, small_data, moments, events, end - 9, most_bytes=3 * width)
    assert (some.of_moment.tolist(), seconds) == ([0, 1, 1, 1, 2, 2, 3], 4)
    np.testing.assert_array_equal(np.asarray(some.values)[1:], np.asarray(every.values)[[1, 4, 6]])
    # At least two, with and without the store, however little the memory.
    one, _ = served_trends(small_hybrid, small_data, moments[:3], events, end - 9, most_bytes=1)
    assert one.of_moment.tolist() == [0, 1, 1, 2]


@pytest.mark.parametrize("with_new_items", [False, True])
def test_the_trend_of_a_real_server_is_reproduced(
    with_new_items: bool, random_hybrid: Callable[[PreparedData, int, bool], Hybrid], tmp_path: Path
) -> None:
    """Whose counts grow between its answers, a day apart, and its cap of new items, some of which get events. Its first
    answers are from before it reads its store."""
    start = int(time.time()) - DAYS * DAY
    log = random_log(users=30, items=40, max_events=40, seed=0)
    log[TIME] += start - 36 * HOUR - log[TIME].max()
    movies = pd.DataFrame({ITEM: range(1, 61), TITLE: "A movie", GENRES: ["Drama", "Comedy", "Drama|Comedy"] * 20})
    data = prepare(log, movies, PrepareConfig(1, 0, rating_scale=RatingScale(0.5, 5.0)))
    small_hybrid = random_hybrid(data, 1, True)
    new = data.train_popularity() == 0 if with_new_items else None
    models = small_hybrid.lstm, small_hybrid.content, small_hybrid.cooccurrence
    trend = Trend(small_hybrid.trend.weights[...], np.full(len(HALF_LIVES_S), 5.0))
    hybrid = Hybrid(*models, small_hybrid.mix_weights(), trend, small_hybrid.policy, new)
    export_model(hybrid, data, tmp_path / "model", training={}, metrics={}, licence="Synthetic.")
    model, raw = Recommender(read_artifact(tmp_path / "model"), "cpu"), data.catalog.ids.raw_ids.astype(str)
    rng, path, clock = np.random.default_rng(0), tmp_path / "events.sqlite", [start + 0.5]
    with SQLiteStore(path) as store:
        refreshers = [TrendRefresher(of, refresh_s=DAY, clock=lambda: clock[0]) for of in (None, store)]
        server = create_server(one_model(model, store, exploration=Exploration(1.0, seed=1)), store, "127.0.0.1:0")
        server.start()
        with RecommenderClient(f"127.0.0.1:{server.port}", timeout_s=30.0) as client:
            for day in range(DAYS):
                items, before = rng.choice(raw[:50], 3 * USERS), rng.integers(1, DAY, 3 * USERS)
                # Other users each day: an event that comes late would be history of what was shown before it came.
                store.record(
                    [
                        UserEvent(f"{day}-{at}", f"{day}-{at % USERS}", Event(item, 3.0, start + day * DAY - ago))
                        for at, (item, ago) in enumerate(zip(items.tolist(), before.tolist(), strict=True))
                    ]
                )
                clock[0] = start + day * DAY + 100.5
                refreshers[min(day, 1)].prepare(model)
                for user in range(USERS):
                    client.recommend(user_id=f"{day}-{user}", k=3)
        server.drain()
    served = read_served_log(path, data.catalog, 0)
    assert len(served.recommendations) == DAYS * USERS
    arrivals = {start + day * DAY + 100: 3 * USERS * (day + 1) for day in range(DAYS)}
    assert dict(served.moments) == {**arrivals, start + 100: None}

    supervised, (graphdef, head) = hybrid.with_policy(None), nnx.split(hybrid.policy)
    tables, scale = fit_reward_tables(data), data.config.rating_scale
    trends = served_trends(supervised, data, served.moments, *read_arrived_events(path, data.catalog))[0]
    scoring = frozen_scoring(supervised, tables)._replace(trends=trends)
    states = served_states(supervised, served.recommendations, scale, scoring)

    def distances(scoring: Scoring) -> np.ndarray:
        """[recommendations]: by how much the furthest slot is not reproduced, nats."""
        found = logged_logprobs(graphdef, nnx.to_pure_dict(head), scoring, states)
        return np.abs(found - states.log_propensities).max(axis=1)

    assert distances(scoring).max() < EXACT
    without = distances(scoring._replace(trends=None))
    assert all(np.median(without[states.moment == moment]) > EXACT for moment in range(1, DAYS + 1))
    if with_new_items:
        assert np.median(distances(scoring._replace(new_items=None))) > EXACT
