import dataclasses
import itertools
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxrec.data.batches import training_windows
from jaxrec.data.events import Events
from jaxrec.data.prepared import PreparedData
from jaxrec.data.schema import UNKNOWN_GAP
from jaxrec.errors import DataError
from jaxrec.models.hybrid import Hybrid
from jaxrec.rl.logged import states as module
from jaxrec.rl.logged.behaviour import Behaviour, BehaviourConfig, Choices, Fit
from jaxrec.rl.logged.states import States, training_states, with_behaviour

ITEM_RATINGS = np.full(1000, 0.5, np.float32)


@pytest.fixture(scope="module")
def hybrid(small_data: PreparedData, random_hybrid: Callable[[PreparedData, int, bool], Hybrid]) -> Hybrid:
    return random_hybrid(small_data, 0, False)


@pytest.fixture(scope="module")
def states(small_data: PreparedData, hybrid: Hybrid) -> States:
    return training_states(hybrid, small_data, ITEM_RATINGS, seed=0)


def test_states_are_all_training_events_but_the_first(small_data: PreparedData, states: States) -> None:
    counts = small_data.split.train_counts
    assert len(states.target) == (counts - 1).sum()
    rows = [small_data.histories.offsets[u] + i for u in range(len(counts)) for i in range(1, counts[u])]
    np.testing.assert_array_equal(np.sort(states.target), np.sort(small_data.histories.items[rows]))
    np.testing.assert_array_equal(np.sort(states.target_rating), np.sort(small_data.unit_ratings()[rows]))


def test_history_is_what_came_before_the_target(small_data: PreparedData, states: States) -> None:
    """A user's 28 training events fit into one window here, so window = user."""
    histories = np.asarray(states.histories(jnp.arange(len(states.target))))
    for row in (0, 5, 26, 27, 300, len(states.target) - 1):
        first, seen = small_data.histories.offsets[states.window[row]], states.seen[row]
        np.testing.assert_array_equal(histories[row, :seen], small_data.histories.items[first : first + seen])
        assert not histories[row, seen:].any()
        assert states.target[row] == small_data.histories.items[first + seen]


@pytest.mark.parametrize("row", [0, 5, 26, 27, 301, 302, 303])
def test_query_is_the_supervised_one_of_the_history_alone(
    small_data: PreparedData, hybrid: Hybrid, states: States, row: int
) -> None:
    """The gap to the target is either known or hidden; nothing of the target itself may reach the query."""
    first, seen = small_data.histories.offsets[states.window[row]], int(states.seen[row])
    history = slice(first, first + seen)
    gaps = small_data.histories.gaps()
    events = Events(
        item=jnp.asarray(small_data.histories.items[history])[None],
        rating=jnp.asarray(small_data.unit_ratings()[history])[None],
        gap=jnp.asarray(gaps[history])[None],
        length=jnp.array([seen]),
    )
    outputs, _ = hybrid.encode(events)
    last = (outputs[0][0, -1], outputs[1][0, -1])
    known, hidden = (hybrid.supervised_query(last, jnp.float32(gap)) for gap in (gaps[first + seen], UNKNOWN_GAP))
    distances = [float(jnp.abs(states.query[row] - query).max()) for query in (known, hidden)]
    assert min(distances) < 1e-5 < max(distances)


def test_request_gap_is_hidden_for_about_half_of_the_states(
    small_data: PreparedData, hybrid: Hybrid, states: States
) -> None:
    timeless = deaf_to_request_time(hybrid)
    same = np.isclose(training_states(timeless, small_data, ITEM_RATINGS, seed=0).query, states.query, atol=1e-6)
    share = same.all(axis=1).mean()
    assert abs(share - 0.5) < 4 * np.sqrt(0.25 / len(states.target))


def deaf_to_request_time(hybrid: Hybrid) -> Hybrid:
    """The same models, deaf to the request time: every gap bucket reads as the unknown one."""
    copy = nnx.clone(hybrid)
    for model in (copy.lstm, copy.content):
        table = model.request_gap.table[...]
        model.request_gap.table[...] = jnp.broadcast_to(table[:1], table.shape)
    return copy


@pytest.mark.parametrize("max_length", [50, 10])  # one window a user, and three
def test_the_behaviour_model_is_evaluated_on_users_that_it_was_not_fitted_to(
    small_data: PreparedData, hybrid: Hybrid, monkeypatch: pytest.MonkeyPatch, max_length: int
) -> None:
    short = nnx.clone(hybrid)
    short.lstm.config = dataclasses.replace(hybrid.lstm.config, max_length=max_length)
    states = training_states(short, small_data, ITEM_RATINGS, seed=0)
    states = states._replace(query=states.user[states.window][:, None].astype(np.float32))  # tells whose row it is
    given: list[list[float]] = []

    def fit(*sides: Choices | int | BehaviourConfig) -> tuple[Behaviour, Fit]:
        given.extend(side.features[:, 0].tolist() for side in sides if isinstance(side, Choices))
        zeros = Behaviour(jnp.zeros((1, 61)), jnp.zeros(61))
        return zeros, Fit(0.0, 0.0, 0.0, 0.0, 0)

    monkeypatch.setattr(module, "fit_behaviour", fit)
    with_behaviour(states, 60, seed=0)
    fitted, held_out = given
    assert len(fitted) + len(held_out) == len(states.target)
    assert len(set(fitted)) == 36
    assert len(set(held_out)) == 4
    assert set(fitted).isdisjoint(held_out)
    assert len([1 for a, b in itertools.pairwise(held_out) if a != b]) == 3  # each user's rows one after the other


def test_one_user_does_not_make_a_behaviour_model(states: States) -> None:
    with pytest.raises(DataError, match="only one user has two training events"):
        with_behaviour(states._replace(user=np.zeros_like(states.user)), 60, seed=0)


def test_limit_keeps_the_most_recent_windows(small_data: PreparedData, hybrid: Hybrid) -> None:
    short = nnx.clone(hybrid)
    short.lstm.config = dataclasses.replace(hybrid.lstm.config, max_length=10)
    users, _, _ = training_windows(small_data.split.train_counts, 10)
    newest = 10 * len(np.unique(users))
    states = training_states(short, small_data, ITEM_RATINGS, seed=0, limit=newest)
    assert len(states.target) == newest
    last = small_data.histories.offsets[:-1] + small_data.split.train_counts
    rows = np.concatenate([np.arange(stop - 10, stop) for stop in last])
    np.testing.assert_array_equal(states.target, small_data.histories.items[rows])
    assert len(training_states(short, small_data, ITEM_RATINGS, seed=0, limit=55).target) == 50
