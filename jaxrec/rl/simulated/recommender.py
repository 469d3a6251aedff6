"""The simulated users as a run's recommender sees them: by the state of its sequence models.

A user's state is that of the simulator (`jaxrec.rl.simulated.users`) and the recurrent state that the run's
hybrid has of it, which goes on by one event where an item is taken and stays where nothing is; no history is read
twice. The states that users come with are computed once for all of them.

Simulated time: the events are `gap` seconds apart, all of them alike, and the first one that the models read has no
known gap; requests do not tell their time. Ratings enter on the run's rating scale, as 0..1.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxrec.data.events import Events
from jaxrec.data.prepared import PreparedData
from jaxrec.data.schema import MISSING_RATING, UNKNOWN_GAP, RatingScale
from jaxrec.errors import DataError
from jaxrec.models.hybrid import Hybrid
from jaxrec.rl.simulated import users as simulator
from jaxrec.rl.simulated.environment import Environment
from jaxrec.rl.simulated.users import SimulatorObservation, SimulatorParams, SimulatorState

USERS_PER_BATCH = 64


class Features(NamedTuple):
    """What the run's policy reads: the supervised `query` [..., width] float32, without request time, and `recent`
    [..., RECENT of `jaxrec.models.cooccurrence`] int32, the last item first."""

    query: jax.Array
    recent: jax.Array


class RecommenderState(NamedTuple):
    """`user`: of the simulator; `recurrent` [4 * hidden + RECENT] float32: of the hybrid."""

    user: SimulatorState
    recurrent: jax.Array


class RecommenderObservation(NamedTuple):
    """The state without who the user is."""

    seen: SimulatorObservation
    recurrent: jax.Array


class Recommender(NamedTuple):
    """The run's models, without a policy, and what of the run decides about simulated events: `graphdef` and
    `variables` of the hybrid, its rating `scale`, and the seconds between events, `gap`."""

    graphdef: nnx.GraphDef[Hybrid]
    variables: nnx.State
    scale: RatingScale
    gap: float

    def advance(self, recurrent: jax.Array, item: jax.Array, rating: jax.Array, where: jax.Array) -> jax.Array:
        """The state [batch, 4 * hidden + RECENT] after one more event each, `rating` in stars; as before where `where`
        is off. All [batch]."""
        unit = (rating - self.scale.minimum) / (self.scale.maximum - self.scale.minimum)
        gap = jnp.full_like(unit, self.gap)
        event = Events(item[:, None], unit[:, None], gap[:, None], where.astype(jnp.int32))
        return nnx.merge(self.graphdef, self.variables).encode(event, recurrent)[1]

    def features(self, recurrent: jax.Array) -> Features:
        """recurrent [batch, 4 * hidden + RECENT] -> [batch, ...]."""
        model = nnx.merge(self.graphdef, self.variables)
        h_lstm, _, h_content, _, recent = model.split_state(recurrent)
        unknown = jnp.full(len(recurrent), UNKNOWN_GAP)
        return Features(model.supervised_query((h_lstm, h_content), unknown), recent)


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
    """[users, 4 * hidden + RECENT] float32: what the models make of the events that each user comes with, of which they
    read the last `max_length`."""

    @jax.jit
    def encode(variables: nnx.State, events: Events) -> jax.Array:
        return nnx.merge(recommender.graphdef, variables).encode(events)[1]

    max_length = nnx.merge(recommender.graphdef, recommender.variables).lstm.config.max_length
    items, ratings = np.asarray(params.profile)[:, :max_length], np.asarray(params.profile_rating)[:, :max_length]
    users, width = items.shape
    lengths = (items > 0).sum(axis=1, dtype=np.int32)
    places = lengths[:, None] - 1 - np.arange(width)  # the profile has the last event first, the models read it last
    where = places >= 0
    order = np.maximum(places, 0)
    unit = recommender.scale.to_unit(ratings)
    item = np.where(where, np.take_along_axis(items, order, axis=1), 0)
    rating = np.where(where, np.take_along_axis(unit, order, axis=1), np.float32(MISSING_RATING))
    gap = np.where(where, np.float32(recommender.gap), np.float32(UNKNOWN_GAP))
    first = lengths == (np.asarray(params.profile) > 0).sum(axis=1)  # what is cut off leaves the first its gap
    gap[first, 0] = UNKNOWN_GAP
    found = []
    for start in range(0, users, USERS_PER_BATCH):
        rows = np.minimum(np.arange(start, start + USERS_PER_BATCH), users - 1)
        found.append(
            np.asarray(encode(recommender.variables, Events(item[rows], rating[rows], gap[rows], lengths[rows])))
        )
    return jnp.asarray(np.concatenate(found)[:users])


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

    return users._replace(
        reset=reset,
        step=step,
        features=lambda observation: jax.tree.map(lambda x: x[0], recommender.features(observation.recurrent[None])),
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
