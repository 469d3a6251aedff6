"""Simulated users, fitted on a log (`jaxrec.rl.simulated.fit`), who choose from slates and rate.

The utility of item j as a user's next item is

    u_j = taste * sum_h decay^h B[recent_h, j] + popularity * log(events of j) + repetition * genre cosine to the last 3

where B is an item-item matrix, EASE's (Steck 2019, "Embarrassingly Shallow Autoencoders for Sparse Data", equation 8)
or one of nearest neighbours, and h counts the history from the last item back. An item of the history is not chosen
again. `repetition` below 0 is satiation by genre. Among all items that is a multinomial logit, whose coefficients are
fitted. Shown a slate, a user examines slot i with weight examine_i = i^-position_bias, and an examined item is
`salience` times as available as the rest of the catalogue:

    p(choose slot i) = salience * examine_i * e^u_i / (sum of the same over the slate + sum of e^u_j over other items)

Otherwise the user chooses nothing from the slate. Position bias and salience are assumptions: a log of ratings does not
contain them. A chosen item is rated by matrix factorization (mean + user + item + factors), with noise, on the log's
scale. The reward is 0 where nothing was chosen, else 1 - `rating_share` + `rating_share` * the rating scaled to 0..1.
None of these parts is a neural network over sequences, unlike the recommender.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxrec.models.masks import NEVER
from jaxrec.rl.simulated.environment import Environment

TASTE_EVENTS = 50  # events of the history that the utility uses; decay makes older ones negligible
REPEATED = 3  # events whose genres may tire


class SimulatorParams(NamedTuple):
    """The fitted users; arrays of items have row 0 for padding, and `users` are those of the simulator alone.

    `item_item` [items + 1, items + 1], `log_popularity` [items + 1], `genre_directions` [items + 1, genres] (rows of
    length 1 or 0), `item_bias` [items + 1], `item_factors` [items + 1, factors], `user_bias` [users], `user_factors`
    [users, factors]; scalars of the module's text, `mean_rating` and `rating_noise` in stars, `rating_range` [3]: the
    scale's least, greatest, and step; `leave`: the probability to leave after a step. `profile` [users, TASTE_EVENTS]
    int32 are the items of the history that a user starts with, the last one first, 0 where there are fewer;
    `profile_rating` their ratings, NaN where an event has none.
    """

    item_item: jax.Array
    log_popularity: jax.Array
    genre_directions: jax.Array
    item_bias: jax.Array
    item_factors: jax.Array
    user_bias: jax.Array
    user_factors: jax.Array
    taste: jax.Array
    decay: jax.Array
    popularity: jax.Array
    repetition: jax.Array
    position_bias: jax.Array
    salience: jax.Array
    mean_rating: jax.Array
    rating_noise: jax.Array
    rating_range: jax.Array
    rating_share: jax.Array
    leave: jax.Array
    profile: jax.Array
    profile_rating: jax.Array


class SimulatorState(NamedTuple):
    """`user` [] int32 counts from 0; `recent` [TASTE_EVENTS] int32 items and `rating` [TASTE_EVENTS] float32, the last
    one first, 0 = none; `taken` [items + 1] bool: items of the history; `slot` [] int32: the slot chosen from the last
    slate, -1: none."""

    user: jax.Array
    recent: jax.Array
    rating: jax.Array
    taken: jax.Array
    slot: jax.Array


class SimulatorObservation(NamedTuple):
    """The state without the user's identity, as a recommender sees it."""

    recent: jax.Array
    rating: jax.Array
    taken: jax.Array
    slot: jax.Array


def reset(params: SimulatorParams, key: jax.Array) -> tuple[SimulatorState, SimulatorObservation]:
    """One of the users at random, with the history that it starts with."""
    return start_user(params, jax.random.randint(key, (), 0, len(params.profile)))


def start_user(params: SimulatorParams, user: jax.Array) -> tuple[SimulatorState, SimulatorObservation]:
    """User `user` [] int32 at its start."""
    recent = params.profile[user]
    taken = jnp.zeros(len(params.log_popularity), bool).at[recent].set(True).at[0].set(False)
    rating = jnp.nan_to_num(params.profile_rating[user])
    state = SimulatorState(user.astype(jnp.int32), recent, rating, taken, jnp.int32(-1))
    return state, observe(state)


def observe(state: SimulatorState) -> SimulatorObservation:
    """The state as a recommender sees it."""
    return SimulatorObservation(state.recent, state.rating, state.taken, state.slot)


