"""The simulated users as a run's recommender sees them: by the state of its sequence models.

A user's state is that of the simulator (`jaxrec.rl.simulated.users`) and the recurrent state of the run's hybrid. The
latter advances by one event when an item is chosen and stays otherwise, so that no history is read twice. The states
at the start are computed once for all users.

Simulated time: events are `gap` seconds apart, and the first one that the models read has no known gap; requests give
no time. Ratings enter on the run's rating scale, as 0..1.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxrec.config import RatingScale
from jaxrec.data.events import Events, pad_events
from jaxrec.data.prepared import PreparedData
from jaxrec.data.schema import UNKNOWN_GAP
from jaxrec.errors import DataError
from jaxrec.models.hybrid import Hybrid
from jaxrec.rl.simulated import users as simulator
from jaxrec.rl.simulated.environment import Environment
from jaxrec.rl.simulated.users import SimulatorObservation, SimulatorParams, SimulatorState
from jaxrec.rl.states import HistoryStates, PolicyState, by_batches, encode_histories, policy_state

USERS_PER_BATCH = 64


class RecommenderState(NamedTuple):
    """`user`: of the simulator; `recurrent` [...] float32: of the hybrid."""

    user: SimulatorState
    recurrent: jax.Array


class RecommenderObservation(NamedTuple):
    """The state without the user's identity."""

    seen: SimulatorObservation
    recurrent: jax.Array


class Recommender(NamedTuple):
    """The run's models, without a policy, and the settings of simulated events: `graphdef` and
    `variables` of the hybrid, its rating `scale`, and the seconds between events, `gap`."""

    graphdef: nnx.GraphDef[Hybrid]
    variables: nnx.State
    scale: RatingScale
    gap: float

    def advance(self, recurrent: jax.Array, item: jax.Array, rating: jax.Array, where: jax.Array) -> jax.Array:
        """The state [batch, ...] after one more event each, `rating` in stars; as before where `where`
        is off. All [batch]."""
        unit = (rating - self.scale.minimum) / (self.scale.maximum - self.scale.minimum)
        gap = jnp.full_like(unit, self.gap)
        event = Events(item[:, None], unit[:, None], gap[:, None], where.astype(jnp.int32))
        return nnx.merge(self.graphdef, self.variables).encode(event, recurrent)[1]

    def features(self, recurrent: jax.Array, recommendable: jax.Array) -> PolicyState:
        """What a policy sees of the states `recurrent` [batch, ...], without request time, where the items
        `recommendable` [batch, items + 1] bool may be recommended."""
        model = nnx.merge(self.graphdef, self.variables)
        states = HistoryStates.of_recurrent(model, recurrent)
        return policy_state(model, states, jnp.full(len(recurrent), UNKNOWN_GAP), allowed=recommendable)


def recommender_of(supervised: Hybrid, data: PreparedData) -> Recommender:
    """The recommender of a run: events are the median gap of its training events apart. Raises DataError where the run
    has no ratings."""
    if data.config.rating_scale is None:
        raise DataError("the run was trained without ratings, and simulated users rate; expected a log with ratings")
    gaps = data.histories.gaps()[data.split.train_rows(data.histories)]
    known = gaps[gaps != UNKNOWN_GAP]
    graphdef, variables = nnx.split(supervised.with_policy(None))
    return Recommender(graphdef, variables, data.config.rating_scale, float(np.median(known)) if len(known) else 0.0)


def start_states(recommender: Recommender, params: SimulatorParams) -> jax.Array:
    """[users, ...] float32: the state after the events that each user starts with, of which the models
    read the last `max_length`."""

    max_length = nnx.merge(recommender.graphdef, recommender.variables).lstm.config.max_length
    profiles, unit = np.asarray(params.profile), recommender.scale.to_unit(np.asarray(params.profile_rating))

    def encode(rows: np.ndarray) -> jax.Array:
        lengths = (profiles[rows] > 0).sum(axis=1)
        # A profile has the last event first, the models read it last; the first event of all has no gap.
        gaps = [np.append(UNKNOWN_GAP, np.full(max(length - 1, 0), recommender.gap))[:length] for length in lengths]
        items, ratings = (
            [table[row, :length][::-1] for row, length in zip(rows, lengths, strict=True)] for table in (profiles, unit)
        )
        events = pad_events(items, ratings, gaps, min(profiles.shape[1], max_length))
        return encode_histories(recommender.graphdef, recommender.variables, events)

    return jnp.asarray(by_batches(encode, len(profiles), USERS_PER_BATCH))


def recommender_environment(
    recommender: Recommender, params: SimulatorParams, starts: jax.Array, slate_size: int
) -> Environment:
    """The simulated users, for a policy of the run (`jaxrec.rl.simulated.policy`), with slates of at least 2.
    `starts`: of `start_states`."""
    users = simulator.simulator_environment(params, slate_size)

    def reset(key: jax.Array) -> tuple[RecommenderState, RecommenderObservation]:
        user = users.reset(key)[0]
        return _both(user, starts[user.user])

    def step(
        state: RecommenderState, action: jax.Array, key: jax.Array
    ) -> tuple[RecommenderState, RecommenderObservation, jax.Array, jax.Array]:
        user, seen, reward, done = users.step(state.user, action, key)
        event = seen.recent[:1], seen.rating[:1], seen.slot[None] >= 0
        return *_both(user, recommender.advance(state.recurrent[None], *event)[0]), reward, done

    def features(observation: RecommenderObservation) -> PolicyState:
        recommendable = users.recommendable(observation.seen)
        return jax.tree.map(lambda x: x[0], recommender.features(observation.recurrent[None], recommendable[None]))

    return users._replace(
        reset=reset,
        step=step,
        features=features,
        recommendable=lambda observation: users.recommendable(observation.seen),
        terms=lambda observation, reward: users.terms(observation.seen, reward),
        feature_count=0,
        bounds={},
    )


def every_user(params: SimulatorParams, starts: jax.Array) -> tuple[RecommenderState, RecommenderObservation]:
    """All users [users, ...] at their start."""
    users, _ = jax.vmap(lambda user: simulator.start_user(params, user))(jnp.arange(len(params.profile)))
    return _both(users, starts)


def _both(user: SimulatorState, recurrent: jax.Array) -> tuple[RecommenderState, RecommenderObservation]:
    return RecommenderState(user, recurrent), RecommenderObservation(simulator.observe(user), recurrent)
