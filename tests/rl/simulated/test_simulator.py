"""The simulated users by hand, their fit, and that they are not the recommender's."""

import tracemalloc
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench.environment_policy import new_policy
from jaxrec.config import RatingScale
from jaxrec.data.histories import Histories
from jaxrec.data.prepared import PreparedData
from jaxrec.data.schema import USER
from jaxrec.errors import DataError
from jaxrec.models.masks import NEVER
from jaxrec.rl.config import SimulatedConfig
from jaxrec.rl.simulated import fit as module
from jaxrec.rl.simulated.fit import (
    ChoiceFeatures,
    SimulatorFit,
    _choice_features,
    ease,
    fit_choice,
    fit_simulator,
    profiles,
    shrunk_cosine,
    simulator_histories,
)
from jaxrec.rl.simulated.train import train_simulated
from jaxrec.rl.simulated.users import (
    TASTE_EVENTS,
    choice_logprobs,
    expected_rating,
    rate,
    simulator_environment,
    start_user,
    step,
    utilities,
)
from tests.rl.simulated.simulated import FIRST_USER, genre_lovers, hand_made


@pytest.fixture(scope="module")
def histories(small_data: PreparedData) -> Histories:
    return simulator_histories(genre_lovers(small_data), small_data.catalog, small_data.users)[0]


@pytest.fixture(scope="module")
def fit(small_data: PreparedData, histories: Histories) -> SimulatorFit:
    return fit_simulator(histories, small_data.catalog.genre_matrix(), RatingScale(0.5, 5.0), 0.5, start_events=6)


def test_utilities_by_hand() -> None:
    """The last item is 4, the one before 1; half of the last genres are those of items 1 and 2."""
    params = hand_made()
    state, _ = start_user(params, jnp.int32(0))
    u = np.asarray(utilities(params, state.recent, state.taken))
    assert u[2] == pytest.approx(2 * (0.5 * 0.5) + 0.1 * 2 - 0.3 * 0.5)
    assert u[3] == pytest.approx(2 * (1.0 + 0.5 * 0.25) + 0.1 * 3 - 0.3 * 0.5)
    assert (u[[0, 1, 4]] == NEVER).all()


def test_choice_by_hand() -> None:
    params = hand_made()
    u = jnp.array([NEVER, 0.0, 0.5, 1.0, -1.0])
    p = np.exp(choice_logprobs(params, u, jnp.array([3, 1])))
    first, second, rest = 3 * np.exp(1.0), 3 * 0.5 * np.exp(0.0), np.exp(0.5) + np.exp(-1.0)
    np.testing.assert_allclose(p, np.array([first, second, rest]) / (first + second + rest), rtol=1e-5)


def test_repeated_items_and_items_of_the_history_are_not_chosen() -> None:
    u = jnp.array([NEVER, 0.0, NEVER, 1.0, -1.0])
    p = np.exp(choice_logprobs(hand_made(), u, jnp.array([3, 3, 2])))
    assert p[1] == p[2] == 0.0
    first, rest = 3 * np.exp(1.0), np.exp(0.0) + np.exp(-1.0)
    assert p[0] == pytest.approx(first / (first + rest), rel=1e-5)


def test_a_user_whose_history_holds_every_item_chooses_nothing() -> None:
    params, slate = hand_made(), jnp.array([3, 0, 2])
    p = np.exp(choice_logprobs(params, jnp.full(5, NEVER), slate))
    np.testing.assert_array_equal(p, [0.0, 0.0, 0.0, 1.0])
    state, _ = start_user(params, jnp.int32(0))
    state = state._replace(taken=jnp.arange(5) > 0)
    for seed in range(4):
        new, seen, reward, _ = step(params, state, slate, jax.random.key(seed))
        assert (int(seen.slot), float(reward)) == (-1, 0.0)
        np.testing.assert_array_equal(new.recent, state.recent)


