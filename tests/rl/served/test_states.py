"""Histories of a server's log as the models read them, however they are padded."""

import numpy as np
import pytest

from jaxrec.data.events import Events
from jaxrec.data.prepared import PreparedData
from jaxrec.models.hybrid import Hybrid
from jaxrec.rl.reward_tables import fit_reward_tables
from jaxrec.rl.scoring import frozen_scoring
from jaxrec.rl.served import states as module
from jaxrec.rl.served.recommendations import History, Recommendation
from jaxrec.rl.served.states import HISTORIES_PER_BATCH, ServedStates, served_states

MAX_LENGTH = 50


def recommendation(user: int, events: int) -> Recommendation:
    rng = np.random.default_rng(user)
    items, times = rng.integers(1, 61, events), np.sort(rng.integers(0, 10**6, events))
    return Recommendation(
        user=user,
        time=10**6,
        history=History(items, rng.integers(1, 11, events) / 2, times),
        slate=np.array([1, 2], np.int32),
        log_propensities=np.array([-1.0, -2.0]),
        responses=np.zeros(0, np.int32),
        response_ratings=np.zeros(0, np.float32),
        response_weights=np.zeros(0, np.float32),
        version=0,
        temperature=1.0,
        answered=2,
        request_time=None if user % 2 else 10**6,
        excluded=np.zeros(0, np.int32),
    )


def states(hybrid: Hybrid, data: PreparedData, recommendations: list[Recommendation]) -> ServedStates:
    supervised = hybrid.with_policy(None)
    scoring = frozen_scoring(supervised, fit_reward_tables(data))
    return served_states(supervised, recommendations, data.config.rating_scale, scoring)


def test_padding_and_order_change_nothing(
    small_hybrid: Hybrid, small_data: PreparedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Histories of 1 to 70 events in no order, of which the models read 50: the same as where each is padded to 50."""
    lengths = np.random.default_rng(0).permutation(np.tile(np.arange(1, 71), 3))
    recommendations = [recommendation(user, length) for user, length in enumerate(lengths.tolist())]
    read: list[tuple[int, ...]] = []
    encode = module.encode_histories

    def reading(graphdef: object, variables: object, events: Events) -> object:
        read.append(events.item.shape)
        return encode(graphdef, variables, events)

    monkeypatch.setattr(module, "encode_histories", reading)
    compiled = encode._cache_size()
    found = states(small_hybrid, small_data, recommendations)
    assert encode._cache_size() <= compiled + 2  # lengths
    # 64, 64, 64 and 18 rows, the shortest of 70 lengths first: to 22, to 43, to 64 and to 70 events.
    assert read == [(HISTORIES_PER_BATCH, length) for length in (32, 50, 50, 50)]
    monkeypatch.setattr(module, "SHORTEST", MAX_LENGTH)
    padded = states(small_hybrid, small_data, recommendations)
    assert set(read[4:]) == {(HISTORIES_PER_BATCH, MAX_LENGTH)}
    np.testing.assert_allclose(found.state.query, padded.state.query, atol=1e-6)
    np.testing.assert_array_equal(found.state.recent, padded.state.recent)
    assert found.user.tolist() == list(range(len(lengths)))
    for one in (0, 100, len(lengths) - 1):
        np.testing.assert_array_equal(found.state.recent[one, 0], recommendations[one].history.items[-1])
        alone = states(small_hybrid, small_data, [recommendations[one]])
        np.testing.assert_allclose(alone.state.query[0], found.state.query[one], atol=1e-6)


def test_short_histories_are_padded_to_a_power_of_two(
    small_hybrid: Hybrid, small_data: PreparedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths, encode = [], module.encode_histories

    def reading(graphdef: object, variables: object, events: Events) -> object:
        lengths.append(events.item.shape[1])
        return encode(graphdef, variables, events)

    monkeypatch.setattr(module, "encode_histories", reading)
    for events in (1, 8, 9, 16, 17, 40, 70):
        states(small_hybrid, small_data, [recommendation(1, events)])
    assert lengths == [8, 8, 16, 16, 32, 50, 50]


def test_slates_are_as_wide_as_the_longest_answer(small_hybrid: Hybrid, small_data: PreparedData) -> None:
    """Also if fewer items of it were shown."""
    found = states(small_hybrid, small_data, [recommendation(0, 5)._replace(answered=5), recommendation(1, 5)])
    assert found.answered.tolist() == [5, 2]
    assert found.slate.tolist() == [[1, 2, 0, 0, 0]] * 2


def test_a_response_earns_the_weight_of_its_event(small_hybrid: Hybrid, small_data: PreparedData) -> None:
    """The best one of an item that was chosen several times; other terms have no weight."""
    chosen = recommendation(0, 5)._replace(
        responses=np.array([2, 1, 2], np.int32),
        response_ratings=np.full(3, np.nan, np.float32),
        response_weights=np.array([1.0, 0.5, 4.0], np.float32),
    )
    usual = chosen._replace(response_weights=np.ones(3, np.float32))
    terms, of_usual = (states(small_hybrid, small_data, [one]).terms for one in (chosen, usual))
    assert terms.hit.tolist() == [[0.5, 4.0]]
    assert of_usual.hit.tolist() == [[1.0, 1.0]]
    for name in ("genre", "rating", "centred_rating", "novelty", "diversity"):
        np.testing.assert_array_equal(getattr(terms, name), getattr(of_usual, name))
