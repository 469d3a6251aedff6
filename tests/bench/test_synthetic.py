"""The synthetic environment by hand, its exact values against brute force and against sampling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench.synthetic import (
    SyntheticParams,
    SyntheticState,
    acquired_taste,
    logging_logprobs,
    reset,
    step,
    synthetic_environment,
    take_probability,
)
from bench.synthetic_exact import (
    action_values,
    all_states,
    best_policy,
    build_model,
    deterministic,
    logging_policy,
    policy_values,
    state_number,
    value,
    values_by_steps,
)
from jaxrec.models.masks import NEVER

PARAMS = acquired_taste()
FIRST = {topic: 1 + 10 * topic for topic in range(4)}  # the best item of each topic


def state_of(taken: list[int], shown: list[int]) -> SyntheticState:
    return SyntheticState(jnp.array(taken, jnp.int32), jnp.array(shown, jnp.int32))


def tiny() -> SyntheticParams:
    """Two topics of one item each, and users who hardly stay."""
    return SyntheticParams(
        item_topic=jnp.array([0, 0, 1], jnp.int32),
        item_quality=jnp.array([0.0, 1.0, 0.75]),
        base=jnp.array([0.5, 0.125]),
        gain=jnp.array([[0.0, 0.0], [0.0, 0.75]]),
        fatigue=jnp.float32(0.5),
        leave=jnp.float32(0.75),
        start=jnp.array([0.0, 1.0, 1.0]),
        sharpness=jnp.float32(1.0),
        uniform=jnp.float32(0.25),
    )


def test_take_probability_by_hand() -> None:
    """Two of three taken items are of the acquired kind (topics 2, 3), and topic 2 was shown twice of three times."""
    state = state_of([FIRST[2], FIRST[3] + 4, FIRST[0]], [FIRST[2], FIRST[2] + 1, FIRST[0]])
    p = np.asarray(take_probability(PARAMS, state))
    appeal = 0.14 + 0.85 * 2 / 3
    assert p[FIRST[3]] == pytest.approx(appeal, rel=1e-6)
    assert p[FIRST[2]] == pytest.approx(appeal * 0.7**2, rel=1e-6)
    assert p[FIRST[2] + 9] == pytest.approx(0.5 * appeal * 0.7**2, rel=1e-6)
    assert p[FIRST[0]] == pytest.approx((0.45 + 0.15 / 3) * 0.7, rel=1e-6)
    assert p[0] == 0.0


def test_step_remembers_what_was_taken_and_shown() -> None:
    state = state_of([1, 2, 3], [4, 5, 6])
    probability = float(take_probability(PARAMS, state)[31])
    keys = jax.random.split(jax.random.key(0), 4000)
    new, seen, reward, done = jax.vmap(lambda key: step(PARAMS, state, jnp.int32(31), key))(keys)
    np.testing.assert_array_equal(new.shown, np.broadcast_to([31, 4, 5], (4000, 3)))
    taken = np.asarray(reward) == 1
    np.testing.assert_array_equal(np.asarray(new.taken)[taken], np.broadcast_to([31, 1, 2], (taken.sum(), 3)))
    np.testing.assert_array_equal(np.asarray(new.taken)[~taken], np.broadcast_to([1, 2, 3], ((~taken).sum(), 3)))
    np.testing.assert_array_equal(seen.taken, new.taken)
    assert taken.mean() == pytest.approx(probability, abs=4 * np.sqrt(probability / 4000))
    assert np.asarray(done).mean() == pytest.approx(0.02, abs=4 * np.sqrt(0.02 / 4000))


def test_new_users_have_taken_popular_items() -> None:
    state, observation = jax.vmap(lambda key: reset(PARAMS, key))(jax.random.split(jax.random.key(1), 3000))
    items = np.asarray(state.taken)
    np.testing.assert_array_equal(state.taken, state.shown)
    np.testing.assert_array_equal(observation.taken, state.taken)
    counts = np.bincount(items.ravel(), minlength=41)
    assert counts[0] == 0
    assert counts[21:].sum() == 0
    np.testing.assert_allclose(counts[1:21] / items.size, 1 / 20, atol=5 * np.sqrt(0.05 / items.size))


def test_probabilities_are_probabilities() -> None:
    p = np.asarray(jax.vmap(lambda state: take_probability(PARAMS, state))(all_states(PARAMS)))
    assert p.min() >= 0
    assert p.max() <= 1
    logging = np.asarray(jax.vmap(lambda state: logging_logprobs(PARAMS, state))(all_states(PARAMS)))
    assert (logging[:, 0] == NEVER).all()
    np.testing.assert_allclose(np.exp(logging[:, 1:]).sum(axis=1), 1.0, atol=1e-5)
    assert np.exp(logging[:, 1:]).min() >= 0.1 / 40  # every item is explored


def test_logging_propensities_by_hand() -> None:
    state = state_of([1, 1, 1], [2, 2, 2])
    p = np.array([0.5, 0.125 * 0.75]) * [1.0, 0.5**3]  # topic 1 was shown thrice
    soft = np.exp(p) / np.exp(p).sum()
    expected = 0.25 * 0.5 + 0.75 * soft
    np.testing.assert_allclose(np.exp(logging_logprobs(tiny(), state)[1:]), expected, rtol=1e-5)


def brute_force(params: SyntheticParams, taken: tuple[int, ...], shown: tuple[int, ...], depth: int) -> float:
    """The best expected reward of the next `depth` steps, by trying everything; topics as tuples, no tables."""
    if depth == 0:
        return 0.0
    base, gain, quality = (np.asarray(x, np.float64) for x in (params.base, params.gain, params.item_quality))
    best = 0.0
    for item, topic in ((1, 0), (2, 1)):
        appeal = base[topic] + np.mean([gain[k, topic] for k in taken])
        p = quality[item] * appeal * float(params.fatigue) ** shown.count(topic)
        after = (topic, *shown[:-1])
        if_taken = brute_force(params, (topic, *taken[:-1]), after, depth - 1)
        if_not = brute_force(params, taken, after, depth - 1)
        best = max(best, p + (1 - float(params.leave)) * (p * if_taken + (1 - p) * if_not))
    return best


def test_best_values_equal_brute_force() -> None:
    """Eight steps, of which the last is reached by one user in 4^7."""
    params = tiny()
    model = build_model(params)
    values = policy_values(model, best_policy(model))
    states = np.asarray(params.item_topic)[np.hstack([np.asarray(part) for part in all_states(params)])]
    for number in (0, 9, 37, 63):
        topics = tuple(states[number].tolist())
        assert values[number] == pytest.approx(brute_force(params, topics[:3], topics[3:], 8), abs=4.0**-8 * 2)


def test_states_are_numbered_in_their_order() -> None:
    """Any item of a topic stands for it: 20 is the last of topic 1, 31 the first of topic 3."""
    numbers = jax.vmap(lambda state: state_number(PARAMS, state))(all_states(PARAMS))
    np.testing.assert_array_equal(numbers, np.arange(4**6))
    assert int(state_number(PARAMS, state_of([20, 1, 1], [1, 1, 31]))) == 1 * 4**5 + 3


def test_values_of_few_steps_by_hand() -> None:
    """Item 1 for ever: topic 0 gains nothing from what was taken, and is halved by each time it was shown before; a
    quarter of the users stay."""
    params = tiny()
    model = build_model(params)
    first_item = deterministic(np.zeros(64, int), 2)
    unshown = int(state_number(params, state_of([1, 1, 1], [2, 2, 2])))
    p = [0.5, 0.5 * 0.5, 0.5 * 0.5**2, 0.5 * 0.5**3, 0.5 * 0.5**3]  # three are remembered
    expected = np.cumsum([0.0, *(0.25**step * p[step] for step in range(5))])
    np.testing.assert_allclose(values_by_steps(model, first_item, 5)[:, unshown], expected, rtol=1e-6)
    discounted = np.cumsum([0.0, *((0.5 * 0.25) ** step * p[step] for step in range(5))])
    np.testing.assert_allclose(values_by_steps(model, first_item, 5, 0.5)[:, unshown], discounted, rtol=1e-6)


def test_one_step_of_a_new_user_by_hand() -> None:
    """Who has taken and was shown j times topic 1 of three; both items equally likely."""
    expected = 0.0
    for j, share in enumerate((1 / 8, 3 / 8, 3 / 8, 1 / 8)):
        expected += share * (0.5 * 0.5 * 0.5 ** (3 - j) + 0.5 * 0.75 * (0.125 + 0.75 * j / 3) * 0.5**j)
    assert value(build_model(tiny()), np.full((64, 2), 0.5), steps=1) == pytest.approx(expected, rel=1e-6)


def test_values_of_many_steps_are_those_of_whole_visits() -> None:
    """Of the users who stay, a quarter, nobody is left after 30 steps."""
    model = build_model(tiny())
    policy = logging_policy(tiny())
    np.testing.assert_allclose(values_by_steps(model, policy, 30)[-1], policy_values(model, policy), atol=1e-8)
    assert value(model, policy, steps=30) == pytest.approx(value(model, policy), abs=1e-8)


def test_best_policy_satisfies_the_optimality_equation() -> None:
    model = build_model(PARAMS)
    values = policy_values(model, best_policy(model))
    np.testing.assert_allclose(action_values(model, values).max(axis=1), values, atol=1e-6)


def test_patience_pays() -> None:
    """By construction: the greedy policy never shows what the best one lives on."""
    model = build_model(PARAMS)
    best, greedy = best_policy(model), best_policy(model, discount=0.0)
    assert value(model, greedy) < 0.7 * value(model, best)
    of_new_users = model.start > 0
    assert greedy[of_new_users][:, 20:].sum() == 0
    assert best[of_new_users][:, 20:].sum() > 0


def test_exact_value_is_what_users_take() -> None:
    """The logging policy, from the exact tables and from 4,000 visits of at most 400 steps."""
    environment = synthetic_environment(PARAMS)
    exact = value(build_model(PARAMS), logging_policy(PARAMS))

    @jax.jit
    def visits(key: jax.Array) -> jax.Array:
        keys = jax.random.split(key, 4000)

        def go(
            at: tuple[SyntheticState, jax.Array], key: jax.Array
        ) -> tuple[tuple[SyntheticState, jax.Array], jax.Array]:
            state, here = at
            act_key, step_key = jax.random.split(key)
            logprobs = jax.vmap(lambda s: logging_logprobs(PARAMS, s))(state)
            action = jax.random.categorical(act_key, logprobs)
            state, _, reward, done = jax.vmap(environment.step)(state, action, jax.random.split(step_key, 4000))
            return (state, here & ~done), jnp.where(here, reward, 0.0)

        start = (jax.vmap(environment.reset)(keys)[0], jnp.ones(4000, bool))
        return jax.lax.scan(go, start, jax.random.split(jax.random.fold_in(key, 1), 400))[1].sum(axis=0)

    taken = np.asarray(visits(jax.random.key(0)))
    assert taken.mean() == pytest.approx(exact, abs=4 * taken.std() / np.sqrt(len(taken)))


def test_vectorized_steps_equal_a_loop() -> None:
    environment = synthetic_environment(PARAMS)
    keys = jax.random.split(jax.random.key(3), 5)
    actions = jax.random.randint(jax.random.key(4), (6, 5), 1, 41)

    @jax.jit
    def together() -> jax.Array:
        def go(state: SyntheticState, at: tuple[jax.Array, jax.Array]) -> tuple[SyntheticState, tuple[jax.Array, ...]]:
            action, number = at
            state, _, reward, done = jax.vmap(environment.step)(
                state, action, jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)
            )
            return state, (state.taken, state.shown, reward, done)

        return jax.lax.scan(go, jax.vmap(environment.reset)(keys)[0], (actions, jnp.arange(6)))[1]

    expected = []
    for user in range(5):
        state, _ = environment.reset(keys[user])
        for number in range(6):
            key = jax.random.fold_in(keys[user], number)
            state, _, reward, done = environment.step(state, actions[number, user], key)
            expected.append((state.taken, state.shown, reward, done))
    for at, got in enumerate(together()):
        looped = np.array([np.asarray(each[at]) for each in expected])
        np.testing.assert_array_equal(np.swapaxes(np.asarray(got), 0, 1).reshape(looped.shape), looped)
