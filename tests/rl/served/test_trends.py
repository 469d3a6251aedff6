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
from jaxrec.data.schema import GENRES, ITEM, TITLE
from jaxrec.data.trend import HALF_LIVES_S
from jaxrec.models.hybrid import Hybrid
from jaxrec.models.trend import Trend
from jaxrec.onnx.model_directory import export_model
from jaxrec.rl.reward_tables import fit_reward_tables
from jaxrec.rl.scoring import Scoring, frozen_scoring
from jaxrec.rl.served.event_store import read_served_log
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
from serve.stores.sqlite import SQLiteStore
from tests.serve.one_model import one_model
from tests.synthetic import random_log

HOUR, ROUNDS, USERS = 3600, 4, 6


def arrived(*events: tuple[int, int, int]) -> ArrivedEvents:
    """Item, time and arrival of each."""
    return ArrivedEvents(*np.array(events, np.int64).reshape(-1, 3).T)


def last_time(data: PreparedData) -> int:
    return int(np.asarray(data.histories.times).max())


def simply_counted(data: PreparedData, events: ArrivedEvents, moment: Moment) -> np.ndarray:
    """[half-lives, items + 1]: one event after the other."""
    counts, end = np.zeros((len(HALF_LIVES_S), len(data.catalog) + 1)), last_time(data)
    own = zip(np.asarray(data.histories.items).tolist(), np.asarray(data.histories.times).tolist(), strict=True)
    later = [(item, at) for item, at, arrival in zip(*events, strict=True) if arrival <= moment.arrival and at > end]
    for item, at in [*own, *later]:
        counts[:, item] += 0.5 ** (max(moment.time - at, 0) / np.array(HALF_LIVES_S))
    return counts


def test_counts_are_those_of_the_run_and_of_what_arrived_later(small_data: PreparedData, small_hybrid: Hybrid) -> None:
    end = last_time(small_data)
    events = arrived(
        (3, end + HOUR, 1),
        (4, end, 2),  # in the run's data, and imported
        (5, end + 2 * HOUR, 5),
        (3, end + 1.5 * HOUR, 6),
        (7, end + 3 * HOUR, 9),
    )
    # Of two servers, the second one is a few seconds behind; and the order of the moments does not matter.
    moments = [
        Moment(end + 4 * HOUR, 9),
        Moment(end + 2 * HOUR + 5, 6),
        Moment(end + 2 * HOUR + 2, 6),
        Moment(end + HOUR, 0),
    ]
    trends = served_trends(small_hybrid, small_data, moments, events)
    assert not trends.at(np.array([0])).any()
    for number, moment in enumerate(moments, start=1):
        expected = small_hybrid.trend(simply_counted(small_data, events, moment).astype(np.float32))
        np.testing.assert_allclose(trends.at(np.array([number]))[0], expected, rtol=2e-4, atol=1e-5)


def test_an_event_dated_ahead_counts_as_of_when_it_arrived(small_data: PreparedData, small_hybrid: Hybrid) -> None:
    end = last_time(small_data)
    moments = [Moment(end + HOUR, 1), Moment(end + 2 * HOUR, 1)]
    ahead, true = (
        served_trends(small_hybrid, small_data, moments, arrived((3, end + hours * HOUR, 1))) for hours in (9, 1)
    )
    np.testing.assert_array_equal(ahead.values, true.values)


def test_moments_share_a_trend_where_memory_is_short(small_data: PreparedData, small_hybrid: Hybrid) -> None:
    end, width = last_time(small_data), 4 * (len(small_data.catalog) + 1)
    events = arrived(*((1 + at, end + at, at) for at in range(1, 9)))
    moments = [Moment(end + at * HOUR, at) for at in range(1, 9)]
    every = served_trends(small_hybrid, small_data, moments, events, most_bytes=8 * width)
    assert every.of_moment.tolist() == list(range(9))
    some = served_trends(small_hybrid, small_data, moments, events, most_bytes=3 * width)
    assert some.of_moment.tolist() == [0, 1, 1, 1, 2, 2, 2, 3, 3]
    np.testing.assert_array_equal(np.asarray(some.values)[1:], np.asarray(every.values)[[1, 4, 7]])


