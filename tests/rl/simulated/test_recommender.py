"""The simulated users as the run's recommender sees them, and its policy as it starts and as it learns."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxrec.config import RatingScale
from jaxrec.data.batches import CaseBatch
from jaxrec.data.events import Events
from jaxrec.data.prepared import PreparedData
from jaxrec.data.schema import UNKNOWN_GAP
from jaxrec.data.split import Cases
from jaxrec.evaluation.scorers import hybrid_scorer
from jaxrec.models.hybrid import Hybrid
from jaxrec.models.masks import exclude_items
from jaxrec.rl.config import SimulatedConfig
from jaxrec.rl.logged.folds import last_events
from jaxrec.rl.policy import greedy_slates, sample_slates
from jaxrec.rl.reward_tables import fit_reward_tables
from jaxrec.rl.scoring import OF_RERANKER, frozen_scoring, new_head, supervised_logits
from jaxrec.rl.simulated import evaluate as simulator_evaluation
from jaxrec.rl.simulated.evaluate import rollout_evaluator
from jaxrec.rl.simulated.fit import fit_simulator, simulator_histories
from jaxrec.rl.simulated.policy import RecommenderPolicy, real_events_anchor, recommender_policy
from jaxrec.rl.simulated.recommender import (
    Recommender,
    every_user,
    recommender_environment,
    recommender_of,
    start_states,
)
from jaxrec.rl.simulated.train import train_simulated
from jaxrec.rl.simulated.users import SimulatorParams
from jaxrec.rl.states import policy_states
from tests.rl.simulated.simulated import genre_lovers, hand_made

EVENTS, SLATE = 6, 3


@pytest.fixture(scope="module")
def supervised(small_hybrid: Hybrid) -> Hybrid:
    return small_hybrid.with_policy(None)


@pytest.fixture(scope="module")
def recommender(supervised: Hybrid, small_data: PreparedData) -> Recommender:
    return recommender_of(supervised, small_data)


@pytest.fixture(scope="module")
def params(small_data: PreparedData) -> SimulatorParams:
    """Users who come with EVENTS events, but the first of them with half of these."""
    histories = simulator_histories(genre_lovers(small_data), small_data.catalog, small_data.users)[0]
    scale = RatingScale(0.5, 5.0)
    fitted = fit_simulator(histories, small_data.catalog.genre_matrix(), scale, 0.5, start_events=EVENTS).params
    half = jnp.arange(fitted.profile.shape[1]) < EVENTS // 2
    return fitted._replace(profile=fitted.profile.at[0].multiply(half), leave=jnp.float32(0.0))


def whole_history(recommender: Recommender, seen: list[tuple[int, float]]) -> Events:
    """(item, stars) in order as one row."""
    items, stars = (np.array([column]) for column in zip(*seen, strict=True))
    gaps = np.full(items.shape, recommender.gap, np.float32)
    gaps[:, 0] = UNKNOWN_GAP
    unit = recommender.scale.to_unit(stars)
    return Events(items.astype(np.int32), unit, gaps, np.array([items.shape[1]], np.int32))


def came_with(params: SimulatorParams, user: int) -> list[tuple[int, float]]:
    items, stars = np.asarray(params.profile[user]), np.asarray(params.profile_rating[user])
    return [(int(items[back]), float(stars[back])) for back in np.flatnonzero(items)[::-1]]


def test_gap_is_the_median_of_training(recommender: Recommender, small_data: PreparedData) -> None:
    histories = small_data.histories
    times = np.split(histories.times, histories.offsets[1:-1])
    gaps = np.concatenate([np.diff(of_user[:-2]) for of_user in times])  # the last two: validation and test
    assert recommender.gap == np.float32(np.median(gaps)) > 0


def test_state_advances_as_the_whole_history_is_read(
    recommender: Recommender, supervised: Hybrid, params: SimulatorParams
) -> None:
    eager = params._replace(salience=jnp.float32(1e9))
    environment = recommender_environment(recommender, eager, start_states(recommender, eager), SLATE)
    state, _ = every_user(eager, start_states(recommender, eager))
    step = jax.jit(jax.vmap(environment.step))
    users = len(eager.profile)
    seen = [came_with(eager, user) for user in range(users)]
    assert [len(each) for each in seen[:2]] == [EVENTS // 2, EVENTS]
    for number in range(3):
        slates = jax.vmap(lambda taken: jnp.argsort(taken)[1 : SLATE + 1])(state.user.taken).astype(jnp.int32)
        keys = jax.random.split(jax.random.key(number), users)
        state, observation, _, _ = step(state, slates, keys)
        assert (np.asarray(observation.seen.slot) >= 0).all()
        for user in range(users):
            seen[user].append((int(observation.seen.recent[user, 0]), float(observation.seen.rating[user, 0])))
    for user in (0, 1, 7):
        _, expected = supervised.encode(whole_history(recommender, seen[user]))
        np.testing.assert_allclose(state.recurrent[user], expected[0], rtol=1e-4, atol=1e-5)


def test_start_is_the_models_reading_of_the_last_events(supervised: Hybrid, recommender: Recommender) -> None:
    """On a scale of 0..10, where 0 is a rating, and an event without one; of models that read four events."""
    profile, stars = np.zeros((2, 50), np.int32), np.zeros((2, 50), np.float32)
    profile[0, :6], profile[1, :2] = [3, 1, 4, 2, 3, 4], [4, 2]
    stars[0, :6] = [0.0, np.nan, 10.0, 5.0, 2.0, 1.0]
    came = hand_made()._replace(profile=jnp.asarray(profile), profile_rating=jnp.asarray(stars))
    short = nnx.merge(recommender.graphdef, recommender.variables)
    short.lstm.config = dataclasses.replace(short.lstm.config, max_length=4)
    reads_four = recommender._replace(graphdef=nnx.graphdef(short), scale=RatingScale(0.0, 10.0))
    starts = start_states(reads_four, came)
    for user, cut in ((0, 2), (1, 0)):
        events = whole_history(reads_four, came_with(came, user))
        kept = Events(*(column[:, cut:] for column in events[:3]), events.length - cut)
        _, expected = supervised.encode(kept)
        np.testing.assert_allclose(starts[user], expected[0], rtol=1e-4, atol=1e-5)
    assert kept.rating.tolist() == [[0.0, 0.0]]
    state, seen = every_user(came, starts)
    assert np.isfinite(state.user.rating).all()
    assert np.isfinite(seen.seen.rating).all()


def test_state_stays_where_nothing_is_chosen(recommender: Recommender, params: SimulatorParams) -> None:
    shy = params._replace(salience=jnp.float32(1e-9))
    starts = start_states(recommender, shy)
    environment = recommender_environment(recommender, shy, starts, SLATE)
    state, _ = environment.reset(jax.random.key(3))
    new, observation, reward, _ = jax.jit(environment.step)(state, jnp.array([1, 2, 3]), jax.random.key(4))
    assert int(observation.seen.slot) == -1
    assert float(reward) == 0.0
    np.testing.assert_array_equal(new.recurrent, starts[state.user.user])
    np.testing.assert_array_equal(observation.recurrent, starts[state.user.user])


@pytest.mark.parametrize("drawn", [False, True])
def test_rollouts_are_a_loop_of_steps(
    recommender: Recommender,
    small_data: PreparedData,
    supervised: Hybrid,
    params: SimulatorParams,
    monkeypatch: pytest.MonkeyPatch,
    drawn: bool,
) -> None:
    """Two episodes of six requests by three users, one after the other."""
    monkeypatch.setattr(simulator_evaluation, "REQUESTS", 6)
    monkeypatch.setattr(simulator_evaluation, "EPISODES", 2)
    few = params._replace(profile=params.profile[:3], profile_rating=params.profile_rating[:3])
    starts = start_states(recommender, few)
    environment = recommender_environment(recommender, few, starts, SLATE)
    scoring = frozen_scoring(supervised, fit_reward_tables(small_data))
    policy = recommender_policy(*new_head(scoring.item_vectors.shape[1], 60, hidden=128, seed=0), scoring)
    first = every_user(few, starts)
    results = rollout_evaluator(environment, first, policy, seed=5, drawn=drawn)(policy.start)

    step = jax.jit(environment.step)
    slots, stars, rewards, shown = [], [], [], []
    for episode_key in jax.random.split(jax.random.key(5), 2):
        state, observation = first
        of_visit: set[int] = set()
        for request_key in jax.random.split(episode_key, 6):
            slate_key, step_key = jax.random.split(request_key)
            logits = logits_of(policy, environment, observation)
            slates = sample_slates(slate_key, logits, SLATE) if drawn else greedy_slates(logits, SLATE)
            of_visit |= set(np.asarray(slates).ravel().tolist())
            alone = [
                step(jax.tree.map(lambda column, at=user: column[at], state), slates[user], key)
                for user, key in enumerate(jax.random.split(step_key, 3))
            ]
            state, observation, reward, _ = jax.tree.map(lambda *columns: jnp.stack(columns), *alone)
            slots.append(observation.seen.slot)
            stars.append(observation.seen.rating[:, 0])
            rewards.append(reward)
        shown.append(len(of_visit) / 60)
    taken = np.array(slots) >= 0
    assert taken[:5].any()  # so that later requests are of users who took something
    assert not taken.all()
    np.testing.assert_allclose(results.taken, taken.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(results.rating, (taken * (np.array(stars) - 0.5) / 4.5).mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(results.reward, np.mean(rewards, axis=0), rtol=1e-6)
    np.testing.assert_allclose(results.reward, 0.5 * results.taken + 0.5 * results.rating, rtol=1e-6)
    assert results.coverage == pytest.approx(np.mean(shown))


@pytest.mark.parametrize("with_policy", [False, True])
def test_starts_as_what_is_evaluated(
    recommender: Recommender,
    small_data: PreparedData,
    small_hybrid: Hybrid,
    supervised: Hybrid,
    params: SimulatorParams,
    with_policy: bool,
) -> None:
    """The greedy slates for the users' histories are those of the evaluation's scorer, with a policy or without."""
    scoring = frozen_scoring(supervised, fit_reward_tables(small_data))
    if with_policy:
        graphdef, variables = nnx.split(small_hybrid.policy)
        policy = recommender_policy(graphdef, nnx.to_pure_dict(variables), scoring)
    else:
        policy = recommender_policy(*new_head(scoring.item_vectors.shape[1], 60, hidden=128, seed=0), scoring)
    served = small_hybrid if with_policy else supervised
    starts = start_states(recommender, params)
    environment = recommender_environment(recommender, params, starts, SLATE)
    _, observation = every_user(params, starts)
    slates = np.asarray(greedy_slates(logits_of(policy, environment, observation), SLATE))
    none = np.zeros(1, np.int32)
    for user in (0, 1, 5):
        history = whole_history(recommender, came_with(params, user))
        items, unknown = np.asarray(history.item), np.array([UNKNOWN_GAP], np.float32)
        case = CaseBatch(history, unknown, none, items, none, items, np.zeros_like(items))
        expected = jax.lax.top_k(exclude_items(hybrid_scorer(served)(case), history.item), SLATE)[1]
        np.testing.assert_array_equal(slates[user], expected[0])


def test_a_shift_of_the_reranker_ranks_but_is_not_trained(
    small_data: PreparedData,
    small_hybrid: Hybrid,
    params: SimulatorParams,
    with_random_reranker: Callable[[Hybrid, PreparedData], Hybrid],
) -> None:
    """Neither by the rewards nor by the KL penalty in the run's own log; requests may have any leading axes."""
    hybrid = with_random_reranker(small_hybrid, small_data)
    supervised, (graphdef, variables) = hybrid.with_policy(None), nnx.split(hybrid.policy)
    scoring = frozen_scoring(supervised, fit_reward_tables(small_data))
    policy = recommender_policy(graphdef, nnx.to_pure_dict(variables), scoring)
    recommender = recommender_of(supervised, small_data)
    starts = start_states(recommender, params)
    _, observation = jax.tree.map(lambda x: x[:2], every_user(params, starts))
    environment = recommender_environment(recommender, params, starts, SLATE)
    features, allowed = jax.vmap(environment.features)(observation), jax.vmap(environment.recommendable)(observation)
    logits = policy.logits(policy.start, features, allowed)
    features, allowed = jax.tree.map(lambda x: x[:, None], (features, allowed))
    np.testing.assert_allclose(policy.logits(policy.start, features, allowed)[:, 0], logits, rtol=1e-6)
    none = {name: jnp.zeros_like(policy.start.head[name]) for name in OF_RERANKER}
    unshifted = policy.start._replace(head={**policy.start.head, **none})
    assert np.abs(policy.logits(unshifted, features, allowed)[:, 0] - logits)[allowed[:, 0]].max() > 0.1

    logged = last_events(small_data.histories, small_data.split.train_counts, 1, 8)
    states, histories = policy_states(supervised, small_data, logged, np.ones(len(logged), bool))
    targets = np.asarray(small_data.histories.items[logged.rows])
    anchor = real_events_anchor(policy, states, histories, targets, batch_size=4)
    moved = policy.start._replace(
        head={**policy.start.head, "item_bias": policy.start.head["item_bias"].at[9].add(2.0)}
    )
    of_logits = jax.grad(lambda params: policy.logits(params, features, allowed)[0, 0, 60])(moved).head
    of_penalty = jax.grad(lambda params: anchor(params, jax.random.key(0))[0])(moved).head
    for found in (of_logits, of_penalty):
        assert np.abs(found["item_bias"]).max() > 0
        assert not any(found[name].any() for name in OF_RERANKER)


