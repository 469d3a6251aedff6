"""States of the policy at served recommendations: the query after the user's history, the slate with its propensities,
and its rewards."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxrec.config import RatingScale
from jaxrec.data.events import pad_events
from jaxrec.data.schema import UNKNOWN_GAP
from jaxrec.models.features import Array
from jaxrec.models.hybrid import Hybrid
from jaxrec.rl.reward_tables import SHRINKAGE, rating_or_mean
from jaxrec.rl.rewards import RewardTables, RewardTerms, slate_reward_terms
from jaxrec.rl.scoring import Scoring
from jaxrec.rl.served.event_store import unit_ratings
from jaxrec.rl.served.recommendations import Recommendation
from jaxrec.rl.states import PolicyState, by_batches, encode_histories, state_of_recurrent

HISTORIES_PER_BATCH = 64
ROWS_AT_A_TIME = 10_000  # whose rewards are computed together
SHORTEST = 8  # events that a history is padded to at least


class ServedStates(NamedTuple):
    """Served recommendations [rows]: the `state` that a policy sees before each, `exclude` [rows, width] int32
    (0 = none) of the history and the request, the `slate` [rows, k] int32 (0 = empty slot) with its `log_propensities`
    [rows, k] float32 at `temperature` [rows] float32, and the `terms` of its rewards, each [rows, k]. `answered` [rows]
    int32 is how many items the answer had, at most k, of which the slate may be only those that were shown. `user`,
    `version` and `moment` [rows] int32, as `ServedLog` counts them.

    With a reranker a row takes 3.4 kB more, for 100 candidates with their features."""

    state: PolicyState
    exclude: Array
    slate: Array
    log_propensities: Array
    temperature: Array
    answered: Array
    terms: RewardTerms
    user: Array
    version: Array
    moment: Array

    def at(self, rows: Array) -> "ServedStates":
        """These rows alone."""
        return jax.tree.map(lambda column: column[rows], self)


def served_states(
    hybrid: Hybrid, recommendations: Sequence[Recommendation], scale: RatingScale | None, scoring: Scoring
) -> ServedStates:
    """Encodes the recommendations' histories as the server does: the models read the last `max_length` events and the
    gap to the request time, where the request gave one; all items of the history are excluded. What the reranker
    changes depends on these items and on the trend of `scoring`, too."""
    tables = scoring.tables
    count = len(recommendations)
    sizes = np.fromiter((_sizes(one) for one in recommendations), np.dtype((np.int32, 4)), count)
    _, of_slate, of_exclude, of_responses = np.maximum(sizes.max(axis=0, initial=0), 1)
    slate, exclude = np.zeros((count, of_slate), np.int32), np.zeros((count, of_exclude), np.int32)
    log_propensities = np.zeros((count, of_slate), np.float32)
    responses = np.zeros((count, of_responses), np.int32)
    given, weights = np.zeros((2, count, of_responses), np.float32)
    temperature, means = np.zeros(count, np.float32), np.zeros(count, np.float32)
    user, version, moment, answered = np.zeros((4, count), np.int32)
    global_mean = float(np.asarray(tables.item_ratings)[0])
    for row, one in enumerate(recommendations):
        slate[row, : len(one.slate)] = one.slate
        log_propensities[row, : len(one.slate)] = one.log_propensities
        excluded = _excluded(one)
        exclude[row, : len(excluded)] = excluded
        responses[row, : len(one.responses)] = one.responses
        given[row, : len(one.responses)] = unit_ratings(one.response_ratings, scale)
        weights[row, : len(one.responses)] = one.response_weights
        temperature[row], means[row] = one.temperature, _mean_rating(one, scale, global_mean)
        user[row], version[row], moment[row] = one.user, one.version, one.moment
        answered[row] = one.answered
    order = np.argsort(sizes[:, 0], kind="stable")
    encoded = _encoded(hybrid, recommendations, order, scale, scoring, exclude, moment)
    state = jax.tree.map(lambda column: column[np.argsort(order)], encoded)
    chunks = [slice(first, first + ROWS_AT_A_TIME) for first in range(0, count, ROWS_AT_A_TIME)]
    terms = [_response_terms(slate[at], responses[at], given[at], weights[at], means[at], tables) for at in chunks]
    return ServedStates(
        state=state,
        exclude=exclude,
        slate=slate,
        log_propensities=log_propensities,
        temperature=temperature,
        answered=answered,
        terms=jax.tree.map(lambda *parts: np.concatenate(parts), *terms),
        user=user,
        version=version,
        moment=moment,
    )


def _sizes(one: Recommendation) -> tuple[int, int, int, int]:
    """Events of the history, items of the answer, items that are excluded, and responses."""
    return len(one.history.items), one.answered, len(_excluded(one)), len(one.responses)


def _excluded(one: Recommendation) -> np.ndarray:
    """[excluded] int32: items of the history and those that the request excluded."""
    return np.union1d(one.history.items, one.excluded)


def _encoded(
    hybrid: Hybrid,
    recommendations: Sequence[Recommendation],
    order: np.ndarray,
    scale: RatingScale | None,
    scoring: Scoring,
    exclude: np.ndarray,
    moment: np.ndarray,
) -> PolicyState:
    """The states [rows] at the requests in this order.

    Each batch is as long as its longest history, rounded up to a power of two, so that few lengths are compiled: most
    histories of a log are far shorter than what the models may read.
    """
    graphdef, variables = nnx.split(hybrid)

    def encode(rows: np.ndarray) -> PolicyState:
        batch = [recommendations[row] for row in order[rows]]
        longest = max(SHORTEST, *(len(one.history.items) for one in batch))
        events = pad_events(
            [one.history.items for one in batch],
            [unit_ratings(one.history.ratings, scale) for one in batch],
            # Of more events than are read, the first one that is read keeps its true gap.
            [np.concatenate([[UNKNOWN_GAP], np.diff(one.history.times)]) for one in batch],
            min(1 << (longest - 1).bit_length(), hybrid.lstm.config.max_length),
        )
        gaps = [UNKNOWN_GAP if one.request_time is None else one.request_time - one.history.times[-1] for one in batch]
        recurrent = encode_histories(graphdef, variables, events)
        trend = 0.0 if scoring.trends is None else scoring.trends.at(moment[order[rows]])
        return state_of_recurrent(
            graphdef, variables, recurrent, np.array(gaps, np.float32), exclude[order[rows]], trend
        )

    return by_batches(encode, len(recommendations), HISTORIES_PER_BATCH)


def _response_terms(
    slate: np.ndarray,
    responses: np.ndarray,
    given: np.ndarray,
    weights: np.ndarray,
    means: np.ndarray,
    tables: RewardTables,
) -> RewardTerms:
    """Each [rows, k], of a slate [rows, k] int32, its responses [rows, responses] int32 (0: none) with the unit ratings
    `given` and the `weights` [rows, responses] float32, and the users' `means` [rows] float32 before.

    A hit counts the weight of its event. Of several responses to a recommendation each slot has the best hit and the
    nearest genres, and its last rating. An item that was not chosen earns no rating: other users' ratings are no
    response of this user.
    """
    ratings = rating_or_mean(given, responses, np.asarray(tables.item_ratings))

    def of_response(column: int) -> tuple[RewardTerms, jax.Array]:
        """The terms by one of the responses, and which slots it rated."""
        logged = jnp.asarray(responses[:, column]), jnp.asarray(ratings[:, column]), jnp.asarray(means)
        terms = slate_reward_terms(jnp.asarray(slate), *logged, tables)
        terms = terms._replace(hit=terms.hit * jnp.asarray(weights[:, column, None]))
        return terms, (terms.hit > 0) & (given[:, column, None] >= 0)

    found, rated = of_response(0)
    for column in range(1, responses.shape[1]):
        terms, is_rated = of_response(column)
        newer = is_rated | ((terms.hit > 0) & ~rated)
        found = found._replace(
            hit=jnp.maximum(found.hit, terms.hit),
            genre=jnp.maximum(found.genre, terms.genre),
            rating=jnp.where(newer, terms.rating, found.rating),
            centred_rating=jnp.where(newer, terms.centred_rating, found.centred_rating),
        )
        rated |= is_rated
    chosen = found.hit > 0
    found = found._replace(
        rating=jnp.where(chosen, found.rating, 0.0), centred_rating=jnp.where(chosen, found.centred_rating, 0.0)
    )
    where = jnp.asarray(slate > 0)
    return jax.tree.map(lambda term: np.asarray(jnp.where(where, term, 0.0)), found)


def _mean_rating(one: Recommendation, scale: RatingScale | None, global_mean: float) -> float:
    """The mean of the user's ratings before, shrunk as `jaxrec.rl.reward_tables.running_user_means` does."""
    ratings = unit_ratings(one.history.ratings, scale)
    rated = ratings[ratings >= 0]
    return float((rated.sum() + SHRINKAGE * global_mean) / (len(rated) + SHRINKAGE))