@pytest.mark.parametrize("moments", [[], [Moment(2_000_000_000, 1)]])
def test_without_a_trend_nothing_is_added(
    moments: list[Moment], small_data: PreparedData, small_hybrid: Hybrid
) -> None:
    """Because the log notes none, or because the mix has none."""
    models = small_hybrid.lstm, small_hybrid.content, small_hybrid.cooccurrence
    hybrid = Hybrid(*models, small_hybrid.mix_weights(), Trend.none()) if moments else small_hybrid
    trends = served_trends(hybrid, small_data, moments, arrived((1, 1_999_999_999, 1)))
    assert np.asarray(trends.values).shape == (1, len(small_data.catalog) + 1)
    assert not trends.at(np.arange(len(moments) + 1)).any()


@pytest.mark.parametrize("with_new_items", [False, True])
def test_the_trend_of_a_real_server_is_reproduced(
    with_new_items: bool, random_hybrid: Callable[[PreparedData, int, bool], Hybrid], tmp_path: Path
) -> None:
    """Whose counts grow between its answers, a day apart; and its cap of new items, some of which get events."""
    log = random_log(users=30, items=40, max_events=40, seed=0)
    movies = pd.DataFrame({ITEM: range(1, 61), TITLE: "A movie", GENRES: ["Drama", "Comedy", "Drama|Comedy"] * 20})
    data = prepare(log, movies, PrepareConfig(1, 0, rating_scale=RatingScale(0.5, 5.0)))
    small_hybrid = random_hybrid(data, 1, True)
    new = data.train_popularity() == 0 if with_new_items else None
    models = small_hybrid.lstm, small_hybrid.content, small_hybrid.cooccurrence
    trend = Trend(small_hybrid.trend.weights[...], np.full(len(HALF_LIVES_S), 5.0))
    hybrid = Hybrid(*models, small_hybrid.mix_weights(), trend, small_hybrid.policy, new)
    export_model(hybrid, data, tmp_path / "model", training={}, metrics={}, licence="Synthetic.")
    model, raw = Recommender(read_artifact(tmp_path / "model"), "cpu"), data.catalog.ids.raw_ids.astype(str)
    rng, now, path = np.random.default_rng(0), int(time.time()), tmp_path / "events.sqlite"
    start = now - ROUNDS * 24 * HOUR
    clock = [float(start)]
    with SQLiteStore(path) as store:
        refresher = TrendRefresher(store, refresh_s=24 * HOUR, clock=lambda: clock[0])
        refresher.prepare(model)
        refresher.keep([model])
        server = create_server(one_model(model, store, exploration=Exploration(1.0, seed=1)), store, "127.0.0.1:0")
        server.start()
        with RecommenderClient(f"127.0.0.1:{server.port}", timeout_s=30.0) as client:
            for day in range(ROUNDS):
                items, before = rng.choice(raw[:50], 3 * USERS), rng.integers(1, 24 * HOUR, 3 * USERS)
                # Other users each day: an event that comes late would be history of what was shown before it came.
                store.record(
                    [
                        UserEvent(f"{day}-{at}", f"{day}-{at % USERS}", Event(item, 3.0, start + day * 24 * HOUR - ago))
                        for at, (item, ago) in enumerate(zip(items.tolist(), before.tolist(), strict=True))
                    ]
                )
                clock[0] = start + day * 24 * HOUR + 100.5
                refresher.refresh()
                for user in range(USERS):
                    client.recommend(user_id=f"{day}-{user}", k=3)
        server.drain()
        refresher.close()
    served = read_served_log(path, data.catalog, 0)
    assert len(served.recommendations) == ROUNDS * USERS
    assert [moment.time for moment in sorted(served.moments)] == [
        start + day * 24 * HOUR + 100 for day in range(ROUNDS)
    ]

    supervised, (graphdef, head) = hybrid.with_policy(None), nnx.split(hybrid.policy)
    tables, scale = fit_reward_tables(data), data.config.rating_scale
    states = served_states(supervised, served.recommendations, scale, tables)
    trends = served_trends(supervised, data, served.moments, served.events)
    scoring = frozen_scoring(supervised, tables)._replace(trends=trends)

    def distances(scoring: Scoring) -> np.ndarray:
        """[recommendations]: by how much the furthest slot is not reproduced, nats."""
        found = logged_logprobs(graphdef, nnx.to_pure_dict(head), scoring, states)
        return np.abs(found - states.log_propensities).max(axis=1)

    assert distances(scoring).max() < EXACT
    assert np.median(distances(scoring._replace(trends=None))) > EXACT
    if with_new_items:
        assert np.median(distances(scoring._replace(new_items=None))) > EXACT