def logits_of(policy: RecommenderPolicy, environment, observation) -> jax.Array:  # type: ignore[no-untyped-def]
    allowed = jax.vmap(environment.recommendable)(observation)
    return policy.logits(policy.start, jax.vmap(environment.features)(observation), allowed)


def test_anchor_is_the_distance_and_the_loss_at_real_events(small_data: PreparedData, supervised: Hybrid) -> None:
    """Of one event: item 9's logit is 2 higher than it was, so its share p becomes p e^2 / (1 - p + p e^2), and the
    others' are 1 - p + p e^2 times smaller. If item 9 comes next, 2 - log(1 - p + p e^2) nats are won."""
    tables = fit_reward_tables(small_data)
    logged = last_events(small_data.histories, small_data.split.train_counts, 40, 10_000)
    row = int(np.flatnonzero(small_data.histories.items[logged.rows] == 9)[0])
    one = Cases(logged.users[[row]], logged.rows[[row]])
    state, histories = policy_states(supervised, small_data, one, np.ones(1, bool))
    policy = recommender_policy(*new_head(2 * 16, 60, hidden=128, seed=0), frozen_scoring(supervised, tables))
    anchor = real_events_anchor(policy, state, histories, np.array([9]), batch_size=4)
    assert tuple(map(float, anchor(policy.start, jax.random.key(0)))) == (0.0, 0.0)
    bias = policy.start.head["item_bias"].at[9].add(2.0)
    moved = policy.start._replace(head={**policy.start.head, "item_bias": bias})

    history = small_data.histories.items[small_data.histories.offsets[one.users[0]] : one.rows[0]]
    assert sorted(history) == sorted(histories[histories > 0])
    logits = supervised_logits(state, policy.scoring)[0].at[jnp.append(history, 0)].set(-jnp.inf)
    p = float(jax.nn.softmax(logits)[9])
    total = 1 - p + p * np.exp(2.0)
    expected = 2.0 * p * np.exp(2.0) / total - np.log(total)
    kl, lost = anchor(moved, jax.random.key(0))
    np.testing.assert_allclose([kl, lost], [expected, np.log(total) - 2.0], rtol=1e-4)
    gradient = jax.grad(lambda params: anchor(params, jax.random.key(0))[1])(moved)
    assert all(not np.asarray(part).any() for part in jax.tree.leaves(gradient))