def test_only_recommendable_items_count_as_covered() -> None:
    """Two of four items are left for slates of three."""
    environment, config = simulator_environment(hand_made(), 3), SimulatedConfig(users=4, steps=2, updates=1)
    _, records = train_simulated(environment, new_policy(environment, hidden=4), config)
    assert records[0]["coverage"] == 0.5


def test_rating_by_hand() -> None:
    params, key = hand_made(), jax.random.key(0)
    assert float(expected_rating(params, jnp.int32(0), jnp.int32(3))) == pytest.approx(3.0 + 0.25 - 0.5 + 0.5 * 3.0)
    assert float(rate(params, jnp.int32(0), jnp.int32(2), key)) == 4.0  # 4.25, to a whole star
    assert float(rate(params, jnp.int32(0), jnp.int32(4), key)) == 5.0  # 7.75, to the scale's end


def test_step_chooses_at_most_one_item_and_remembers_it() -> None:
    params = hand_made()
    state, _ = start_user(params, jnp.int32(0))
    keys = jax.random.split(jax.random.key(1), 3000)
    new, seen, reward, _ = jax.vmap(lambda key: step(params, state, jnp.array([3, 2]), key))(keys)
    slot = np.asarray(seen.slot)
    u = utilities(params, state.recent, state.taken)
    expected = np.exp(choice_logprobs(params, u, jnp.array([3, 2])))
    shares = np.bincount(np.where(slot < 0, 2, slot), minlength=3) / 3000
    np.testing.assert_allclose(shares, expected, atol=4 * 0.5 / np.sqrt(3000))
    first = slot == 0
    np.testing.assert_array_equal(np.asarray(new.recent)[first, :3], np.broadcast_to([3, 4, 1], (first.sum(), 3)))
    np.testing.assert_array_equal(
        np.asarray(new.recent)[slot < 0], np.broadcast_to(state.recent, ((slot < 0).sum(), TASTE_EVENTS))
    )
    assert np.asarray(new.taken)[first][:, 3].all()
    assert not np.asarray(new.taken)[:, 0].any()
    # 4.25 stars: 4 of 1..5, which is 0.75.
    np.testing.assert_allclose(np.asarray(reward)[first], 0.5 + 0.5 * 0.75)
    assert (np.asarray(reward)[slot < 0] == 0).all()


def test_ease_is_the_constrained_ridge_regression(histories: Histories) -> None:
    """Each column solves min |X_j - X b|^2 + λ |b|^2 with b_j = 0 (Steck 2019, equation 3)."""
    items, users = 60, np.arange(histories.user_count)
    b = ease(histories, users, items)
    assert (b[0] == 0).all()
    assert (b[:, 0] == 0).all()
    assert (np.diag(b) == 0).all()
    x = np.zeros((histories.user_count, items))
    x[histories.users(), histories.items - 1] = 1
    j = 7
    others = np.delete(np.arange(items), j)
    solved = np.linalg.solve(x[:, others].T @ x[:, others] + 100 * np.eye(items - 1), x[:, others].T @ x[:, j])
    np.testing.assert_allclose(b[1 + others, 1 + j], solved, atol=1e-5)


def test_shrunk_cosine_by_hand() -> None:
    """Of three users two count; both took items 1 and 2, one of them item 3."""
    items = np.array([1, 2, 1, 2, 3, 3, 4], np.int32)
    histories = Histories(np.array([0, 2, 5, 7]), items, np.ones(7, np.float32), np.arange(7))
    s = shrunk_cosine(histories, np.array([0, 1]), 4)
    expected = np.zeros((5, 5))
    expected[1, 2] = expected[2, 1] = 2 / (np.sqrt(2 * 2) + 10)
    expected[1, 3] = expected[3, 1] = expected[2, 3] = expected[3, 2] = 1 / (np.sqrt(2 * 1) + 10)
    np.testing.assert_allclose(s, expected, rtol=1e-6)