def utilities(params: SimulatorParams, recent: jax.Array, taken: jax.Array) -> jax.Array:
    """[items + 1] float32: u of the module's text; NEVER for padding and items of the history."""
    there = (recent > 0).astype(jnp.float32)
    weights = there * params.decay ** jnp.arange(len(recent))

    def add(taste: jax.Array, event: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        item, weight = event
        return taste + weight * params.item_item[item], None

    # One row at a time: all rows of many users at once would not fit into a cache, and take ten times as long.
    taste, _ = jax.lax.scan(add, jnp.zeros_like(params.log_popularity), (recent, weights))
    last = params.genre_directions[recent[:REPEATED]].sum(axis=0) / jnp.maximum(there[:REPEATED].sum(), 1.0)
    u = params.taste * taste + params.popularity * params.log_popularity
    u += params.repetition * (params.genre_directions @ last)
    return jnp.where(taken, NEVER, u).at[0].set(NEVER)


def choice_logprobs(params: SimulatorParams, u: jax.Array, slate: jax.Array) -> jax.Array:
    """[k + 1] float32: log-probabilities of choosing each slot of slate [k] int32, and last of choosing nothing.

    Items of the history, and repetitions of an item higher up, are not chosen; without other items nothing is.
    """
    repeated = jnp.tril(slate[:, None] == slate, k=-1).any(axis=1)
    examine = -params.position_bias * jnp.log(jnp.arange(1, len(slate) + 1, dtype=jnp.float32))
    shown = u[slate] + jnp.log(params.salience) + examine
    rest = jnp.maximum(jax.nn.logsumexp(u.at[slate].set(NEVER)), NEVER / 2)  # above items that cannot be chosen
    return jax.nn.log_softmax(jnp.append(jnp.where((u[slate] > NEVER / 2) & ~repeated, shown, NEVER), rest))


def step(
    params: SimulatorParams, state: SimulatorState, action: jax.Array, key: jax.Array
) -> tuple[SimulatorState, SimulatorObservation, jax.Array, jax.Array]:
    """Shows the slate `action` [k] int32, best first."""
    choice_key, rating_key, leave_key = jax.random.split(key, 3)
    u = utilities(params, state.recent, state.taken)
    choice = jax.random.categorical(choice_key, choice_logprobs(params, u, action))
    chosen = choice < len(action)
    item = jnp.where(chosen, action[jnp.minimum(choice, len(action) - 1)], 0).astype(jnp.int32)
    rating = rate(params, state.user, item, rating_key)
    pushed = jnp.concatenate([item[None], state.recent[:-1]]), jnp.concatenate([rating[None], state.rating[:-1]])
    state = SimulatorState(
        state.user,
        jnp.where(chosen, pushed[0], state.recent),
        jnp.where(chosen, pushed[1], state.rating),
        state.taken.at[item].set(True).at[0].set(False),
        jnp.where(chosen, choice, -1).astype(jnp.int32),
    )
    observation = observe(state)
    done = jax.random.uniform(leave_key) < params.leave
    return state, observation, reward_of(params, observation), done


def rate(params: SimulatorParams, user: jax.Array, item: jax.Array, key: jax.Array) -> jax.Array:
    """[] float32: the user's rating of the item, on the scale."""
    least, greatest, stars = params.rating_range
    expected = expected_rating(params, user, item) + params.rating_noise * jax.random.normal(key)
    return jnp.clip(least + jnp.round((expected - least) / stars) * stars, least, greatest)


def expected_rating(params: SimulatorParams, user: jax.Array, item: jax.Array) -> jax.Array:
    """[] float32, in stars, before noise and the scale's ends."""
    biases = params.mean_rating + params.user_bias[user] + params.item_bias[item]
    return biases + params.user_factors[user] @ params.item_factors[item]


def reward_of(params: SimulatorParams, observation: SimulatorObservation) -> jax.Array:
    """[] float32: the reward of the step that led to the observation."""
    terms = choice_terms(params, observation)
    return (1.0 - params.rating_share) * terms["taken"] + params.rating_share * terms["rating"]


def choice_terms(params: SimulatorParams, observation: SimulatorObservation) -> dict[str, jax.Array]:
    """`taken` 0 or 1: whether an item was chosen, and its `rating` 0..1, 0 without one."""
    chosen = (observation.slot >= 0).astype(jnp.float32)
    least, greatest, _ = params.rating_range
    return {"taken": chosen, "rating": chosen * (observation.rating[0] - least) / (greatest - least)}


def features(params: SimulatorParams, observation: SimulatorObservation) -> jax.Array:
    """[3 * genres] float32: the genres of the last item, of the last ten, and of these by rating (centred)."""
    ten = params.genre_directions[observation.recent[:10]]
    rated = (observation.recent[:10] > 0) * (observation.rating[:10] - params.mean_rating)
    return jnp.concatenate([ten[0], ten.mean(axis=0), (rated[:, None] * ten).mean(axis=0)])


def simulator_environment(params: SimulatorParams, slate_size: int) -> Environment:
    """The environment with these users and slates of this size, at least 2."""
    if slate_size < 2:
        raise ValueError(f"slate_size is {slate_size}, expected at least 2")
    item_count = len(params.log_popularity) - 1
    padding = jnp.arange(item_count + 1) == 0
    return Environment(
        reset=lambda key: reset(params, key),
        step=lambda state, action, key: step(params, state, action, key),
        features=lambda observation: features(params, observation),
        recommendable=lambda observation: ~(observation.taken | padding),
        terms=lambda observation, reward: choice_terms(params, observation),
        item_count=item_count,
        slate_size=slate_size,
        feature_count=3 * params.genre_directions.shape[1],
        bounds={
            "recent": (0, item_count),
            "rating": (min(0.0, float(params.rating_range[0])), float(params.rating_range[1])),
            "taken": (0, 1),
            "slot": (-1, slate_size - 1),
        },
    )