def test_learns_to_put_first_the_item_that_all_choose(
    recommender: Recommender, small_data: PreparedData, supervised: Hybrid, params: SimulatorParams
) -> None:
    """Nobody came with item 60; who is shown it takes it, nearly always where it is first: by the odds 5 e^6 : 55, and
    16 and 81 times worse ones in the next slots. Each visit is one request."""
    wanted = 60
    elsewhere = jnp.where(params.profile == wanted, 1, params.profile)
    popularity = jnp.zeros_like(params.log_popularity).at[wanted].set(6.0)
    scalars = {"taste": 0.0, "repetition": 0.0, "popularity": 1.0, "position_bias": 4.0, "leave": 1.0}
    simple = params._replace(
        profile=elsewhere,
        log_popularity=popularity,
        **{name: jnp.float32(number) for name, number in scalars.items()},
    )
    starts = start_states(recommender, simple)
    environment = recommender_environment(recommender, simple, starts, SLATE)
    scoring = frozen_scoring(supervised, fit_reward_tables(small_data))
    head = new_head(scoring.item_vectors.shape[1], 60, hidden=8, seed=0)
    policy = recommender_policy(*head, scoring, temperature=5.0)
    config = SimulatedConfig(users=64, steps=2, updates=80, discount=0.0, learning_rate=0.1, updates_per_record=40)
    params, records = train_simulated(environment, policy, config)
    _, observation = every_user(simple, starts)

    def first(start: RecommenderPolicy) -> np.ndarray:
        return np.asarray(greedy_slates(logits_of(start, environment, observation), 1))[:, 0]

    assert (first(policy) == wanted).mean() < 0.5
    assert (first(policy._replace(start=params)) == wanted).mean() > 0.9
    assert records[1]["reward"] > records[0]["reward"]