def test_shrunk_cosine_keeps_the_nearest(histories: Histories, monkeypatch: pytest.MonkeyPatch) -> None:
    users = np.arange(histories.user_count)
    everything = shrunk_cosine(histories, users, 60)
    monkeypatch.setattr("jaxrec.rl.simulated.fit.TASTE_NEIGHBOURS", 5)
    nearest = shrunk_cosine(histories, users, 60)
    for item in (1, 30, 60):
        kept = nearest[:, item] > 0
        assert kept.sum() >= 5
        np.testing.assert_array_equal(nearest[kept, item], everything[kept, item])
        assert everything[~kept, item].max() < nearest[kept, item].min()


def test_other_taste_models_make_other_users(small_data: PreparedData, histories: Histories) -> None:
    matrix, scale = small_data.catalog.genre_matrix(), RatingScale(0.5, 5.0)
    fitted = fit_simulator(histories, matrix, scale, 0.5, start_events=6, item_item=shrunk_cosine)
    assert fitted.nats < fitted.uniform_nats - 0.02
    assert float(fitted.params.item_item.min()) == 0.0  # EASE's has negative entries


def test_fits_users_who_were_left_out(fit: SimulatorFit) -> None:
    assert fit.nats < fit.popularity_nats
    assert fit.nats < fit.uniform_nats - 0.02
    assert fit.rating_rmse < 0.8 * fit.mean_rating_rmse


def test_same_seed_same_simulator(fit: SimulatorFit, small_data: PreparedData, histories: Histories) -> None:
    again = fit_simulator(histories, small_data.catalog.genre_matrix(), RatingScale(0.5, 5.0), 0.5, start_events=6)
    for first, second in zip(fit.params, again.params, strict=True):
        np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("item_item", [ease, shrunk_cosine])
def test_a_fit_in_chunks_is_that_of_all_at_once(
    small_data: PreparedData, histories: Histories, monkeypatch: pytest.MonkeyPatch, item_item: module.ItemItem
) -> None:
    """Of three cases, or of three columns of the cosine, at a time: 61 values each."""
    matrix, fits = small_data.catalog.genre_matrix(), []
    for values in (2**22, 3 * 61):
        monkeypatch.setattr(module, "VALUES_AT_A_TIME", values)
        fits.append(fit_simulator(histories, matrix, RatingScale(0.5, 5.0), 0.5, start_events=6, item_item=item_item))
    whole, chunked = fits
    for name, value in whole.params._asdict().items():
        np.testing.assert_allclose(getattr(chunked.params, name), value, rtol=1e-3, atol=1e-5, err_msg=name)
    for figure in ("nats", "popularity_nats", "ndcg_10", "popularity_ndcg_10"):
        assert getattr(chunked, figure) == pytest.approx(getattr(whole, figure), rel=1e-5)


def choice_cases(items: int, count: int) -> tuple[module.ChoiceCases, Callable[[module.ChoiceCases], ChoiceFeatures]]:
    """Histories of 20 items and the next one at random, and what gives their features."""
    rng = np.random.default_rng(0)
    events = [rng.choice(items, 21, replace=False).astype(np.int32) + 1 for _ in range(count)]
    tables = {
        "item_item": rng.normal(size=(items + 1, items + 1)).astype(np.float32),
        "log_popularity": rng.normal(size=items + 1).astype(np.float32),
        "directions": rng.normal(size=(items + 1, 4)).astype(np.float32),
    }
    return [(of_case[:20], int(of_case[20])) for of_case in events], partial(_choice_features, decay=0.9, **tables)


