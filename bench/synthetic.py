"""A user whose best recommender is known exactly, and for whom one step at a time is not good enough.

Every item has a topic and a quality. The user remembers the last items that it took (its taste) and the last that it
was shown. Shown item i of topic j, it takes it with probability

    quality_i * (base_j + mean over the taken items' topics k of gain_kj) * fatigue^(times j was among the last shown)

and the reward is 1 if it does. So a topic tires when it is shown often (satiation), and what is taken moves the taste
(drift). After every step the user leaves with probability `leave`; the value of a policy is how many items a user takes
until then, on average.

What makes patience pay: in `acquired_taste` half of the topics are popular, and please everybody a little; the other
half please hardly anybody at first, but each other's takers much more than the popular ones ever do. A policy that
wants the next reward shows popular items for ever, and so does one that imitates what was taken.

A recommender sees all that matters: the state is what was taken and what was shown. Only topics of items matter to the
dynamics, so that there are topics^(taken + shown) states, and `bench.synthetic_exact` computes the
value of every policy on them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrec.models.masks import NEVER
from jaxrec.rl.config import SimulatedConfig
from jaxrec.rl.simulated.environment import Environment

TAKEN, SHOWN = 3, 3  # how many items the user remembers
TRAINING = SimulatedConfig(
    steps=16,
    updates=2000,
    updates_per_record=100,
    slate_size=1,
    learning_rate=1e-2,
    discount=0.95,
    entropy_weight=0.1,
)


class SyntheticParams(NamedTuple):
    """`item_topic` [items + 1] int32 and `item_quality` [items + 1] float32 in 0..1, row 0 being padding; `base`
    [topics], `gain` [topics, topics] (row: a taken topic, column: the topic whose appeal it adds to), `fatigue` and
    `leave` [] float32; `start` [items + 1] float32: how likely new users have taken each item, in any unit.

    `base_j + max_k gain_kj` must not exceed 1. `sharpness` and `uniform` [] float32 make the logging policy.
    """

    item_topic: jax.Array
    item_quality: jax.Array
    base: jax.Array
    gain: jax.Array
    fatigue: jax.Array
    leave: jax.Array
    start: jax.Array
    sharpness: jax.Array
    uniform: jax.Array


class SyntheticState(NamedTuple):
    """`taken` [TAKEN] and `shown` [SHOWN] int32 items, the last one first. It is its own observation."""

    taken: jax.Array
    shown: jax.Array


def acquired_taste(items_per_topic: int = 10, leave: float = 0.02) -> SyntheticParams:
    """Topics 0 and 1 are popular, 2 and 3 an acquired taste; qualities fall evenly from 1 to 0.5 in each topic."""
    base = np.array([0.45, 0.40, 0.14, 0.14], np.float32)
    gain = np.zeros((4, 4), np.float32)
    gain[:2, :2] = 0.15
    gain[2:, 2:] = 0.85
    quality = np.tile(np.linspace(1.0, 0.5, items_per_topic), 4)
    return SyntheticParams(
        item_topic=jnp.asarray(np.concatenate([[0], np.repeat(np.arange(4), items_per_topic)]), jnp.int32),
        item_quality=jnp.asarray(np.concatenate([[0.0], quality]), jnp.float32),
        base=jnp.asarray(base),
        gain=jnp.asarray(gain),
        fatigue=jnp.float32(0.7),
        leave=jnp.float32(leave),
        start=jnp.asarray(np.concatenate([[0.0], np.repeat([1.0, 1.0, 0.0, 0.0], items_per_topic)]), jnp.float32),
        sharpness=jnp.float32(4.0),
        uniform=jnp.float32(0.1),
    )


def reset(params: SyntheticParams, key: jax.Array) -> tuple[SyntheticState, SyntheticState]:
    """A new user, who has just taken TAKEN items of the popular kind, and was shown these."""
    up_to = jnp.cumsum(params.start)
    draws = jax.random.uniform(key, (max(TAKEN, SHOWN),)) * up_to[-1]
    items = jnp.sum(up_to <= draws[:, None], axis=1, dtype=jnp.int32)  # inverts the distribution function
    state = SyntheticState(items[:TAKEN], items[:SHOWN])
    return state, state


def step(
    params: SyntheticParams, state: SyntheticState, action: jax.Array, key: jax.Array
) -> tuple[SyntheticState, SyntheticState, jax.Array, jax.Array]:
    """Shows the item `action` [] int32 in 1..items; the reward is 1 where it is taken."""
    take_draw, leave_draw = jax.random.uniform(key, (2,))
    taken = take_draw < params.item_quality[action] * appeal(params, state)[params.item_topic[action]]
    action = action.astype(jnp.int32)
    pushed = jnp.concatenate([action[None], state.taken[:-1]])
    state = SyntheticState(jnp.where(taken, pushed, state.taken), jnp.concatenate([action[None], state.shown[:-1]]))
    return state, state, taken.astype(jnp.float32), leave_draw < params.leave


def appeal(params: SyntheticParams, state: SyntheticState) -> jax.Array:
    """[topics] float32: the probability that an item of quality 1 is taken, by its topic."""
    taste = params.base + params.gain[params.item_topic[state.taken]].mean(axis=0)
    topics = jnp.arange(len(params.base))
    times_shown = jnp.sum(params.item_topic[state.shown][:, None] == topics, axis=0)
    return taste * params.fatigue**times_shown


def take_probability(params: SyntheticParams, state: SyntheticState) -> jax.Array:
    """[items + 1] float32: the probability that the user takes each item, if shown; 0 for padding."""
    return params.item_quality * appeal(params, state)[params.item_topic]


def logging_logprobs(params: SyntheticParams, state: SyntheticState) -> jax.Array:
    """[items + 1] float32: the log-probability of each item under the policy that wrote the log.

    It is a recommender of one step that explores: with probability `uniform` any item, else one from the softmax of
    `sharpness` times the probability that it is taken. Padding has NEVER.
    """
    some = jnp.where(jnp.arange(len(params.item_topic)) > 0, 0.0, NEVER)
    likely = params.sharpness * take_probability(params, state) + some
    mixed = jnp.logaddexp(
        jnp.log(params.uniform) + jax.nn.log_softmax(some), jnp.log1p(-params.uniform) + jax.nn.log_softmax(likely)
    )
    return mixed.at[0].set(NEVER)


def features(params: SyntheticParams, observation: SyntheticState) -> jax.Array:
    """[(TAKEN + SHOWN) * topics] float32: the topics of what was taken and shown, as ones and zeros."""
    items = jnp.concatenate([observation.taken, observation.shown])
    return jax.nn.one_hot(params.item_topic[items], len(params.base)).reshape(-1)


def synthetic_environment(params: SyntheticParams) -> Environment:
    """The environment with these parameters."""
    item_count = len(params.item_topic) - 1
    some = jnp.arange(item_count + 1) > 0
    return Environment(
        reset=lambda key: reset(params, key),
        step=lambda state, action, key: step(params, state, action, key),
        features=lambda observation: features(params, observation),
        recommendable=lambda observation: some,
        terms=lambda observation, reward: {"taken": reward},
        item_count=item_count,
        slate_size=1,
        feature_count=(TAKEN + SHOWN) * len(params.base),
        bounds={"taken": (0, item_count), "shown": (0, item_count)},
    )