def test_choice_is_the_maximum_likelihood() -> None:
    """The mean features of what was chosen are those that the model expects, which no other coefficients do."""
    cases, features_of = choice_cases(items=40, count=30)
    coefficients, nats = fit_choice(cases, features_of, 40, np.zeros(3))
    values, candidates = features_of(cases)
    chances = np.where(candidates, np.exp(np.tensordot(coefficients, values, axes=1)), 0.0)
    chances /= chances.sum(axis=1, keepdims=True)
    rows, targets = np.arange(30), [target for _, target in cases]
    np.testing.assert_allclose(
        (chances * values).sum(axis=2).mean(axis=1), values[:, rows, targets].mean(axis=1), atol=1e-4
    )
    assert nats == pytest.approx(-np.log(chances[rows, targets]).mean(), rel=1e-5)
    assert nats < np.log(20)


def test_memory_of_the_choice_does_not_grow_with_the_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    """Features of 800 cases and 201 items would take 1.9 MB."""
    monkeypatch.setattr(module, "VALUES_AT_A_TIME", 201 * 50)
    cases, features_of = choice_cases(items=200, count=800)

    def peak(count: int) -> int:
        tracemalloc.start()
        try:
            fit_choice(cases[:count], features_of, 200, np.zeros(3))
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(50)  # what is imported and compiled
    assert peak(800) < 1.2 * peak(100) < 1.2e6


def test_users_of_the_recommender_are_refused(small_data: PreparedData) -> None:
    frame = genre_lovers(small_data)
    frame.loc[frame[USER] == FIRST_USER, USER] = small_data.users.raw_ids[3]
    with pytest.raises(DataError, match="among those that the recommender was trained on"):
        simulator_histories(frame, small_data.catalog, small_data.users)


def test_too_few_users_are_refused(small_data: PreparedData) -> None:
    few = simulator_histories(genre_lovers(small_data, users=4), small_data.catalog, small_data.users)[0]
    with pytest.raises(DataError, match="expected at least 5"):
        fit_simulator(few, small_data.catalog.genre_matrix(), RatingScale(0.5, 5.0), 0.5)


def test_what_cannot_be_fitted_is_named(small_data: PreparedData) -> None:
    """Five users of a dozen events: on one item, or without ratings."""
    genres, scale = small_data.catalog.genre_matrix(), RatingScale(0.5, 5.0)
    offsets, ratings, times = 12 * np.arange(6), np.ones(60, np.float32), np.arange(60)
    with pytest.raises(DataError, match="0 events on items that are new to their user fit the choice and 0 evaluate"):
        fit_simulator(Histories(offsets, np.ones(60, np.int32), ratings, times), genres, scale, 0.5)
    items = np.tile(np.arange(1, 13, dtype=np.int32), 5)
    with pytest.raises(DataError, match="0 events have a rating, and 0 of these are held out"):
        fit_simulator(Histories(offsets, items, np.full(60, np.nan, np.float32), times), genres, scale, 0.5)


def test_profiles_are_successive_events(histories: Histories) -> None:
    first = np.full(histories.user_count, 3)
    found = profiles(histories, first, 5)
    for user in (0, 11):
        start = histories.offsets[user] + 3
        np.testing.assert_array_equal(found["profile"][user, :5], histories.items[start : start + 5][::-1])
        np.testing.assert_array_equal(found["profile_rating"][user, :5], histories.ratings[start : start + 5][::-1])
        assert (np.asarray(found["profile"])[user, 5:] == 0).all()


def test_vectorized_steps_equal_a_loop(fit: SimulatorFit) -> None:
    environment = simulator_environment(fit.params, 4)
    keys = jax.random.split(jax.random.key(0), 3)
    slates = jnp.stack([jax.random.permutation(key, 60)[:4] + 1 for key in keys]).astype(jnp.int32)
    state, _ = jax.vmap(environment.reset)(keys)
    together = jax.jit(jax.vmap(environment.step))(state, slates, keys)
    for user in range(3):
        of_user, got = (jax.tree.map(lambda column, at=user: column[at], each) for each in (state, together))
        alone = environment.step(of_user, slates[user], keys[user])
        jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-6), alone, got)
